"""A look inside: where attribution points, what mixing hides, what the features are, and whose mistakes differ.

    python benchmarks/inside.py --tiny tiny-imagenet-200 --archive cifar10-jpeg.tar.xz --backbones FOLDER --runs FOLDER

Writes results/inside.json and docs/study-inside.png. One thread, some minutes. ``--tiny``: TinyImageNet with the
training images of split 0 and val/; a small network is trained on it (inside_training.py), or found in ``--work``.
``--backbones``: weights of the study's runs, ``<arm>_<split>.safetensors``. ``--runs``: the study's finished runs,
``<arm>_<split>/metrics.json``, for their feature quality.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from inside_training import KEEP_EPOCHS, SIZE, at_border, config_of, from_centre, masks, peaks, prepare
from machine import hardware, save
from study import ARMS, SETTING, subset
from theirs import against_theirs
from torch import Tensor, nn

from gradmix.attribution import default_layers, layercam, record, still
from gradmix.boxes import boxes_inside
from gradmix.eval.classifiers.knn import KNNClassifier
from gradmix.eval.detectors import DeepKNN
from gradmix.eval.features.extraction import Model, extract
from gradmix.eval.metrics import auroc
from gradmix.eval.quality import class_spread, effective_rank
from gradmix.gradmix import GradMix
from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import AugmentConfig
from gradmix.ssl.data.images import ImageSet, denormalize, normalize
from gradmix.ssl.data.open_set import OpenSetData, load_data
from gradmix.ssl.losses import NTXentLoss
from gradmix.ssl.networks.backbones import load_backbone
from gradmix.ssl.runs.files import write_json

PICTURE = Path(__file__).parent.parent / "docs" / "study-inside.png"
BATCH = 125  # images; two views each
MAPS = ("loss", "agreement", "activation")  # the last: no gradient, what the network responds to
TEMPERATURE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", type=Path, required=True, help="folder tiny-imagenet-200")
    parser.add_argument("--archive", type=Path, required=True, help="CIFAR-10 as study.py takes it")
    parser.add_argument("--backbones", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="the study's runs of one stage")
    parser.add_argument("--work", type=Path, default=Path("runs/inside"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, run = prepare(options.tiny, options.work)
    networks = {f"epoch {e}": network(run / f"epoch-{e}") for e in (0, *KEEP_EPOCHS)}
    last = f"epoch {KEEP_EPOCHS[-1]}"
    study = {path.stem: network(path) for path in sorted(options.backbones.glob("*_0.safetensors"))}
    both = networks | study
    images, boxes = with_boxes(data.test, options.tiny)
    seen = options.work / "seen"
    classes, mistakes, places = once(seen / "cifar10", of_cifar10, options)
    result = {
        "objects": {name: once(seen / f"objects, {name}", of_objects, *both[name], images, boxes) for name in both},
        "objects by stage, last epoch": once(seen / "stages", by_stage, *networks[last], images, boxes),
        "training": json.loads((run / "watched.json").read_text()),
        "places on CIFAR-10's training images": places,
        "features": {name: once(seen / f"features, {name}", of_features, networks[name][0], data) for name in networks},
        "features of the study's runs": of_runs(options.runs),
        "unknown classes": classes,
        "mistakes": mistakes,
        "theirs": {
            name: once(seen / f"theirs, {name}", against_theirs, *both[name], views_of(images[: 2 * BATCH]))
            for name in ("epoch 1", "epoch 8", last, *study)
        },
        "hardware": hardware(torch.device("cpu")),
    }
    save("inside", result)
    maps = maps_of(*networks[last], images[:BATCH])
    picture(result, images[:BATCH], boxes[:BATCH], maps)


def once(path: Path, function: Callable, *arguments: Any) -> Any:
    """What the function gives, from ``path`` if it was computed before: a look that was stopped goes on."""
    path = path.with_suffix(".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, function(*arguments))
        print(path.stem, "done", flush=True)
    return json.loads(path.read_text())


def of_objects(backbone: nn.Module, head: nn.Module, images: Tensor, boxes: Tensor) -> dict:
    return pointing(maps_of(backbone, head, images), normalize(images), boxes)


def network(path: Path) -> tuple[nn.Module, nn.Module]:
    """Backbone and head of a folder, or a backbone alone from a file: its features are then compared as they are."""
    if path.is_dir():
        model = Model(path)
        return model.backbone.encoder, model.head
    return load_backbone(path).encoder, nn.Identity()


def pixels(images: ImageSet, indices: Iterable[int]) -> Tensor:
    """``[N, 3, S, S]`` uint8, from memory or from the files."""
    return torch.stack([images.image(index) for index in indices])


def with_boxes(test: ImageSet, tiny: Path) -> tuple[Tensor, Tensor]:
    """The validation images of known classes, ``[N, 3, S, S]`` uint8, and their objects ``[N, 4]``: (top, left,
    bottom, right) in sides of the image, ends exclusive."""
    rows = [line.split("\t") for line in (tiny / "val/val_annotations.txt").read_text().splitlines()]
    corners = {name: [int(c) for c in where] for name, _, *where in rows}  # first and last pixel of 64
    known = (test.labels >= 0).nonzero()[:, 0]
    boxes = []
    for index in known.tolist():
        left, top, right, bottom = corners[Path(test.files[index]).name]
        boxes.append([top / 64, left / 64, (bottom + 1) / 64, (right + 1) / 64])
    return pixels(test, known.tolist()), torch.tensor(boxes)


def views_of(images: Tensor, seed: int = 0) -> Tensor:
    """View-major: the whole image, whose object we know, and one random view, as in training."""
    return torch.cat([normalize(images), TwoViews(AugmentConfig(), images.shape[-1], views=1)(images, seed)])


def looked_at(backbone: nn.Module, head: nn.Module, views: Tensor) -> tuple[Tensor, list[Tensor]]:
    """NT-Xent of the views and the activations of the last three stages, in training mode, as GradMix sees them."""
    seen: list[Tensor] = []
    backbone.train().requires_grad_(True)
    with still(backbone), record(backbone, default_layers(backbone, 3), seen):
        z = F.normalize(head(backbone(views)), dim=1)
    return NTXentLoss(TEMPERATURE)(z), seen


def maps_of(backbone: nn.Module, head: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Per kind of map ``[N, S, S]`` of the whole images."""
    maps: dict[str, list[Tensor]] = {kind: [] for kind in MAPS}
    for part in images.split(BATCH):
        loss, seen = looked_at(backbone, head, views_of(part))
        size = tuple(part.shape[2:])
        for kind in ("loss", "agreement"):
            maps[kind].append(layercam(loss, seen, size, kind)[: len(part)])
        maps["activation"].append(activation_map(seen, size)[: len(part)])
    return {kind: torch.cat(parts) for kind, parts in maps.items()}


