"""What a training step costs on a CPU beside other programs: how torch's threads wait for each other matters.

    python benchmarks/busy.py              # about two minutes
    python benchmarks/busy.py --save       # also writes results/busy-cpu.json

A forward and backward pass of the demo's network and of the study's, alone and beside one busy process per CPU, by
turns: with GNU OpenMP's own waiting, with ours (``gradmix.eval.commands.waiting``), and with one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CASES = {"8 pixels, width 32, 256 views": (8, 32, 256), "32 pixels, width 16, 64 views": (32, 16, 64)}
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help="measure one case in this process and print milliseconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(passes(*CASES[options.one])))
        return
    import torch
    from machine import hardware, save

    from gradmix.eval.commands.waiting import SPINS

    ways = {"its own waiting": {}, "ours": {"GOMP_SPINCOUNT": SPINS}, "one thread": {"OMP_NUM_THREADS": "1"}}
    result: dict = {"hardware": hardware(torch.device("cpu")), "ms": {}}
    for case in CASES:
        for busy in (0, os.cpu_count() or 1):
            milliseconds: dict[str, list[float]] = {way: [] for way in ways}
            neighbours = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
            try:
                for _ in range(options.repeats):
                    for way, settings in ways.items():
                        milliseconds[way] += one(case, settings)
            finally:
                for neighbour in neighbours:
                    neighbour.kill()
            medians = {way: round(statistics.median(values), 1) for way, values in milliseconds.items()}
            place = f"{case}, {'alone' if not busy else f'beside {busy} busy processes'}"
            result["ms"][place] = medians
            print(f"{place}: {medians}, {medians['its own waiting'] / medians['ours']:.2f} x", flush=True)
    if options.save:
        save("busy-cpu", result)


def one(case: str, settings: dict[str, str]) -> list[float]:
    """Milliseconds of each pass, in a process of its own: OpenMP reads its settings once."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    command = [sys.executable, __file__, "--one", case]
    return json.loads(subprocess.run(command, env=clean | settings, check=True, capture_output=True).stdout)


def passes(size: int, width: int, views: int) -> list[float]:
    """At least 5, for at most some seconds."""
    import torch

    from gradmix.ssl.networks.backbones import ResNet

    network, images = ResNet("resnet18", width=width, stem="small").train(), torch.zeros(views, 3, size, size)
    network(images).sum().backward()  # warms caches up
    taken, begin = [], time.perf_counter()
    while len(taken) < 5 or (len(taken) < 30 and time.perf_counter() - begin < 3):
        start = time.perf_counter()
        network(images).sum().backward()
        taken.append(1000 * (time.perf_counter() - start))
    return taken


if __name__ == "__main__":
    main()
