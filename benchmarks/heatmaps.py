"""Do patch features say where in an image the unknown is? A bank of training patches, tried on pasted rectangles.

    python benchmarks/heatmaps.py RUN [RUN ...]     # prints; --save writes results/heatmaps.json

RUN: folders of runs of ResNets, such as `gradmix-pretrain method=sphor run_dir=runs/digits` leaves.

PatchCore's construction (arXiv 2106.08265): the outputs of stages 2 and 3, averaged over 3 x 3, brought to one grid and
put together; a bank of training patches, chosen by greedy k-centre; an image's map is each patch's distance to the
nearest in the bank, enlarged and smoothed.

Where the truth is: into a known test image goes a rectangle, a quarter to a half of the side, at a random place, with
the middle of an image of an unknown class. The map should be high in there. Beside it:

- ``known``: the rectangle is of another known test image. What is found there is the seam, or the wrong place.
- ``random``: the same network, untrained. ``pixels``: patches of the image itself, three cells of the grid wide.
- ``less the usual``: every place's mean over training images outside the bank removed, and their deviation made 1, as
  patches at an image's edge are far from all others.
- ``centre``: a map that does not look, highest in the middle.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from machine import hardware, save
from scipy.stats import rankdata
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from gradmix.attribution import record
from gradmix.ssl.data.images import ImageSet, normalize
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.networks.backbones import build_encoder, load_backbone
from gradmix.ssl.runs.folder import read_config

STAGES = ["layer2", "layer3"]
POOL = 20_000  # training patches to choose from
BATCH = 250  # images
KINDS = ("unknown", "known")  # whose the rectangle is
LESS = " less the usual"
Patches = Callable[[Tensor], Tensor]  # uint8 images [N, 3, S, S] to [N, C, G, G]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rectangles", type=int, default=600)
    parser.add_argument("--bank", type=int, default=2000, help=f"patches chosen of {POOL}")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
    for run in options.runs:
        result[run.name] = of_run(run, options.rectangles, options.bank)
        show(run.name, result[run.name])
    if options.save:
        save("heatmaps", {"runs": result, "hardware": hardware(torch.device("cpu"), "faiss-cpu")})


def of_run(run: Path, count: int, bank: int) -> dict:
    config = read_config(run)
    data = load_data(config.data, config.seed)
    train, test = whole(data.train), whole(data.test)
    known, unknown = test[data.test.labels >= 0], test[data.test.labels < 0]
    hosts, pasted, inside = rectangles(known, {"unknown": unknown, "known": known}, count)
    encoder = load_backbone(run).encoder
    grid = of_network(encoder)(train[:1]).shape[-1]
    kinds: dict[str, Patches] = {
        "network": of_network(encoder),
        "random": of_network(untrained(encoder, train)),
        "pixels": lambda images: of_pixels(images, grid),
    }
    maps: dict[str, dict[str, Tensor]] = {}
    for name, patches in kinds.items():
        maps[name], maps[name + LESS] = of_patches(patches, train, pasted, bank)
    maps["centre"] = dict.fromkeys(KINDS, centre(train.shape[-1]).expand(count, -1, -1))
    of = {name: {kind: measure(of_kind[kind], inside) for kind in KINDS} for name, of_kind in maps.items()}
    return {
        "train": len(train),
        "images": len(hosts.unique()),
        "rectangles": count,
        "share of the image": inside.float().mean().item(),
        "maps": {name: {kind: summary(of_kind[kind], hosts) for kind in KINDS} for name, of_kind in of.items()},
        "differences in AUROC": {
            f"{one} over {other}": mean_error(of[one]["unknown"]["auroc"] - of[other]["unknown"]["auroc"], hosts)
            for end in ("", LESS)
            for one, other in [("network" + end, control) for control in ("random" + end, "pixels" + end, "centre")]
        }
        | {
            f"network{end}, unknown over known": mean_error(
                of["network" + end]["unknown"]["auroc"] - of["network" + end]["known"]["auroc"], hosts
            )
            for end in ("", LESS)
        },
    }


def whole(images: ImageSet) -> Tensor:
    """``[N, 3, S, S]`` uint8."""
    return torch.stack([images.image(i) for i in range(len(images))])


def rectangles(known: Tensor, sources: dict[str, Tensor], count: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Hosts ``[count]``, images ``[count, 3, S, S]`` by whose rectangle they got, and masks ``[count, S, S]``.

    Both kinds of images have the same hosts and rectangles.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        """``low`` to ``high``, both included."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    side = known.shape[-1]
    hosts = torch.cat([torch.randperm(len(known), generator=generator) for _ in range(-(-count // len(known)))])[:count]
    pasted = {kind: known[hosts].clone() for kind in sources}
    inside = torch.zeros(count, side, side, dtype=torch.bool)
    for i, host in enumerate(hosts.tolist()):
        height, width = draw(side // 4, side // 2), draw(side // 4, side // 2)
        top, left = draw(0, side - height), draw(0, side - width)
        inside[i, top : top + height, left : left + width] = True
        y, x = (side - height) // 2, (side - width) // 2
        for kind, source in sources.items():
            other = draw(0, len(source) - 1)
            if kind == "known" and other == host:
                other = (other + 1) % len(source)
            part = source[other, :, y : y + height, x : x + width]
            pasted[kind][i, :, top : top + height, left : left + width] = part
    return hosts, pasted, inside


def of_network(encoder: nn.Module) -> Patches:
    @torch.inference_mode()
    def patches(images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        with record(encoder, STAGES, seen):
            encoder(normalize(images, encoder.constants))
        seen = [F.avg_pool2d(stage, 3, 1, 1, count_include_pad=False) for stage in seen]
        size = seen[0].shape[2:]
        return torch.cat([F.interpolate(stage, size, mode="bilinear") for stage in seen], dim=1)

    return patches


def untrained(encoder: nn.Module, train: Tensor) -> nn.Module:
    """The same architecture with random weights; its BatchNorm knows the training images."""
    torch.manual_seed(0)
    fresh = build_encoder(encoder.description, train.shape[-1])
    for module in fresh.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches
    with torch.no_grad():
        for batch in train.split(BATCH):
            fresh.train()(normalize(batch, fresh.constants))
    return fresh.eval()


def of_pixels(images: Tensor, grid: int) -> Tensor:
    """What lies in three by three cells, two by two values a cell."""
    images = F.interpolate(images.float() / 255, size=(2 * grid, 2 * grid), mode="area")
    around = F.pad(images, (2, 2, 2, 2), mode="replicate")
    return F.unfold(around, kernel_size=6, stride=2).unflatten(2, (grid, grid))


def of_patches(
    patches: Patches, train: Tensor, pasted: dict[str, Tensor], size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Heat maps ``[N, S, S]`` of each kind of images: as they are, and less the usual map; ``size``: of the bank."""
    aside = torch.arange(len(train)) % 10 == 0  # training images that are not in the bank, for the usual map
    pool = np.concatenate([rows(patches(batch)) for batch in train[~aside].split(BATCH)])
    pool = pool[np.sort(np.random.default_rng(0).permutation(len(pool))[:POOL])]
    bank = pool if size >= len(pool) else pool[k_centre(pool, size)]

    def heats(images: Tensor) -> Tensor:
        return torch.cat([heat(patches(batch), bank, train.shape[-1]) for batch in images.split(BATCH)])

    maps = {kind: heats(images) for kind, images in pasted.items()}
    usual = heats(train[aside])
    return maps, {kind: (of_kind - usual.mean(0)) / usual.std(0) for kind, of_kind in maps.items()}


def rows(maps: Tensor) -> np.ndarray:
    """``[N, C, G, G]`` to ``[N * G * G, C]``."""
    return np.ascontiguousarray(maps.permute(0, 2, 3, 1).flatten(0, 2).numpy())


def k_centre(points: np.ndarray, count: int) -> np.ndarray:
    """Numbers of ``count`` rows ``[N, C]``: the first, then always the one that is furthest from all taken so far."""
    squares = np.einsum("nc,nc->n", points, points)
    taken = [0]
    nearest = np.full(len(points), np.inf, np.float32)
    while len(taken) < count:
        last = taken[-1]
        np.minimum(nearest, squares - 2 * (points @ points[last]) + squares[last], out=nearest)
        nearest[last] = -np.inf
        taken.append(int(nearest.argmax()))
    return np.array(taken)


def heat(maps: Tensor, bank: np.ndarray, side: int) -> Tensor:
    """Distances of patches ``[N, C, G, G]`` to the nearest of the bank, as pictures ``[N, S, S]``."""
    squared, _ = faiss.knn(rows(maps), bank, 1)
    distance = torch.from_numpy(squared).clamp(min=0).sqrt().view(len(maps), 1, *maps.shape[2:])
    large = F.interpolate(distance, (side, side), mode="bilinear")
    sigma = 4 / 224 * side  # PatchCore's, at its image size
    return gaussian_blur(large, 2 * round(2 * sigma) + 1, sigma)[:, 0]


def centre(side: int) -> Tensor:
    from_middle = (torch.arange(side) - (side - 1) / 2) ** 2
    return -(from_middle[:, None] + from_middle).float()


def measure(maps: Tensor, inside: Tensor) -> dict[str, np.ndarray]:
    """Per image: AUROC of the pixels, those inside as positive; whether the map's maximum lies inside."""
    scores, positive = maps.flatten(1).numpy(), inside.flatten(1).numpy()
    ranks = rankdata(scores, axis=1)
    n = positive.sum(1)
    area = ((ranks * positive).sum(1) - n * (n + 1) / 2) / (n * (positive.shape[1] - n))
    hit = np.take_along_axis(positive, scores.argmax(1)[:, None], axis=1)[:, 0]
    return {"auroc": area, "hit": hit.astype(float)}


def summary(measured: dict[str, np.ndarray], hosts: Tensor) -> dict:
    return {
        "median auroc": float(np.median(measured["auroc"])),
        "auroc": mean_error(measured["auroc"], hosts),
        "maximum inside": mean_error(measured["hit"], hosts),
    }


def mean_error(values: np.ndarray, hosts: Tensor) -> list[float]:
    """Mean and its standard error; rectangles in the same image count as one."""
    numbers = hosts.numpy()
    of_host = np.bincount(numbers, values)[np.unique(numbers)] / np.bincount(numbers)[np.unique(numbers)]
    return [float(of_host.mean()), float(of_host.std(ddof=1) / len(of_host) ** 0.5)]


def show(name: str, result: dict) -> None:
    print(
        f"\n{name}: {result['train']} training images, {result['rectangles']} rectangles in {result['images']} images,"
    )
    print(f"a rectangle is {result['share of the image']:.3f} of its image\n")
    print(f"{'map':24}{'rectangle':>10}{'median AUROC':>14}{'mean AUROC':>18}{'maximum inside':>18}")
    for patches, of_kind in result["maps"].items():
        for kind, row in of_kind.items():
            means = "".join("{:>9.3f} +- {:.3f}".format(*row[key]) for key in ("auroc", "maximum inside"))
            print(f"{patches:24}{kind:>10}{row['median auroc']:>14.3f} {means}")
    print()
    for pair, (difference, error) in result["differences in AUROC"].items():
        print(f"{pair}: {difference:+.3f} +- {error:.3f}", flush=True)


if __name__ == "__main__":
    main()