@torch.no_grad()
def activation_map(seen: list[Tensor], size: tuple[int, int]) -> Tensor:
    """As LayerCAM, but with every gradient 1: the sum over channels."""
    maps = []
    for activation in seen:
        cam = activation.sum(1, keepdim=True)
        low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
        maps.append(F.interpolate((cam - low) / (high - low).clamp(min=1e-12), size, mode="bilinear")[:, 0])
    return torch.stack(maps).mean(0)


def contains(boxes: Tensor, points: Tensor) -> Tensor:
    """Whether points ``[..., 2]`` (row, column; in sides of the image) lie in boxes ``[..., 4]``."""
    return ((points >= boxes[..., :2]) & (points < boxes[..., 2:])).all(-1)


def pointing(maps: dict[str, Tensor], views: Tensor, boxes: Tensor) -> dict:
    """The pointing game and what the mixing boxes hit, for all images and for those whose object is small."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    everyone = {"all": torch.ones(len(boxes), dtype=torch.bool), "object under half of the image": area < 0.5}
    result = {}
    for group, chosen in everyone.items():
        of_group, among = boxes[chosen], {kind: m[chosen] for kind, m in maps.items()}
        points = {kind: (peaks(m) + 0.5) / SIZE for kind, m in among.items()}
        hits = {kind: contains(of_group, p).double() for kind, p in points.items()}
        chance = {"any pixel (the object's area)": area[chosen].double()}
        chance["the image's centre"] = contains(of_group, torch.tensor([0.5, 0.5])).double()
        chance |= {  # the same peaks, dealt to other images: what a taste for certain places gives by itself
            f"another image's peak, {kind}": contains(of_group[:, None], p[None]).double().mean(1)
            for kind, p in points.items()
        }
        result[group] = {
            "images": int(chosen.sum()),
            "peak in the object": {name: mean_error(v) for name, v in (hits | chance).items()},
            "over another image's peak": {
                kind: mean_error(hits[kind] - chance[f"another image's peak, {kind}"]) for kind in hits
            },
            **boxed(among, views[chosen], of_group),
        }
    return result


def boxed(maps: dict[str, Tensor], views: Tensor, objects: Tensor) -> dict:
    """Mixing boxes of the same sizes at the peak, at random, in the middle: what of the object they hide."""
    whole = (objects * SIZE).round().long()
    area = masks(whole, (SIZE, SIZE)).sum((1, 2)).clamp(min=1)
    views, doubled = views.repeat(2, 1, 1, 1), {kind: m.repeat(2, 1, 1) for kind, m in maps.items()}
    places = {kind: m for kind, m in doubled.items() if kind != "activation"} | {"random": None}
    found = {}
    for name, of_place in places.items():
        mixer = GradMix(layers=3, centre="random" if of_place is None else "peak")
        mixed = mixer(views, generator=torch.Generator().manual_seed(0), attribution=of_place)
        found[name] = mixed.boxes[: len(objects)]
    share = (found["random"][:, 2] - found["random"][:, 0]) / SIZE
    found["centre"] = boxes_inside(torch.full((len(objects), 2), SIZE // 2), share, (SIZE, SIZE))
    hidden, middle = {}, {}
    for name, boxes in found.items():
        hidden[name] = ((masks(boxes, (SIZE, SIZE)) & masks(whole, (SIZE, SIZE))).sum((1, 2)) / area).double()
        middle[name] = contains(objects, (boxes[:, :2] + boxes[:, 2:]) / 2 / SIZE).double()
    return {
        "share of the object hidden": {name: mean_error(v) for name, v in hidden.items()},
        "share of the image hidden": mean_error((share**2).double()),
        "middle of the box in the object": {name: mean_error(v) for name, v in middle.items()},
        "share of the object hidden, over random": {
            name: mean_error(hidden[name] - hidden["random"]) for name in hidden if name != "random"
        },
    }


def by_stage(backbone: nn.Module, head: nn.Module, images: Tensor, boxes: Tensor) -> dict:
    """The pointing game with the map of one stage alone, on half of the images."""
    images, boxes = images[:500], boxes[:500]
    hits: dict[str, list[Tensor]] = {}
    for part, objects in zip(images.split(BATCH), boxes.split(BATCH), strict=True):
        loss, seen = looked_at(backbone, head, views_of(part))
        for stage, activation in zip((2, 3, 4), seen, strict=True):
            for kind in ("loss", "agreement"):
                maps = layercam(loss, [activation], (SIZE, SIZE), kind)[: len(part)]
                hits.setdefault(f"stage {stage}, {kind}", []).append(contains(objects, (peaks(maps) + 0.5) / SIZE))
    return {name: mean_error(torch.cat(parts).double()) for name, parts in hits.items()}


def mean_error(values: Tensor) -> list[float]:
    """Mean and its standard error over images."""
    return [round(values.mean().item(), 4), round((values.std() / len(values) ** 0.5).item(), 4)]


def of_features(backbone: nn.Module, data: OpenSetData) -> dict:
    """Rank, spread, kNN and AUROC; of the unknown images every ninth."""
    known, unknown = (data.test.labels >= 0).nonzero()[:, 0], (data.test.labels < 0).nonzero()[::9, 0]
    train, test, far = (
        features_of(backbone, s) for s in (data.train, data.test.select(known), data.test.select(unknown))
    )
    labels = data.train.labels
    right = (KNNClassifier(20).fit(train, labels).predict(test) == data.test.labels[known]).double()
    detector = DeepKNN(k=5).fit(train, labels)
    return {
        "effective rank": effective_rank(test),
        "effective rank, training images": effective_rank(train),
        "class spread": class_spread(test, data.test.labels[known]),
        "class spread, training images": class_spread(train, labels),
        "knn": mean_error(right),
        "auroc": auroc(detector.score(test), detector.score(far)),
    }


def features_of(backbone: nn.Module, images: ImageSet) -> Tensor:
    backbone.eval()
    return extract(lambda x: backbone(normalize(x)), images, torch.device("cpu"))


def of_runs(folder: Path) -> dict:
    """Feature quality of the study's finished runs, mean and standard error over splits."""
    result = {}
    for arm in ARMS:
        paths = folder.glob(f"{arm.replace(' ', '_')}_[0-9]/metrics.json")
        rows = [json.loads(path.read_text()) for path in sorted(paths)]
        if rows:
            result[arm] = {"runs": len(rows)}
            for name in ("effective_rank", "class_spread", "alignment", "uniformity"):
                values = [row[f"quality/{name}"] for row in rows]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
                result[arm][name] = [round(statistics.mean(values), 3), None if error is None else round(error, 3)]
    return result


