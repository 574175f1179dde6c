"""Views of photographs a second and core, the cores that keep a card busy, and the time to a run's first step.

    python benchmarks/photographs.py PHOTOGRAPHS.tar     # prints; --save writes results/photographs.json; ten minutes

PHOTOGRAPHS.tar holds folders of image files of any size. All loaders read the same files, hand over two views of 224
pixels, and have the same number of workers with one thread each; they take turns, and the median of the repeats counts.
"A core" is a second of the workers' processor time, so that other work on the machine does not matter:

- ``ours``: decode once, cut and resize two crops. Flip, colours and blur are the device's; what they take where there
  is only this processor is measured beside it and added.
- ``torchvision crops``: ``ImageFolder`` and v2's ``RandomResizedCrop``, twice. The same work as ours.
- ``torchvision``: with flip, colours, blur and normalisation, twice. The whole work.
- ``lightly``: its ``SimCLRTransform``. The whole work.

``small``: images of 32 and 64 pixels through the same loader, and through a plain DataLoader as it was used before.
``consumer``: takes batches at a rate that two workers should just keep up with, and says how long it waits for them.
``start``: links to the photographs under many names; a process begins a run and stops after its first step, twice.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightly.transforms import SimCLRTransform
from machine import hardware, save
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import AugmentConfig
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.listing import list_images
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.data.views import Crops

SIZE, BATCH, CARD = 224, 32, 2500  # pixels, images, and images a second of a card that we expect to feed
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # lightly's and torchvision's default
AUGMENT = AugmentConfig(crop=AREA, ratio=RATIO, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5)

FIRST_STEP = """
import os, re, sys, time
began = time.perf_counter()
from pytorch_lightning import Callback
from gradmix.ssl.config import *
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.train import train
imported = time.perf_counter()
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
data = DataConfig("imagefolder", sys.argv[1], image_size=64)
config = Config(run_dir=sys.argv[2], epochs=1, batch_size=16, data=data, method=MethodConfig("simclr", selfsup=1.0),
    mix=MixConfig("none"), encoder=EncoderConfig("resnet18", width=4), optimizer=OptimizerConfig("adam"),
    trainer={"accelerator": "cpu"})
loaded = load_data(config.data, 0)
listed = time.perf_counter()
class Stop(Callback):
    def on_train_batch_end(self, *_):
        times = imported - began, listed - imported, time.perf_counter() - listed
        print("RESULT", *times, before, peak(), flush=True)
        os._exit(0)
train(config, loaded, [Stop()])
"""


class Twice:
    def __init__(self, transform: Callable[[Any], Any]):
        self.transform = transform

    def __call__(self, image: Any) -> tuple[Any, Any]:
        return self.transform(image), self.transform(image)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs", type=Path, help="a tar file of folders of image files")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024, help="that each loader hands over in a repeat")
    parser.add_argument("--files", type=int, nargs="*", default=[10_000, 100_000], help="for the start")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = hardware(torch.device("cpu"), "lightly", "pillow")
    with tempfile.TemporaryDirectory() as folder:
        root = unpack(arguments.photographs, Path(folder) / "photographs")
        files = list_images(root)
        loaders = {
            "ours": ours(files, arguments.images),
            "torchvision crops": folders(root, Twice(crops())),
            "torchvision": folders(root, Twice(v2.Compose([crops(), *colours()]))),
            "lightly": folders(root, SimCLRTransform(SIZE, min_scale=AREA[0])),
        }
        views = measure(loaders, arguments.images, arguments.repeats)
        device_part = colour_seconds(files, arguments.repeats)
        result = {
            "hardware": about,
            "photographs": len(files),
            "views": views,
            "the device's part on one core here, images/s": round(1 / device_part, 1),
            "ours, all on one core, images/s": round(1 / (1 / views["ours"]["1"]["per_core"] + device_part), 1),
            "small": small(files, Path(folder), arguments),
            "consumer": consumer(files, views["ours"]["2"]["per_core"]),
            "start": {str(count): start(files, Path(folder) / f"{count}", count) for count in arguments.files},
        }
    print_table(result)
    if arguments.save:
        save("photographs", result)


def unpack(photographs: Path, folder: Path) -> Path:
    with tarfile.open(photographs) as tar:
        tar.extractall(folder, filter="data")
    inside = [path for path in folder.iterdir() if path.is_dir()]
    return inside[0] if len(inside) == 1 else folder


def crops() -> v2.Transform:
    return v2.Compose([v2.RandomResizedCrop(SIZE, AREA, RATIO, antialias=True), v2.PILToTensor()])


def colours() -> list[v2.Transform]:
    return [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]


def repeated(files: list[str], count: int) -> list[str]:
    return (files * -(-count // len(files)))[:count]


def ours(files: list[str], count: int, size: int = SIZE, photographs: bool = True) -> Callable[[int], TrainLoader]:
    chosen = repeated(files, count)
    data = ImageSet(torch.zeros(count, dtype=torch.long), size, files=chosen, photographs=photographs)
    return lambda workers: TrainLoader(data, BATCH, 0, 1, workers=workers, crops=Crops(2, AREA, RATIO))


def folders(root: Path, transform: Callable[[Any], Any]) -> Callable[[int], DataLoader]:
    data = ImageFolder(str(root), transform)
    return lambda workers: DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def measure(loaders: dict, images: int, repeats: int) -> dict:
    """Images a second with 1 and 2 workers, and for each second of the workers' processor time."""
    found = {name: {"1": [], "2": []} for name in loaders}
    for _ in range(repeats):
        for workers in (1, 2):
            for name, loader in loaders.items():
                found[name][str(workers)].append(run(loader, workers, images))
    return {
        name: {
            workers: {
                "wall": round(statistics.median(wall for wall, _ in each), 1),
                "per_core": round(statistics.median(core for _, core in each), 1),
            }
            for workers, each in by_workers.items()
        }
        for name, by_workers in found.items()
    }


