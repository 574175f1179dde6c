"""What a teacher, prototypes and outliers cost: a training step with them over the same step without.

    python benchmarks/added_step.py             # prints; --save writes results/added_step.json; --quick: FLOPs only

The real training step (`gradmix.ssl.pretrain`) with its backward pass: ResNet-18 with the small-image stem at 32 x 32,
on digits. FLOPs are counted by torch and exact: those of convolutions and products of matrices. Times are paired: every
repeat runs all steps once, in rotating order; the median of the ratios is printed.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from machine import device_here, hardware, save
from mixing_step import count_flops, measure
from safetensors.torch import save_file

from gradmix.ssl.config import (
    Config,
    DataConfig,
    DistillConfig,
    EncoderConfig,
    MethodConfig,
    MixConfig,
    OptimizerConfig,
    OutlierConfig,
)
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.data.open_set import OpenSetData, load_data
from gradmix.ssl.networks.backbones import build_backbone
from gradmix.ssl.pretrain import Pretraining

JOINT = MethodConfig("joint", supervised=1.0, selfsup=1.0)
SUPCON = MethodConfig("supcon", supervised=1.0, mixed_loss="supervised", attribution="supervised")
SPHOR = MethodConfig("sphor", targets=1.0, mixed_loss="targets", attribution="targets")
PALM = MethodConfig("palm", prototypes=1.0, mixed_loss="prototypes", attribution="prototypes")
EMA, LOGITS, RUN = DistillConfig("ema"), DistillConfig("ema", form="logits"), DistillConfig("run", teacher="backbone")
OUT = OutlierConfig("attribution")
# Name of the step: method, mix, teacher, outliers.
STEPS = {
    "joint, none": (JOINT, "none", None, None),
    "joint, none, frozen teacher": (JOINT, "none", RUN, None),
    "joint, gradmix": (JOINT, "gradmix", None, None),
    "joint, gradmix, frozen teacher": (JOINT, "gradmix", RUN, None),
    "joint, gradmix, ema": (JOINT, "gradmix", EMA, None),
    "joint, gradmix, outliers": (JOINT, "gradmix", None, OUT),
    "joint, none, outliers": (JOINT, "none", None, OUT),
    "sphor, gradmix": (SPHOR, "gradmix", None, None),
    "sphor, gradmix, logits": (SPHOR, "gradmix", LOGITS, None),
    "sphor, gradmix, outliers": (SPHOR, "gradmix", None, OUT),
    "supcon, none": (SUPCON, "none", None, None),
    "palm, none": (PALM, "none", None, None),
    "supcon, gradmix": (SUPCON, "gradmix", None, None),
    "palm, gradmix": (PALM, "gradmix", None, None),
}
# One step over another, and the most that it may be (None: for information).
CLAIMS = [
    ("joint, none, frozen teacher", "joint, none", 1.4),
    ("joint, gradmix, frozen teacher", "joint, gradmix", 1.4),
    ("joint, gradmix, ema", "joint, gradmix", 1.4),
    ("sphor, gradmix, logits", "sphor, gradmix", 1.4),
    ("joint, gradmix, outliers", "joint, gradmix", 1.1),
    ("sphor, gradmix, outliers", "sphor, gradmix", 1.1),
    ("joint, none, outliers", "joint, none", None),  # who does not mix pays for the map too
    ("palm, none", "supcon, none", 1.1),
    ("palm, gradmix", "supcon, gradmix", 1.1),
]


def training_step(
    name: str, data: OpenSetData, batch_size: int, width: int, device: torch.device, teacher: Path
) -> Callable[[], None]:
    """A network of its own, and the function that takes one step with it."""
    method, mix, distill, outliers = STEPS[name]
    torch.manual_seed(0)
    config = Config(
        run_dir="unused",
        batch_size=batch_size,
        data=DataConfig("digits", image_size=32, split=0),
        method=method,
        mix=MixConfig(mix),
        encoder=EncoderConfig("resnet18", width),
        optimizer=OptimizerConfig("adam"),
        distill=distill or DistillConfig(),
        outliers=outliers or OutlierConfig(),
    )
    if config.distill.name == "run":
        config.distill = DistillConfig("run", teacher=str(teacher))
        if not teacher.exists():  # of the same size; what it has learned makes no difference here
            save_file(build_backbone(config.encoder, 32).state_dict(), teacher)
    module = Pretraining(config, data.train).to(device)
    module.loader = TrainLoader(data.train, batch_size, seed=0, epochs=1, device=device)
    batch, optimizer = next(iter(module.loader)), torch.optim.Adam(module.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of teachers, prototypes and outliers in a training step.")
    parser.add_argument("--save", action="store_true", help="write results/added_step.json")
    parser.add_argument("--quick", action="store_true", help="FLOPs only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()

    device = device_here()
    batch_size = 256 if device.type == "cuda" else 16
    data = load_data(DataConfig("digits", image_size=32, split=0), 0)
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "backbone.safetensors"
        steps = {name: training_step(name, data, batch_size, arguments.width, device, teacher) for name in STEPS}
    flops = count_flops(steps)
    seconds = {} if arguments.quick else measure(steps, arguments.repeats, device)
    rows = []
    for step, over, at_most in CLAIMS:
        ratio = flops[step] / flops[over]
        verdict = "" if at_most is None else f"   at most {at_most:.2f}" + ("" if ratio <= at_most else "  MISSED")
        time = None
        if seconds:
            time = round(statistics.median(a / b for a, b in zip(seconds[step], seconds[over], strict=True)), 3)
        print(
            f"{step:>31} / {over:<15} flops {ratio:6.3f}{verdict}" + (f"   time {time:.2f}" if time else ""), flush=True
        )
        rows.append({"step": step, "over": over, "flops": round(ratio, 4), "at_most": at_most, "time": time})
    if arguments.save:
        save(
            "added_step", {"hardware": hardware(device), "images": batch_size, "width": arguments.width, "claims": rows}
        )


if __name__ == "__main__":
    main()
