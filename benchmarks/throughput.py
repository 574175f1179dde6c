"""Images per second of a whole training, ours against what people write, and where the time of a step goes.

    python benchmarks/throughput.py                       # the device is chosen by itself; about 12 minutes on 2 cores
    python benchmarks/throughput.py --cases 32 --quick    # a rehearsal
    python benchmarks/throughput.py --save                # also writes results/throughput-DEVICE.json

End to end, data included, in the same run and by turns:

- ``simclr``, ``cutmix``, ``gradmix``: this project, as gradmix-pretrain runs it (Lightning and all).
- ``lightly``: SimCLR as lightly's documentation has it: its transform on PIL images in DataLoader workers, its
  NTXentLoss, SGD, float32. The same network, so that nothing but the loop differs.
- ``naive``: GradMix as published code has it: a second forward pass and a full backward pass for the attribution, and
  a loop over images that pastes. Data, augmentation, layout and precision are ours.

Images up to 64 x 64 are arrays in memory for all; at 224 all read JPEG files.
Then: each part's share of a GradMix step, and the step's FLOP/s over those of a large matrix product on the same
device; and one process against two. What each switch of ``speed`` is worth: switches.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss as LightlyLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from machine import device_here, hardware, save, wait
from PIL import Image
from pytorch_lightning import Callback
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from gradmix import GradMix, Mixed
from gradmix.attribution import default_layers, record
from gradmix.ssl.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EncoderConfig,
    MethodConfig,
    MixConfig,
    OptimizerConfig,
)
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.losses import NTXentLoss
from gradmix.ssl.machine import precision
from gradmix.ssl.networks.backbones import build_backbone
from gradmix.ssl.optimizer import build_optimizer
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.train import build_trainer

JPEGS = 64  # distinct files, read again and again: the page cache holds a small data set in any case
# One loop over another in images per second, end to end, and the least that it should be.
CLAIMS = {
    "cpu": {
        "32 w16": [("simclr", "lightly", 1.5), ("gradmix", "naive", None)],
        "32": [("simclr", "lightly", 1.0), ("gradmix", "naive", 1.3), ("gradmix", "cutmix", None)],
        "64": [("simclr", "lightly", 1.0), ("gradmix", "naive", 1.3), ("gradmix", "cutmix", None)],
        "224": [("simclr", "lightly", None), ("gradmix", "naive", None), ("gradmix", "cutmix", None)],
    },
    "cuda": {
        "32 w16": [("simclr", "lightly", 4.0), ("gradmix", "naive", 3.0), ("gradmix", "cutmix", 1 / 1.15)],
        "32": [("simclr", "lightly", 4.0), ("gradmix", "naive", 3.0), ("gradmix", "cutmix", 1 / 1.15)],
        "64": [("simclr", "lightly", 4.0), ("gradmix", "naive", 3.0), ("gradmix", "cutmix", 1 / 1.15)],
        "224": [("simclr", "lightly", None), ("gradmix", "naive", None), ("gradmix", "cutmix", 1 / 1.15)],
    },
}


@dataclass
class Case:
    size: int
    batch: dict[str, int]  # by device
    steps: dict[str, int]  # timed in every turn
    encoder: str = "resnet18"
    width: int = 64


CASES = {
    "32 w16": Case(32, {"cpu": 128, "cuda": 512}, {"cpu": 8, "cuda": 60}, width=16),
    "32": Case(32, {"cpu": 32, "cuda": 512}, {"cpu": 4, "cuda": 60}),
    "64": Case(64, {"cpu": 8, "cuda": 512}, {"cpu": 3, "cuda": 30}),
    "224": Case(224, {"cpu": 4, "cuda": 128}, {"cpu": 2, "cuda": 30}, encoder="resnet50"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, two steps")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    device = device_here()
    repeats = 1 if options.quick else options.repeats

    result = {"hardware": hardware(device, "lightly", "kornia"), "repeats": repeats, "cases": {}}
    print(" ".join(f"{key}={value}" for key, value in result["hardware"].items()))
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            case = CASES[name]
            steps = 2 if options.quick else case.steps[device.type]
            images = make_images(case, (steps + 2) * case.batch[device.type], Path(folder))
            found = result["cases"][name] = {"batch": case.batch[device.type], "precision": precision(settings(case))}
            print(f"\n{name}: {case.encoder}, batch {found['batch']}, {found['precision']}", flush=True)
            found["images_per_s"], found["claims"] = compare_loops(name, case, images, repeats, folder)
            found |= inside(case, images)
            if options.save:
                save(f"throughput-{device.type}", result)  # after each case: what is measured is not lost
    if not options.quick:
        result["processes"] = compare_processes()
        if options.save:
            save(f"throughput-{device.type}", result)


def settings(case: Case, mix: str = "none", run_dir: str = "") -> Config:
    """lightly's augmentation for CIFAR-10: crop, flip, colour jitter, greyscale; no blur."""
    return Config(
        run_dir=run_dir,
        epochs=1,
        batch_size=case.batch[device_here().type],
        data=DataConfig("benchmark", image_size=case.size, workers=workers(), augment=AugmentConfig(crop=(0.08, 1.0))),
        method=MethodConfig("simclr", selfsup=1.0),
        mix=MixConfig(mix),
        encoder=EncoderConfig(case.encoder, width=case.width),
        optimizer=OptimizerConfig("sgd"),
        knn_every=0,
        pictures_every=0,
    )


