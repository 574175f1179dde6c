"""What each switch of a GradMix step is worth: the step's time with one setting changed, over the step as it is.

    python benchmarks/switches.py            # about a quarter of an hour on 2 cores; --turns 1 for a rehearsal
    python benchmarks/switches.py --save     # also writes results/switches-DEVICE.json

The step of throughput.py's case "32" (ResNet-18, 32 x 32). All variants take turns; the ratio is the median over turns,
with the middle half of them beside it. On a CPU the process's own time is measured, on one thread: other programs on
the machine then count for little.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import device_here, hardware, save, wait
from throughput import CASES, Case, make_images, manual, settings

from gradmix.ssl.config import Config
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.machine import precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    device, case = device_here(), CASES["32"]
    if device.type == "cpu":
        torch.set_num_threads(1)
    result = {"hardware": hardware(device), "turns": options.turns, "precision": precision(settings(case))}
    print(" ".join(f"{key}={value}" for key, value in result["hardware"].items()))

    steps = {name: stepper(changed(change), images_of(case)) for name, change in variants().items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, options.turns):  # one to warm up, and to compile
        for name, step in steps.items():
            spent = timed(step)
            if turn >= 0:
                seconds[name].append(spent)

    result["seconds"] = {name: round(statistics.median(found), 4) for name, found in seconds.items()}
    result["over the step as it is"] = {}
    print("of the step's time, median and middle half over turns")
    for name, found in seconds.items():
        ratios = sorted(a / b for a, b in zip(found, seconds["as it is"], strict=True))
        low, middle, high = (round(ratios[int(share * (len(ratios) - 1))], 3) for share in (0.25, 0.5, 0.75))
        result["over the step as it is"][name] = {"median": middle, "low": low, "high": high}
        print(f"  {name:<30} {middle:6.3f}   {low:.3f} to {high:.3f}")
    if options.save:
        save(f"switches-{device.type}", result)


def variants() -> dict[str, Callable[[Config], None]]:
    batch = CASES["32"].batch[device_here().type]
    changes: dict[str, Callable[[Config], None]] = {
        "as it is": lambda config: None,
        "speed.channels_last=false": lambda config: setattr(config.speed, "channels_last", False),
        "speed.fused=false": lambda config: setattr(config.speed, "fused", False),
        "speed.compile=true": lambda config: setattr(config.speed, "compile", True),
        f"speed.micro_batch={batch}": lambda config: setattr(config.speed, "micro_batch", batch),  # of 2 * batch views
        "mix.attribution_every=2": lambda config: setattr(config.mix, "attribution_every", 2),
    }
    if precision(settings(CASES["32"])) == "bf16-mixed":
        changes["trainer.precision=32-true"] = lambda config: config.trainer.update(precision="32-true")
    return changes


def changed(change: Callable[[Config], None]) -> Config:
    config = settings(CASES["32"], mix="gradmix")
    config.epochs = 10**6
    change(config)
    return config


def images_of(case: Case) -> ImageSet:
    return make_images(case, 4 * case.batch[device_here().type])


def timed(step: Callable[[], None]) -> float:
    """Seconds of two steps, a whole turn of ``attribution_every=2``."""
    clock = time.process_time if device_here().type == "cpu" else time.perf_counter
    wait(device_here())
    start = clock()
    step()
    step()
    wait(device_here())
    return clock() - start


def stepper(config: Config, images: ImageSet) -> Callable[[], None]:
    module, loader, optimizer, autocast = manual(config, images)
    iterator = iter(loader)

    def step() -> None:
        batch = next(iterator)
        with autocast():
            loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