def of_cifar10(options: argparse.Namespace) -> tuple[dict, dict, dict]:
    """AUROC of each unknown class; known images that only one of two networks gets wrong; where maps peak.

    Splits 0 and 1 have the same classes in another order, so that two seeds of one arm are there to compare with.
    """
    unknown_classes: dict[str, dict] = {}
    answers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    places: dict[str, dict] = {}
    for path in sorted(options.backbones.glob("*.safetensors")):
        split = int(path.stem.rpartition("_")[2])
        root = subset(options.archive, options.work / "cifar", split)
        config = config_of(*SETTING, "method=joint", f"data.root={root}", f"data.split={split}", "run_dir=unused")
        data = load_data(config.data, split)
        backbone, head = network(path)
        train, test = features_of(backbone, data.train).numpy(), features_of(backbone, data.test).numpy()
        labels, known = data.train.labels.numpy(), data.test.labels.numpy() >= 0
        detector = DeepKNN(k=5).fit(train, labels)
        scores, nearest = detector.score(test), detector.classify(test)
        of_file = np.array([Path(file).parent.name for file in data.test.files])
        unknown_classes[path.stem] = {}
        for name in data.unknown:
            here = of_file == name
            counts = np.bincount(nearest[here], minlength=len(data.classes)) / here.sum()
            unknown_classes[path.stem][name] = {
                "auroc": round(auroc(scores[known], scores[here]), 4),
                "error": round(auroc_error(scores[known], scores[here]), 4),
                "looks like": {data.classes[i]: round(float(counts[i]), 3) for i in counts.argsort()[::-1][:2]},
            }
        shares = KNNClassifier(20).fit(train, labels).predict_proba(test[known])
        margin = np.diff(np.sort(shares, 1)[:, -2:], axis=1)[:, 0]
        answers[path.stem] = np.array(data.classes)[shares.argmax(1)], margin
        truth = of_file[known]
        maps = maps_of(backbone, head, pixels(data.train, range(4 * BATCH)))
        places[path.stem] = {kind: place(peaks(m)) for kind, m in maps.items()}
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    places["any pixel"] = {name: value[0] for name, value in place(torch.stack([y, x], 2).flatten(0, 1)).items()}
    arms = sorted(answers, key=lambda name: (not name.startswith("none"), name))
    pairs = [(a, b) for i, a in enumerate(arms) for b in arms[i + 1 :]]
    return unknown_classes, {f"{a} and {b}": only_one(answers[a], answers[b], truth) for a, b in pairs}, places


