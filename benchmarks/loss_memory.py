"""Memory of the contrastive loss against the batch: similarities of all anchors at once, and in blocks of them.

    python benchmarks/loss_memory.py            # --save writes results/loss_memory-DEVICE.json and .png
    python benchmarks/loss_memory.py --supcon   # only: how long NT-Xent takes through SupCon, on one thread

One process per figure: NT-Xent of the clean views, its gradient for the attribution, the mixed term, and the backward
pass, on projections of 128 dimensions. Memory beyond what the projections themselves take.
"""

import argparse
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import RESULTS, device_here, hardware, plot, save, wait

from gradmix.ssl import losses

ROWS = [512, 1024, 2048, 4096, 8192, 16384]  # two views: half as many images


def measure(rows: int, blocks: bool) -> None:
    """Prints the MiB and seconds of one step of the loss."""
    device = device_here()
    if not blocks:
        losses.BLOCK = rows
    z, p = (F.normalize(torch.randn(rows, 128, device=device), dim=1).requires_grad_() for _ in range(2))
    before = memory(device)
    start = time.perf_counter()
    ntxent = losses.NTXentLoss(0.1)
    loss = ntxent(z)
    torch.autograd.grad(loss, z, retain_graph=True)
    (loss + ntxent(z, p, torch.rand(rows, device=device))).backward()
    wait(device)
    print((memory(device) - before) / 2**20, time.perf_counter() - start)


def through_supcon() -> None:
    """NT-Xent by itself, and as SupCon with each image as its own class: best times, in turns."""
    torch.set_num_threads(1)
    device = device_here()
    ntxent, supcon = losses.NTXentLoss(0.1), losses.SupConLoss(0.1)
    for images in (256, 512, 2048):
        labels = torch.arange(images, device=device).repeat(2)
        z, p = (F.normalize(torch.randn(2 * images, 128, device=device), dim=1).requires_grad_() for _ in range(2))
        for name, mixed in {"clean": (), "mixed": (p, torch.rand(2 * images, device=device))}.items():
            ways = {"itself": partial(ntxent, z, *mixed), "supcon": partial(supcon, z, labels, *mixed)}
            best = dict.fromkeys(ways, float("inf"))
            for _ in range(10 if images < 2048 else 3):
                for way, loss in ways.items():
                    start = time.perf_counter()
                    loss().backward()
                    wait(device)
                    best[way] = min(best[way], time.perf_counter() - start)
            milliseconds = "  ".join(f"{way} {1e3 * value:.1f} ms" for way, value in best.items())
            print(f"{images} images, {name}: {milliseconds}  ratio {best['supcon'] / best['itself']:.2f}", flush=True)


def memory(device: torch.device) -> int:
    """Peak so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # not ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--supcon", action="store_true")
    parser.add_argument("--measure", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0], bool(options.measure[1]))
    if options.supcon:
        return through_supcon()
    found = []
    print(f"{'views':>8}{'at once, MiB':>16}{'s':>8}{'in blocks, MiB':>18}{'s':>8}")
    for rows in ROWS:
        row = {"rows": rows}
        for blocks, way in ((0, "at once"), (1, "in blocks")):
            command = [sys.executable, __file__, "--measure", str(rows), str(blocks)]
            mebibytes, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            row[way] = {"MiB": round(float(mebibytes), 1), "seconds": round(float(seconds), 3)}
        found.append(row)
        once, in_blocks = row["at once"], row["in blocks"]
        print(
            f"{rows:>8}{once['MiB']:>16.0f}{once['seconds']:>8.2f}{in_blocks['MiB']:>18.0f}{in_blocks['seconds']:>8.2f}",
            flush=True,
        )
    if options.save:
        save(f"loss_memory-{device_here().type}", {"hardware": hardware(device_here()), "found": found})
        mebibytes = {way: {row["rows"]: row[way]["MiB"] for row in found} for way in ("at once", "in blocks")}
        plot(RESULTS / f"loss_memory-{device_here().type}.png", mebibytes, "views in the batch", "MiB", log=True)


if __name__ == "__main__":
    main()
