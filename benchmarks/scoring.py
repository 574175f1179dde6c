"""What gradmix-score costs beside the same work by hand, and what it and gradmix-embed take at 100,000 images and more.

    python benchmarks/scoring.py            # prints; --save writes results/scoring.json; some minutes

JPEG files, cut at random from scikit-learn's two photographs, through a ResNet-18 with random weights, against 10,000
training features (deep_knn, exact). Three ways, in turn, start-up left out, the network's weights the same:

- ``gradmix``: ``write_scores``, what gradmix-score does: decoding, network and search overlap; CSV with class, p-value
  and nearest training image, every batch forced to disk.
- ``by hand``: torchvision's network and transform, a DataLoader with a worker for every CPU; first all features, then
  FAISS, then a CSV of path and score.
- ``OpenOOD``: its evaluation's loop: batch after batch from such a DataLoader, network, FAISS, results kept in lists.

The claims: at least as fast as either, by the median of the ratios; 80 % of the time inside the network. Memory:
the largest resident size of a process that scores links to one small image, 1,000 and 100,000 of them, with a small
network; and of one that embeds them, 1,000 and 200,000.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
import torchvision
from machine import device_here, hardware, in_turns, save, wait
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from gradmix.eval.config import EmbedConfig
from gradmix.eval.detectors import DeepKNN
from gradmix.eval.features.embed import embed_files, find_embedder
from gradmix.eval.scoring.score_file import write_scores
from gradmix.eval.scoring.scorer import Scorer, write_scorer
from gradmix.ssl.data import listing
from gradmix.ssl.data.images import IMAGENET
from gradmix.ssl.machine import usable_cpus
from gradmix.ssl.networks.backbones import ResNet, backbone_metadata

K, BANK, BATCH, GOAL = 5, 10_000, 128, 0.8
Files = list[str]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--links", type=int, default=100_000)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)  # a process of its own: score or embed, the rest
    arguments = parser.parse_args()
    if arguments.alone:
        work, detector, folder = arguments.alone[0], arguments.alone[1], Path(arguments.alone[2])
        files = listing.Files(listing.list_images(folder))
        if work == "score":
            write_scores(Scorer(detector), files, folder.with_suffix(".csv"))
        else:
            embed_files(find_embedder(EmbedConfig(run=detector), files), files, folder.with_suffix(".npy"), folder)
        # not ru_maxrss, which begins with what the process that started this one had
        status = Path("/proc/self/status").read_text().split()
        print(int(status[status.index("VmHWM:") + 1]) / 1024)
        return
    device = device_here()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = photographs(folder / "photographs", arguments.images)
        detector = make_detector(folder / "detector", arguments.side, width=64, stem="imagenet", rows=BANK)
        result = {"hardware": hardware(device, "faiss-cpu"), "images": len(files), "side": arguments.side}
        print(" ".join(f"{key}={value}" for key, value in result["hardware"].items()))
        result |= speed(detector, files, folder, device, arguments.repeats)
        result["memory_mib"] = memory(folder, "score", arguments.links)
        result["memory_mib_embedding"] = memory(folder, "embed", 2 * arguments.links)
    if arguments.save:
        save("scoring", result)


def photographs(folder: Path, count: int) -> Files:
    """JPEG files of 256 x 320 pixels."""
    folder.mkdir()
    rng, pictures = np.random.default_rng(0), load_sample_images().images
    for number in range(count):
        picture = pictures[number % 2]
        y, x = rng.integers(picture.shape[0] - 256), rng.integers(picture.shape[1] - 320)
        Image.fromarray(picture[y : y + 256, x : x + 320]).save(folder / f"{number:06d}.jpg", quality=90)
    return sorted(map(str, folder.iterdir()))


def make_detector(folder: Path, side: int, width: int, stem: str, rows: int) -> Path:
    """A saved deep_knn on features of a network with random weights."""
    torch.manual_seed(0)
    encoder = ResNet("resnet18", width=width, stem=stem)
    folder.mkdir()
    (folder / "weights").mkdir()
    save_file(encoder.state_dict(), folder / "weights" / "backbone.safetensors", backbone_metadata(encoder, side))
    rng = np.random.default_rng(0)
    features = rng.random((rows, encoder.num_features), dtype=np.float32)
    detector = DeepKNN(K).fit(features, np.arange(rows) % 10).calibrate(rng.random((200, encoder.num_features)))
    classes, names = [f"class {number}" for number in range(10)], [f"{row}.jpg" for row in range(rows)]
    write_scorer(folder, detector, folder / "weights", classes, "features", names, None)
    return folder


def speed(folder: Path, files: Files, scratch: Path, device: torch.device, repeats: int) -> dict:
    scorer = Scorer(folder, device.type)
    theirs = torchvision.models.resnet18().to(device).eval()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(scorer.backbone.encoder.state_dict())
    side, bank = scorer.backbone.image_size, np.ascontiguousarray(scorer.detector.bank_[:])
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank)
    inside: list[float] = []
    scorer.look = timed(scorer.look, inside, device)

    def gradmix() -> np.ndarray:
        (scratch / "ours.csv").unlink(missing_ok=True)
        write_scores(scorer, files, scratch / "ours.csv", BATCH)
        with open(scratch / "ours.csv") as file:
            return np.array([float(row["score"]) for row in csv.DictReader(file)])

    ways = {
        "gradmix": gradmix,
        "by hand": lambda: by_hand(theirs, index, loader(files, side), files, scratch / "theirs.csv", device),
        "OpenOOD": lambda: openood(theirs, index, loader(files, side), device),
    }
    scores = {name: way() for name, way in ways.items()}  # also a warm-up
    inside.clear()
    seconds = in_turns(ways, repeats, device)
    apart = {name: float(np.abs(scores[name] - scores["gradmix"]).max()) for name in ways}
    rate = {name: round(len(files) / statistics.median(values), 1) for name, values in seconds.items()}
    claims = []
    for name in ("by hand", "OpenOOD"):
        ratio = statistics.median(t / o for t, o in zip(seconds[name], seconds["gradmix"], strict=True))
        claims.append({"what": f"speed over {name}", "ratio": round(ratio, 3), "at_least": 1.0, "holds": ratio >= 1})
    share = sum(inside) / sum(seconds["gradmix"])
    claims.append({"what": "share of the network", "ratio": round(share, 3), "at_least": GOAL, "holds": share >= GOAL})
    for name in ways:
        print(f"  {name:<12}{rate[name]:>10.1f} images/s, scores {apart[name]:.1g} apart")
    for claim in claims:
        verdict = "holds" if claim["holds"] else "MISSED"
        print(f"  {claim['what']:<24}{claim['ratio']:>8.3f}  {verdict}: at least {claim['at_least']}")
    return {"images_per_s": rate, "largest_difference": apart, "claims": claims}


def timed(function: Callable, seconds: list[float], device: torch.device) -> Callable:
    def call(*arguments: object) -> object:
        start = time.perf_counter()
        result = function(*arguments)
        wait(device)
        seconds.append(time.perf_counter() - start)
        return result

    return call


class Photographs(Dataset):
    """Files through torchvision's transforms."""

    def __init__(self, files: Files, side: int) -> None:
        normalize = transforms.Normalize(*IMAGENET)
        steps = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor(), normalize]
        self.files, self.transform = files, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Tensor:
        with Image.open(self.files[row]) as image:
            return self.transform(image.convert("RGB"))