def place(pixels: Tensor) -> dict[str, list[float]]:
    size = (SIZE, SIZE)
    return {
        "at the border": mean_error(at_border(pixels, size).double()),
        "from the centre": mean_error(from_centre(pixels, size).double()),
    }


def auroc_error(known: np.ndarray, unknown: np.ndarray) -> float:
    """Standard error over images, after DeLong."""
    both = np.sort(known), np.sort(unknown)
    of_unknown = np.searchsorted(both[0], unknown, "left") / len(known)
    of_known = np.searchsorted(both[1], known, "left") / len(unknown)
    return float(np.sqrt(of_unknown.var(ddof=1) / len(unknown) + of_known.var(ddof=1) / len(known)))


def only_one(first: tuple, second: tuple, truth: np.ndarray) -> dict:
    """How often the first, the second, or both are wrong; and how sure the one that is right was (margin of votes)."""
    a, b = first[0] == truth, second[0] == truth
    return {
        "images": len(truth),
        "both right": int((a & b).sum()),
        "both wrong": int((~a & ~b).sum()),
        "only the first wrong": int((~a & b).sum()),
        "only the second wrong": int((a & ~b).sum()),
        "difference over its error": round(float(((~a & b).sum() - (a & ~b).sum()) / np.sqrt((a != b).sum())), 2),
        "margin where both are right": round(float(first[1][a & b].mean()), 3),
        "margin of the one that is right": round(float(np.r_[first[1][a & ~b], second[1][~a & b]].mean()), 3),
        "by class, only the first and only the second wrong": {
            name: [int((~a & b & (truth == name)).sum()), int((a & ~b & (truth == name)).sum())]
            for name in sorted(set(truth.tolist()))
        },
    }


