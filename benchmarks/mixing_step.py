"""What does looking cost: a training step with GradMix over one with random CutMix boxes.

    python benchmarks/mixing_step.py            # prints; --save writes results/mixing_step.json; --quick: a minute

ResNet-18 with the small-image stem, a projection head and Adam; NT-Xent on two views, mixed views as positives. The
steps differ in nothing but the mixer:

- ``cutmix``: boxes at random places. The step that all others are divided by.
- ``gradmix``: attribution of the last three stages (``gradmix 2``: two) on the graph of the step itself.
- ``separate``: what a CAM library does: another forward pass for the attribution, and a full backward pass.
- ``compiled``: the CutMix step has all four stages compiled; GradMix's those that attribution does not walk through
  (``gradmix``: layer1 and layer2), or all as well (``gradmix all``), where a compiled backward computes the weights'
  gradients each time that it is walked.

FLOPs are counted by torch and exact. Times are paired: every repeat runs all steps once, in rotating order, and divides
by that repeat's CutMix step; the median over repeats is printed, so that a busy machine moves both sides.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch._dynamo.config
import torch._functorch.config
import torch.nn.functional as F
import torchvision
from machine import device_here, hardware, save, wait
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gradmix import CutMix, GradMix, Mixer, layercam
from gradmix.attribution import default_layers, record
from gradmix.ssl.losses import NTXentLoss
from gradmix.ssl.networks.layout import layout_of

# One step over another, and the most that it may be (None: for information).
CLAIMS = {
    "flops": [
        ("gradmix", "cutmix", 1.09),
        ("gradmix 2", "cutmix", 1.05),
        # Counted in forward passes, a step without attribution is 6, the separate form 9, and two of four stages walked
        # back for activations alone 0.5: with three layers 0.72 is the floor, with two 0.69.
        ("gradmix", "separate", None),
        ("gradmix 2", "separate", 0.70),
    ],
    "time": [("gradmix", "cutmix", 1.20), ("gradmix 2", "cutmix", 1.12), ("gradmix", "separate", 0.80)],
    "time, compiled": [("gradmix", "cutmix", 1.25), ("gradmix all", "cutmix", None)],
}


class SeparateGradMix(GradMix):
    """What a CAM library does: a forward pass for the attribution alone, and ``backward()`` through everything."""

    def __init__(self, encoder: nn.Module, ntxent: nn.Module) -> None:
        super().__init__()
        self.encoder, self.ntxent = encoder, ntxent

    def attribute(self, images: Tensor, loss: Tensor | None) -> Tensor:
        activations: list[Tensor] = []
        with torch.enable_grad(), record(self.encoder, default_layers(self.encoder), activations):
            guide = self.ntxent(F.normalize(self.encoder(images), dim=1))
            for activation in activations:
                activation.retain_grad()
            guide.backward()
            # The same maps from the gradients at hand: layercam's own derivative of this is exactly them.
            leaves = [activation.detach().requires_grad_() for activation in activations]
            replay = sum((leaf * a.grad).sum() for leaf, a in zip(leaves, activations, strict=True))
        self.encoder.zero_grad()
        return layercam(replay, leaves, tuple(images.shape[2:]))


def training_step(name: str, views: Tensor, compiled: Sequence[str] = ()) -> Callable[[], None]:
    """A network of its own, some stages compiled, and the function that takes one step with it."""
    torch.manual_seed(0)
    encoder = torchvision.models.resnet18()
    encoder.conv1, encoder.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    encoder = encoder.to(views.device, memory_format=layout_of(encoder))
    for stage in compiled:
        getattr(encoder, stage).compile(dynamic=False)
    ntxent = NTXentLoss(0.1)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    mixers: dict[str, Callable[[], Mixer]] = {
        "cutmix": CutMix,
        "gradmix": GradMix,
        "gradmix 2": lambda: GradMix(2),
        "gradmix all": GradMix,
        "separate": lambda: SeparateGradMix(encoder, ntxent),
    }
    mixer = mixers[name]()

    def step() -> None:
        with mixer.watch(encoder) if type(mixer) is GradMix else nullcontext():
            z = F.normalize(encoder(views), dim=1)
        loss = ntxent(z)
        mixed = mixer(views, loss)
        p = F.normalize(encoder(mixed.images), dim=1)
        optimizer.zero_grad()
        (loss + ntxent(z, positives=p, weight=mixed.kept)).backward()
        optimizer.step()

    return step


def count_flops(steps: dict[str, Callable[[], None]]) -> dict[str, int]:
    counts = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        counts[name] = counter.get_total_flops()
    return counts


def measure(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step in every repeat; the order rotates, so that none always runs after the same one."""
    names = list(steps)
    seconds = {name: [] for name in names}
    for repeat in range(-1, repeats):  # one to warm up
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            wait(device)
            start = time.perf_counter()
            steps[name]()
            wait(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def share_of_convolution(step: Callable[[], None], device: torch.device) -> float:
    """Share of the step's own time that convolutions take, forward and backward."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        wait(device)
    times = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
    ]
    convolution = ("conv", "gemm", "xmma", "cudnn", "cutlass") if on_gpu else ("conv",)
    return sum(t for key, t in times if any(c in key.lower() for c in convolution)) / sum(t for _, t in times)


def report(kind: str, figures: dict[str, list[float]]) -> list[dict]:
    """Print and return the median of the paired ratios of every claim."""
    rows = []
    for step, over, at_most in CLAIMS[kind]:
        ratio = statistics.median(a / b for a, b in zip(figures[step], figures[over], strict=True))
        rows.append({"kind": kind, "step": step, "over": over, "ratio": round(ratio, 4), "at_most": at_most})
        verdict = "" if at_most is None else f"   at most {at_most:.2f}" + ("" if ratio <= at_most else "  MISSED")
        print(f"  {kind:<15} {step:>11} / {over:<9} {ratio:6.3f}{verdict}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of GradMix in a training step.")
    parser.add_argument("--save", action="store_true", help="write results/mixing_step.json")
    parser.add_argument("--quick", action="store_true", help="small sizes, two repeats, nothing compiled")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()

    torch._functorch.config.donated_buffer = False  # compiled graphs are walked twice
    torch._dynamo.config.recompile_limit = 64  # all networks of a run share one limit
    device = device_here()
    rows_of = {32: 512, 64: 256} if device.type == "cuda" else {32: 32, 64: 8}  # two views of half as many images
    if arguments.quick:
        rows_of, arguments.repeats = {16: 16}, 2

    result = {"hardware": hardware(device), "repeats": arguments.repeats, "sizes": {}}
    print(" ".join(f"{k}={v}" for k, v in result["hardware"].items()))
    for size, rows in rows_of.items():
        views = torch.rand(rows, 3, size, size, device=device).to(memory_format=torch.channels_last)
        steps = {name: training_step(name, views) for name in ("cutmix", "gradmix", "gradmix 2", "separate")}
        flops = count_flops(steps)
        seconds = measure(steps, arguments.repeats, device)
        other = {name: 1 - share_of_convolution(steps[name], device) for name in ("cutmix", "gradmix")}
        milliseconds = {name: round(statistics.median(s) * 1e3, 1) for name, s in seconds.items()}
        print(
            f"{size} x {size}, {rows} views: CutMix step {milliseconds['cutmix']:.0f} ms, median of {arguments.repeats}"
        )
        claims = report("flops", {name: [count] for name, count in flops.items()}) + report("time", seconds)
        if not arguments.quick:
            early, late = ["layer1", "layer2"], ["layer3", "layer4"]
            stages = {"cutmix": early + late, "gradmix": early, "gradmix all": early + late}
            compiled = {name: training_step(name, views, stages[name]) for name in stages}
            claims += report("time, compiled", measure(compiled, arguments.repeats, device))
        print(
            f"  not convolution: {other['cutmix']:.0%} of the CutMix step, {other['gradmix']:.0%} of the GradMix step"
        )
        result["sizes"][size] = {
            "views": rows,
            "flops": flops,
            "milliseconds": milliseconds,
            "claims": claims,
            "not_convolution": {name: round(share, 3) for name, share in other.items()},
        }
    if arguments.save:
        save("mixing_step", result)


if __name__ == "__main__":
    main()