def run(loader: Any, workers: int, images: int) -> tuple[float, float]:
    before, began, seen = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    while seen < images:
        iterator = iter(loader(workers))
        for batch in iterator:
            seen += BATCH
            del batch
        del iterator  # the workers end, and their time is counted
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    core = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seen / wall, seen / core


def colour_seconds(files: list[str], repeats: int) -> float:
    """Seconds for an image's two views on one core of this machine: flip, colours, blur."""
    images = next(iter(ours(files, BATCH)(0))).images
    augment = TwoViews(AUGMENT, SIZE)
    augment(images, 0)
    times = []
    for seed in range(repeats):
        began = time.process_time()
        augment(images, seed)
        times.append(time.process_time() - began)
    return statistics.median(times) / BATCH


def small(files: list[str], folder: Path, arguments: argparse.Namespace) -> dict:
    """Images of 32 and 64 pixels that are decoded when their turn comes: the loader, and the one before it."""
    result = {}
    for size in (32, 64):
        (folder / f"{size}").mkdir()
        for number, file in enumerate(files):
            Image.open(file).convert("RGB").resize((size, size)).save(folder / f"{size}/{number}.jpg")
        count = 8 * arguments.images
        paths = repeated(list_images(folder / f"{size}"), count)
        data = ImageSet(torch.zeros(count, dtype=torch.long), size, files=paths)
        rows = torch.randperm(count).split(BATCH)
        loaders = {
            "ours": ours(paths, count, size, photographs=False),
            "before": lambda workers, data=data, rows=rows: DataLoader(data, batch_sampler=rows, num_workers=workers),
        }
        result[str(size)] = measure(loaders, count, arguments.repeats)
    return result


def consumer(files: list[str], per_core: float) -> dict:
    """A card that takes batches at a rate, played by waiting."""
    workers, rate = 2, round(1.6 * per_core)
    batches = iter(ours(files, 100 * BATCH)(workers))
    next(batches)
    waited, began = 0.0, time.perf_counter()
    for _ in range(60):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(BATCH / rate)
    share = waited / (time.perf_counter() - began)
    return {
        "workers": workers,
        "rate, images/s": rate,
        "share of the time spent waiting": round(share, 3),
        f"cores for {CARD} images/s": round(CARD / per_core, 1),
    }


def start(files: list[str], folder: Path, count: int) -> list[dict]:
    """Seconds and MiB to the first step of two runs, one after the other, over ``count`` links in 100 class folders."""
    for number in range(count):
        place = folder / "images" / f"{number % 100:03}"
        if number < 100:
            place.mkdir(parents=True)
        os.symlink(files[number % len(files)], place / f"{number:07}.jpg")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    runs = []
    for name in ("first", "second"):
        command = [sys.executable, "-c", FIRST_STEP, str(folder / "images"), str(folder / name)]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        numbers = [float(word) for word in out.split("RESULT", 1)[1].split()]
        keys = ("imports, s", "list and split, s", "first step, s", "imports, MiB", "in all, MiB")
        runs.append({key: round(value, 1) for key, value in zip(keys, numbers, strict=True)})
    return runs


def print_table(result: dict) -> None:
    views = result["views"]
    print("| two views of 224 pixels | a core, images/s | 1 worker | 2 workers | ours to it, a core |")
    print("|---|---:|---:|---:|---:|")
    for name, by_workers in views.items():
        one, two = by_workers["1"], by_workers["2"]
        ratio = views["ours"]["1"]["per_core"] / one["per_core"]
        print(f"| {name} | {one['per_core']:.0f} | {one['wall']:.0f} | {two['wall']:.0f} | {ratio:.2f} |")
    for key in result:
        if key.endswith("images/s"):
            print(f"{key}: {result[key]:.0f}")
    for size, loaders in result["small"].items():
        rates = {name: by_workers["1"]["per_core"] for name, by_workers in loaders.items()}
        print(f"{size} pixels, a core, images/s: {rates}")
    print("consumer:", json.dumps(result["consumer"]))
    for count, runs in result["start"].items():
        print(f"start with {count} files:", *map(json.dumps, runs), sep="\n  ")


if __name__ == "__main__":
    main()
