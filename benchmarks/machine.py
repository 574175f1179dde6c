"""What the benchmarks share: which machine this is, waiting for it, and where results go."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware(device: torch.device, *packages: str) -> dict:
    """Device, cores, threads, load before, and the versions of Python, torch and ``packages``; flat."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # of the minute before: above 0.5, the machine was not ours alone
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", *packages, "gradmix")},
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(steps: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, by name and repeat: one after the other, so that what else runs meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            wait(device)
            start = time.perf_counter()
            step()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def plot(path: Path, lines: dict[str, dict[float, float]], x: str, y: str, log: bool = False) -> None:
    """A picture of lines, each from x to y; ``x`` and ``y`` are the axes' names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for label, points in lines.items():
        axes.plot(sorted(points), [points[place] for place in sorted(points)], "o-", label=label)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def save(name: str, result: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to benchmarks/results/{path.name}")
