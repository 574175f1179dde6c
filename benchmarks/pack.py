"""One open-set split of TinyImageNet as one file, small enough to travel to a GPU that is lent for minutes.

    python benchmarks/pack.py PATH/tiny-imagenet-200 --split 0 --out .pack/tinyimagenet-0.tar.xz

The training images of the split's 20 known classes and the whole validation set, as they are: unpacked, the folder is
a ``data.root`` for ``data=tinyimagenet data.split=0``.
"""

import argparse
import tarfile
from pathlib import Path

from gradmix.ssl.data.splits import SPLITS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--split", type=int, default=0, choices=range(5))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    names = sorted((options.root / "wnids.txt").read_text().split())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(options.out, "w:xz", preset=6) as pack:
        for part in ("wnids.txt", "val", *(f"train/{names[i]}" for i in sorted(SPLITS["tinyimagenet"][options.split]))):
            pack.add(options.root / part, f"tiny-imagenet-200/{part}")
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