def loader(files: Files, side: int) -> DataLoader:
    return DataLoader(Photographs(files, side), batch_size=BATCH, num_workers=usable_cpus())


@torch.inference_mode()
def by_hand(
    network: torch.nn.Module, index: faiss.Index, images: DataLoader, files: Files, out: Path, device: torch.device
) -> np.ndarray:
    features = torch.cat([network(batch.to(device)).cpu() for batch in images])
    squared, _ = index.search(torch.nn.functional.normalize(features).numpy(), K)
    scores = np.sqrt(squared[:, -1])
    with open(out, "w", newline="") as file:
        csv.writer(file).writerows([("path", "score"), *zip(files, scores.tolist(), strict=True)])
    return scores


@torch.no_grad()
def openood(network: torch.nn.Module, index: faiss.Index, images: DataLoader, device: torch.device) -> np.ndarray:
    confidences = []
    for batch in images:
        features = network(batch.to(device)).cpu().numpy()
        squared, _ = index.search(features / np.linalg.norm(features, axis=-1, keepdims=True), K)
        confidences.append(torch.from_numpy(-squared[:, -1]))
    return np.sqrt(-torch.cat(confidences).numpy())


def memory(scratch: Path, work: str, links: int) -> dict[str, float]:
    """Largest resident size, MiB, of a process that scores or embeds so many images."""
    folder, used = scratch / work, {}
    folder.mkdir()
    detector = make_detector(folder / "small", 16, width=4, stem="small", rows=1000)
    Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(folder / "one.png")
    for count in (1000, links):
        (folder / str(count)).mkdir()
        for number in range(count):
            (folder / str(count) / f"{number:07d}.png").symlink_to(folder / "one.png")
        words = [sys.executable, __file__, "--alone", work, str(detector), str(folder / str(count))]
        start = time.perf_counter()
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        used[str(count)], rate = round(float(said.split()[-1]), 1), count / (time.perf_counter() - start)
        print(f"  {work} {count:>7} images: {used[str(count)]:.0f} MiB, {rate:.0f} images/s")
    return used


if __name__ == "__main__":
    main()