def picture(result: dict, images: Tensor, boxes: Tensor, maps: dict[str, Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    figure = pyplot.figure(figsize=(14, 8.6))
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    shown = (area < 0.5).nonzero()[:, 0]
    shown = shown[:10]  # the first, not picked
    grid = above.subplots(3, len(shown))
    for column, index in enumerate(shown.tolist()):
        top, left, bottom, right = (boxes[index] * SIZE).tolist()
        image = denormalize(normalize(images[index : index + 1]))[0].permute(1, 2, 0)
        for row, kind in enumerate((None, "loss", "agreement")):
            axes = grid[row][column]
            axes.imshow(image, extent=(0, SIZE, SIZE, 0))
            if kind:
                axes.imshow(maps[kind][index], cmap="inferno", alpha=0.65, extent=(0, SIZE, SIZE, 0))
                y, x = peaks(maps[kind][index : index + 1])[0].tolist()
                axes.plot(x + 0.5, y + 0.5, "x", color="cyan", markersize=8, markeredgewidth=2)
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="lime"))
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(kind or "object")
    above.suptitle(
        "The first validation images with an object under half of the picture: its box (green), map, peak (x)",
        fontsize=10,
    )
    panels = below.subplots(1, 4)
    group = "object under half of the image"
    epochs = [0, *KEEP_EPOCHS]
    for kind, colour in (("loss", "C0"), ("agreement", "C1"), ("activation", "C2")):
        for name, style in ((kind, "o-"), (f"another image's peak, {kind}", ":")):
            values = [result["objects"][f"epoch {e}"][group]["peak in the object"][name] for e in epochs]
            errors = [100 * v[1] for v in values] if name == kind else None
            line = [100 * v[0] for v in values]
            panels[0].errorbar(
                range(len(epochs)), line, errors, fmt=style, color=colour, label=kind if name == kind else None
            )
    of_group = result["objects"]["epoch 0"][group]["peak in the object"]
    panels[0].axhline(100 * of_group["any pixel (the object's area)"][0], color="grey", label="any pixel")
    panels[0].axhline(100 * of_group["the image's centre"][0], color="grey", ls="--", label="image's centre")
    panels[0].set_xticks(range(len(epochs)), epochs)
    panels[0].set_title("Peak in the object, %, objects under\nhalf (dotted: another image's peak)", fontsize=9)
    watched = result["training"]
    for name in ("hidden share", "evidence hidden", "evidence hidden, random", "peaks at the border"):
        panels[1].plot([int(e) for e in watched], [100 * watched[e][name] for e in watched], label=name)
    panels[1].set_title("What mixing hides in training, %", fontsize=9)
    panels[2].plot(
        epochs, [result["features"][f"epoch {e}"]["effective rank"] for e in epochs], "o-", label="effective rank"
    )
    spread = [result["features"][f"epoch {e}"]["class spread"] for e in epochs]
    panels[2].plot(epochs, spread, "o-", label="class spread")
    panels[2].set_title("Features of validation images", fontsize=9)
    of_split = result["unknown classes"]
    classes = sorted(next(iter(of_split.values())))
    for shift, (name, values) in enumerate(of_split.items()):
        x = np.arange(len(classes)) + 0.2 * (shift - 1.5)
        heights, errors = ([100 * values[c][what] for c in classes] for what in ("auroc", "error"))
        panels[3].bar(x, heights, 0.19, yerr=errors, label=name)
    panels[3].set_xticks(range(len(classes)), classes)
    panels[3].set_ylim(40, 80)
    panels[3].set_title("CIFAR-10: AUROC of each unknown class, %", fontsize=9)
    for axes in panels:
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    for axes in panels[:3]:
        axes.set_xlabel("epochs")
    figure.savefig(PICTURE, dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    main()
