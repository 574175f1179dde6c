"""Is training worth it? The same detector and kNN on raw pixels, on a random network, and on what training made of it.

    python benchmarks/starts.py photographs --archive photographs.tar            # prints; --save: results/starts.json
    python benchmarks/starts.py tinyimagenet --archive tiny-imagenet-200-osr.tar.xz --save
    ... epochs=30 data.image_size=96                                             # any settings of gradmix-pretrain

One run with the defaults of `gradmix-pretrain`, but for what ``DATA`` says, begins from a file of random weights: so
its metrics have `pixels` (the primary detector on raw pixels), `deep_knn_start` (on the random network) and `deep_knn`.
Of TinyImageNet the first split's 20 known classes, so many training images of each, and all validation images.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import torch
from machine import RESULTS, hardware, save
from safetensors.torch import save_file

from gradmix.ssl.config import EncoderConfig
from gradmix.ssl.networks.backbones import backbone_metadata, build_backbone

DATA = {
    "photographs": ["data=imagefolder", "data.known=[dog,bird,reptile]", "data.image_size=64", "epochs=20"],
    "tinyimagenet": ["data=tinyimagenet", "data.split=0", "data.image_size=32", "epochs=10"],
}
WIDTH, EACH = 16, 100  # of the network; training images of each class of TinyImageNet
METRICS = ("auroc", "fpr95_known", "oscr")
COLUMNS = {"raw pixels": "pixels", "random network": "deep_knn_start", "the run": "deep_knn"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("settings", nargs="*", help="of gradmix-pretrain, after those of DATA")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    about = hardware(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = unpack(options.archive, folder / "images")
        settings = [*DATA[options.data], f"encoder.width={WIDTH}", *options.settings]
        size = int(next(one for one in reversed(settings) if one.startswith("data.image_size=")).partition("=")[2])
        torch.manual_seed(0)
        encoder = build_backbone(EncoderConfig("resnet18", WIDTH), size)
        save_file(encoder.state_dict(), folder / "random.safetensors", backbone_metadata(encoder, size))
        words = [f"data.root={root}", f"encoder.init={folder / 'random.safetensors'}", f"run_dir={folder / 'run'}"]
        code = "from gradmix.eval.commands.pretrain import main; main()"
        subprocess.run([sys.executable, "-c", code, *settings, *words, "trainer.accelerator=cpu"], check=True)
        numbers = json.loads((folder / "run" / "metrics.json").read_text())
    rows = {
        column: {metric: round(100 * numbers[f"osr/{who}/{metric}"], 2) for metric in METRICS}
        for column, who in COLUMNS.items()
    }
    interval = [round(100 * numbers[f"osr/deep_knn/auroc_{end}"], 1) for end in ("low", "high")]
    print(f"\n{'%':<18}" + "".join(f"{metric:>14}" for metric in METRICS))
    for column, values in rows.items():
        print(f"{column:<18}" + "".join(f"{value:>14.2f}" for value in values.values()))
    print(f"AUROC of the run: 95 % interval {interval}")
    if options.save:
        path = RESULTS / "starts.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        result = {"hardware": about, "settings": settings, "rows": rows, "auroc_interval": interval}
        save("starts", before | {options.data: result | {"seconds": round(numbers["train/seconds"])}})


def unpack(archive: Path, root: Path) -> Path:
    """The archive's only folder; of a training folder's images the first ``EACH``."""
    seen: Counter[str] = Counter()

    def wanted(member: tarfile.TarInfo, to: str) -> tarfile.TarInfo | None:
        parts = Path(member.name).parts
        if "train" in parts and member.isfile():
            seen[parts[-3]] += 1
            if seen[parts[-3]] > EACH:
                return None
        return tarfile.data_filter(member, to)

    with tarfile.open(archive) as file:
        file.extractall(root, filter=wanted)
    return next(root.iterdir())


if __name__ == "__main__":
    main()