def workers() -> int:
    return min(8, os.cpu_count())  # lightly's documentation: 8


def make_images(case: Case, count: int, folder: Path | None = None) -> ImageSet:
    """``count`` random images: uint8 arrays, or JPEG files at 224, in ``folder``."""
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(0, 10, count))
    if case.size < 224:
        pixels = generator.integers(0, 256, (count, 3, case.size, case.size), dtype=np.uint8)
        return ImageSet(labels, case.size, torch.from_numpy(pixels))
    files = []
    for number in range(JPEGS):
        smooth = generator.integers(0, 256, (15, 20, 3), dtype=np.uint8)  # noise would make files of 200 kB
        files.append(str(folder / f"{number}.jpg"))
        Image.fromarray(smooth).resize((500, 375), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return ImageSet(labels, case.size, files=[files[i % JPEGS] for i in range(count)])


class PilImages(Dataset):
    """The same images as torchvision's data sets give them: PIL, transformed one by one."""

    def __init__(self, images: ImageSet, transform: Callable) -> None:
        self.images, self.transform = images, transform
        self.pixels = None if images.images is None else images.images.permute(0, 2, 3, 1).numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self.pixels is not None:
            picture = Image.fromarray(self.pixels[index])
        else:
            picture = Image.open(self.images.files[index]).convert("RGB")
        return self.transform(picture), int(self.images.labels[index])


# The loops. Each returns images per second, data included, without the first two steps.


def ours(case: Case, images: ImageSet, mix: str, folder: str) -> float:
    config = settings(case, mix=mix, run_dir=folder)
    watch = Stopwatch(config.batch_size, len(images))
    build_trainer(config, [watch]).fit(Pretraining(config, images))
    return watch.images_per_s


def lightlys(case: Case, images: ImageSet) -> float:
    device, config = device_here(), settings(case)
    backbone = build_backbone(config.encoder, case.size).to(device)
    head = SimCLRProjectionHead(backbone.num_features, backbone.num_features, 128).to(device)
    pictures = PilImages(images, SimCLRTransform(input_size=case.size, gaussian_blur=0.0))
    loader = DataLoader(pictures, config.batch_size, shuffle=True, drop_last=True, num_workers=workers())
    criterion = LightlyLoss()
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)
    watch = Stopwatch(config.batch_size, len(images))
    for (one, other), _ in loader:
        one, other = one.to(device), other.to(device)
        loss = criterion(head(backbone(one)), head(backbone(other)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.tick()
    return watch.images_per_s


def naive(case: Case, images: ImageSet) -> float:
    config = settings(case, mix="gradmix")
    module, loader, optimizer, autocast = manual(config, images)
    watch = Stopwatch(config.batch_size, len(images))
    for batch in loader:
        views = module.augment(batch.images.to(device_here()), batch.step).contiguous(memory_format=module.layout)
        with autocast():
            mixed, kept = naive_mix(module, views)
            optimizer.zero_grad()
            z, p = module.embed(views)[1], module.embed(mixed)[1]
            ntxent = NTXentLoss(config.method.temperature)
            loss = ntxent(z) + ntxent(z, p, kept)
        loss.backward()
        optimizer.step()
        watch.tick()
    return watch.images_per_s


def naive_mix(module: Pretraining, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    activations: list[torch.Tensor] = []
    with record(module.backbone, default_layers(module.backbone), activations):
        loss = NTXentLoss(module.config.method.temperature)(module.embed(views)[1])
    for activation in activations:
        activation.retain_grad()
    loss.backward()
    maps = []
    for activation in activations:
        cam = (activation * activation.grad.clamp(min=0)).sum(1, keepdim=True)
        maps.append(F.interpolate(cam.float(), views.shape[2:], mode="bilinear"))
    maps = torch.cat(maps, 1).mean(1).detach().cpu().numpy()
    mixed, kept = views.clone(), []
    rows, size = len(views), views.shape[-1]
    generator = np.random.default_rng(0)
    for row in range(rows):
        peak = np.unravel_index(maps[row].argmax(), maps[row].shape)
        side = max(1, round(size * (1 - generator.uniform(0.5, 0.9)) ** 0.5))
        top, left = (min(max(int(place) - side // 2, 0), size - side) for place in peak)
        partner = views[(row + generator.integers(1, rows)) % rows][None]
        patch = F.interpolate(partner, (side, side), mode="bilinear")
        mixed[row, :, top : top + side, left : left + side] = patch[0]
        kept.append(1 - side**2 / size**2)
    return mixed, torch.tensor(kept, device=views.device)


class Stopwatch(Callback):
    """Counts steps, by hand or as Lightning's callback; the first two warm up."""

    def __init__(self, batch: int, images: int) -> None:
        self.batch, self.last, self.step = batch, images // batch, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.tick()

    def tick(self) -> None:
        self.step += 1
        if self.step in (2, self.last):
            wait(device_here())
            now = time.perf_counter()
            if self.step == 2:
                self.start = now
            else:
                self.images_per_s = self.batch * (self.last - 2) / (now - self.start)


def compare_loops(name: str, case: Case, images: ImageSet, repeats: int, folder: str) -> tuple[dict, list]:
    loops: dict[str, Callable[[], float]] = {
        "lightly": lambda: lightlys(case, images),
        "simclr": lambda: ours(case, images, "none", folder),
        "cutmix": lambda: ours(case, images, "cutmix", folder),
        "gradmix": lambda: ours(case, images, "gradmix", folder),
        "naive": lambda: naive(case, images),
    }
    speeds: dict[str, list[float]] = {loop: [] for loop in loops}
    order = list(loops)
    for repeat in range(repeats):
        shift = repeat % len(order)
        for loop in order[shift:] + order[:shift]:
            speeds[loop].append(loops[loop]())
    medians = {loop: round(statistics.median(found), 1) for loop, found in speeds.items()}
    print("  images/s  " + "   ".join(f"{loop} {speed:,.0f}" for loop, speed in medians.items()), flush=True)
    claims = []
    for one, other, least in CLAIMS[device_here().type][name]:
        ratio = statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))
        claims.append({"loop": one, "over": other, "ratio": round(ratio, 3), "at_least": least})
        verdict = "" if least is None else f"   at least {least:.2f}" + ("" if ratio >= least else "  MISSED")
        print(f"  {one:>8} / {other:<8} {ratio:6.2f} x{verdict}", flush=True)
    return medians, claims


# Inside a step: the trainer's own module, driven by hand so that its parts can be timed.


def manual(
    config: Config, images: ImageSet
) -> tuple[Pretraining, TrainLoader, torch.optim.Optimizer, Callable[[], AbstractContextManager[Any]]]:
    """The module, its batches, its optimizer, and what opens autocast."""
    device = device_here()
    module = Pretraining(config, images).to(device)
    module.loader = TrainLoader(images, config.batch_size, 0, config.epochs, device=device, workers=workers())
    half = precision(config) == "bf16-mixed"
    return (
        module,
        module.loader,
        build_optimizer(config, module.parameters()),
        lambda: torch.autocast(device.type, torch.bfloat16, enabled=half),
    )


class Parts(dict):
    """Seconds by part, the device waited for at each end. Parts may be nested; a part is without those inside it."""

    def __init__(self) -> None:
        self.open: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wait(device_here())
        start = time.perf_counter()
        self.open.append(0.0)
        yield
        wait(device_here())
        whole = time.perf_counter() - start
        self[name] = self.get(name, 0.0) + whole - self.open.pop()
        if self.open:
            self.open[-1] += whole

    def wrap(self, function: Callable, name: str) -> Callable:
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return timed


class TimedGradMix(GradMix):
    parts: Parts

    def __call__(self, *arguments: Any, **named: Any) -> Mixed:
        with self.parts.part("mixing"):
            return super().__call__(*arguments, **named)

    def attribute(self, images: torch.Tensor, loss: torch.Tensor | None) -> torch.Tensor | None:
        with self.parts.part("attribution"):
            return super().attribute(images, loss)


def inside(case: Case, images: ImageSet) -> dict:
    """Each part's share of a GradMix step, its peak memory, and its FLOP/s over those of a large product."""
    device, config = device_here(), settings(case, mix="gradmix")
    module, loader, optimizer, autocast = manual(config, images)
    parts = Parts()
    module.mixer = module.looker = TimedGradMix()  # one mixes, the same one looks
    module.mixer.parts = parts
    module.augment.forward = parts.wrap(module.augment.forward, "augmentation")
    module.embed = parts.wrap(module.embed, "forward")
    iterator = iter(loader)

    def step() -> None:
        with parts.part("data"):
            batch = next(iterator)
            batch = batch._replace(images=batch.images.to(device), labels=batch.labels.to(device))
        with parts.part("loss"), autocast():
            loss = module.training_step(batch, 0)
        with parts.part("backward"):
            optimizer.zero_grad()
            loss.backward()
        with parts.part("optimizer"):
            optimizer.step()

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    parts.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    count = len(images) // config.batch_size - 2
    for _ in range(count):
        step()
    seconds = sum(parts.values())
    shares = {name: round(value / seconds, 4) for name, value in sorted(parts.items(), key=lambda item: -item[1])}
    achieved, peak = counter.get_total_flops() * count / seconds, peak_flops(device, precision(config))
    print("  share of the GradMix step  " + "  ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    print(f"  {achieved / 1e12:.3g} TFLOP/s, {achieved / peak:.0%} of a large matrix product's {peak / 1e12:.3g}")
    return {
        "shares": shares,
        "step_flops": counter.get_total_flops(),
        "flops_per_s": achieved,
        "peak_flops_per_s": peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def peak_flops(device: torch.device, precision: str) -> float:
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def compare_processes() -> dict[int, float]:
    """Images per second of gradmix-pretrain on digits with one process and with two, over the same cores or GPUs."""
    found = {}
    # Lightning starts the second process from the script's path, so it must be one.
    command = [str(Path(sys.executable).with_name("gradmix-pretrain")), "epochs=3"]
    on_gpu = device_here().type == "cuda"
    for processes in (1, 2) if not on_gpu or torch.cuda.device_count() > 1 else (1,):
        with tempfile.TemporaryDirectory() as folder:
            devices = [f"trainer.devices={processes}", f"trainer.accelerator={'gpu' if on_gpu else 'cpu'}"]
            settings = ["data.image_size=32", "encoder.width=32", "knn_every=0", f"run_dir={folder}"]
            threads = str(max(1, os.cpu_count() // processes))
            environment = os.environ | {"OMP_NUM_THREADS": threads}
            subprocess.run([*command, *devices, *settings], check=True, capture_output=True, env=environment)
            training = json.loads((Path(folder) / "training.json").read_text())
        found[processes] = training["train/images_per_s"]
        print(f"  {processes} process{'es' if processes > 1 else ''}: {found[processes]:,.0f} images/s", flush=True)
    return found


if __name__ == "__main__":
    main()
