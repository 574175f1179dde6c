"""How much of a run's accuracy and of its detectors survives corrupted images: CIFAR-10-C, TinyImageNet-C, or
corruptions made here.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gradmix.eval.catalogue import FULL_SPECTRUM
from gradmix.eval.config import EvalConfig
from gradmix.eval.features.arrays import Array
from gradmix.eval.features.extraction import raw_pixels
from gradmix.eval.protocols.closed_set import KNN, KNNOnPixels, Linear
from gradmix.eval.protocols.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from gradmix.eval.protocols.measures import can_be_measured
from gradmix.eval.protocols.open_set import FINDING, Judged, OpenSet, open_set_numbers, together
from gradmix.eval.protocols.subject import Subject, subject_of
from gradmix.eval.runs.numbers import made_with
from gradmix.ssl.config import Config
from gradmix.ssl.data.images import ImageSet, from_array
from gradmix.ssl.data.listing import list_images
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.data.scan import Scan
from gradmix.ssl.runs.files import STRAY, write_json
from gradmix.ssl.runs.folder import provenance

CHUNK = 256  # images corrupted at once; the seed of made corruptions counts chunks, so it is part of the result
METHODS: dict[str, KNN | Linear] = {"knn": KNN(), "linear": Linear(), "knn_pixels": KNNOnPixels()}
LEARNED = ("knn", "linear")  # those that are compared with kNN on raw pixels
Read = Callable[[ImageSet], ImageSet]
Batches = Iterator[tuple[str, int, Tensor, Tensor]]  # kind, severity, images [n, 3, S, S] uint8, labels [n]


def evaluate_corruptions(
    run_dir: Path, config: Config, data: OpenSetData, where: str, device: str = "cpu", out: Path | None = None
) -> dict[str, Any]:
    """Corrupted test images of the known classes; writes ``metrics_corruptions.json`` and returns it.

    METHOD is knn, linear (both on the backbone's features) or knn_pixels (kNN on raw pixels):

    - ``corruptions/KIND/SEVERITY/METHOD``, ``corruptions/KIND/METHOD`` (mean over severities) and
      ``corruptions/clean/METHOD`` (the test set as it is): accuracies in [0, 1];
    - ``corruptions/mean_error/METHOD``: mean error over kinds and severities;
    - ``corruptions/KIND/ce/METHOD``: sum of the errors over severities, divided by that of a reference;
      ``corruptions/mce/METHOD``, the mean over kinds, is the mean corruption error of arXiv 1903.12261. The paper's
      reference is AlexNet; ours is kNN on the raw pixels of the same training images, which needs no learning and is
      the same for every run. Its errors count as one image at least, so that nothing is divided by zero. Below 1 is
      more robust than raw pixels;
    - ``osr/DETECTOR/full_spectrum/...``: the unknown test images against the known ones and all of their corrupted
      copies, each of which counts as one more known image: OpenOOD's full-spectrum detection (arXiv 2306.09301), with
      the sets and means that ``data.unknown_roots`` names. Where there are no unknown images, only what is of the known
      ones alone, and ``skipped`` says so.

    Features are read from ``features/`` where they are of the same weights and images; others are made for the time
    being, and nothing there is replaced.

    Args:
        where: a folder in CIFAR-10-C's or TinyImageNet-C's layout, or ``make``.
        out: folder to write to, ``run_dir`` unless given.

    Raises:
        ValueError: no corrupted images of known classes there, or no test images of known classes; a corrupted image
            that can't be read, unless ``data.on_bad_image`` is skip.
    """
    if not data.classes:
        raise ValueError("corruptions: the run's images have no classes, so there is no accuracy to measure")
    test = data.test.select((data.test.labels >= 0).nonzero()[:, 0])
    if not len(test):
        raise ValueError("corruptions: the run's test set has no images of known classes")
    scan = Scan()

    def read(images: ImageSet) -> ImageSet:
        images = scan.read(images, sys.maxsize)
        if config.data.on_bad_image == "error":
            scan.refuse_bad()
        return images

    batches = find_batches(where, data, test, read)  # bad input is said before anything is computed
    out = run_dir if out is None else out
    limit = int(config.data.memory_gib * 2**30)
    # The features that lie in ``out`` belong to its metrics.json, which may be of other unknown images.
    with TemporaryDirectory(dir=out, prefix=".", suffix=STRAY, ignore_cleanup_errors=True) as place:
        subject = subject_of(run_dir, Path(place), config, data, device, EvalConfig())
        subject.spaces["pixels"] = {
            name: raw_pixels(images, out / "features" / f"{name}_pixels.safetensors", limit)
            for name, images in data.sets().items()
        }
        result = on_corrupted(subject, batches, where)
    result |= {"corruptions/source": where, "data/bad_images": len(data.bad) + len(scan.bad)}
    result |= made_with(config) | provenance(torch.device(device))
    write_json(out / "metrics_corruptions.json", result)
    return result


def on_corrupted(subject: Subject, batches: Batches, where: str) -> dict[str, Any]:
    """The numbers of :func:`evaluate_corruptions`, and under ``skipped`` what can't be measured."""
    config, data = subject.config, subject.data
    classifiers = {measure: measure.fit(subject) for measure in METHODS.values()}
    asked = [measure for measure in OpenSet.asked_for(config, EvalConfig()) if isinstance(measure, OpenSet)]
    detectors, skipped = can_be_measured(asked, subject)
    if detectors and (why := subject.lacks("unknown images")):
        skipped[FINDING] = why
    tested = {detector: detector.judge_test(subject) for detector in detectors}
    corrupted: dict[OpenSet, list[Judged]] = {detector: [] for detector in detectors}

    def correct(seen: Mapping[str, Array], labels: Tensor) -> np.ndarray:
        """Numbers of right answers: in the order of METHODS, then the number of images."""
        answers = [classifier.predict(seen[measure.SPACE]) for measure, classifier in classifiers.items()]
        return np.array([*((answer == labels).sum().item() for answer in answers), len(labels)])

    none = np.zeros(len(METHODS) + 1, dtype=np.int64)
    plain = {space: subject.known_test(space)[0] for space in ("features", "pixels")}
    clean = correct(plain, subject.known_test("features")[1])
    counts: dict[tuple[str, int], np.ndarray] = defaultdict(none.copy)
    for kind, severity, images, labels in tqdm(batches, desc="corruptions", unit="batch", leave=False, disable=None):
        seen = subject.in_all_spaces(images)
        counts[kind, severity] += correct(seen, labels)
        for detector, parts in corrupted.items():
            parts.append(detector.judge(subject, seen[detector.space], labels))
    if not counts:
        raise ValueError(
            f"corruptions: {where} holds no images to read of the known classes {', '.join(data.classes[:10])}"
        )
    result = summarise(clean, counts)
    for detector, (known, unknown, sets) in tested.items():
        numbers = open_set_numbers(together([known, *corrupted[detector]]), unknown, sets)
        result |= {f"{detector.name}/{FULL_SPECTRUM}/{name}": value for name, value in numbers.items()}
    return result | {"skipped": skipped}


def summarise(clean: np.ndarray, counts: dict[tuple[str, int], np.ndarray]) -> dict[str, Any]:
    """Right answers and images, counted per (kind, severity), as the numbers of :func:`evaluate_corruptions`."""
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    result: dict[str, Any] = {}
    for kind in kinds:
        per_severity = {severity: right for (name, severity), right in sorted(counts.items()) if name == kind}
        accuracy = {severity: right[:-1] / right[-1] for severity, right in per_severity.items()}
        for severity, values in accuracy.items():
            result |= {f"corruptions/{kind}/{severity}/{m}": float(v) for m, v in zip(METHODS, values, strict=True)}
        means = np.mean(list(accuracy.values()), axis=0)
        result |= {f"corruptions/{kind}/{m}": float(v) for m, v in zip(METHODS, means, strict=True)}
        errors = sum(1 - values for values in accuracy.values())  # summed over severities
        reference = max(errors[-1], 1 / max(right[-1] for right in per_severity.values()))
        result |= {f"corruptions/{kind}/ce/{m}": float(e / reference) for m, e in zip(LEARNED, errors, strict=False)}
    for i, method in enumerate(METHODS):
        result[f"corruptions/clean/{method}"] = float(clean[i] / clean[-1])
        mean = np.mean([result[f"corruptions/{kind}/{method}"] for kind in kinds])
        result[f"corruptions/mean_error/{method}"] = float(1 - mean)
    for method in LEARNED:
        result[f"corruptions/mce/{method}"] = float(np.mean([result[f"corruptions/{k}/ce/{method}"] for k in kinds]))
    return result


def find_batches(where: str, data: OpenSetData, test: ImageSet, read: Read) -> Batches:
    """The corrupted images that ``where`` stands for.

    Args:
        read: decodes images, and leaves out those that can't be read or raises.

    Raises:
        ValueError: neither ``make`` nor a folder in one of the two layouts.
    """
    if where == "make":
        return make(test, read)
    root = Path(where).expanduser()
    if not root.is_dir():
        raise ValueError(f"corruptions: {root} is not a folder (make makes the corruptions from the run's test images)")
    if (root / "labels.npy").is_file():
        return read_cifar_layout(root, data, test.size)
    if any(folder.is_dir() for kind in CORRUPTIONS for folder in (root / kind / str(s) for s in SEVERITIES)):
        return read_imagenet_layout(root, data, test, read)
    raise ValueError(
        f"corruptions: {root} is in no layout known here: CIFAR-10-C's (labels.npy and gaussian_noise.npy, ...) "
        "or TinyImageNet-C's (gaussian_noise/1/<class>/, ...)"
    )


def make(test: ImageSet, read: Read) -> Batches:
    """All kinds and severities of :mod:`gradmix.eval.protocols.corruptions`; each image is decoded once.

    Seeded by position alone, not by the run's seed: runs on the same test set see the same corrupted images.
    """
    for chunk, rows in enumerate(torch.arange(len(test)).split(CHUNK)):
        images = read(test.select(rows))
        for kind, severity in product(CORRUPTIONS, SEVERITIES) if len(images) else ():
            yield kind, severity, corrupt(images.pixels, kind, severity, seed=chunk), images.labels


def read_cifar_layout(root: Path, data: OpenSetData, size: int) -> Batches:
    """CIFAR-10-C's layout: per kind one array [5 * n, 32, 32, 3], severity by severity; ``labels.npy`` alike.

    Labels count the classes in the data set's own order, as they do in CIFAR-10.

    Raises:
        ValueError: ``labels.npy`` or every kind is missing, or labels of another shape. While it goes on: an array that
            is unreadable or of another shape.
    """
    numbers = _load(root / "labels.npy").astype(np.int64)
    present = [kind for kind in CORRUPTIONS if (root / f"{kind}.npy").is_file()]
    if not present:
        raise ValueError(f"corruptions: {root} has labels.npy, but no gaussian_noise.npy or any other kind")
    if numbers.ndim != 1 or len(numbers) % len(SEVERITIES) or not len(numbers):
        raise ValueError(f"corruptions: {root / 'labels.npy'}: expected five severities of labels, got {numbers.shape}")
    position = np.full(max(numbers.max(), *data.known) + 1, -1)
    position[data.known] = np.arange(len(data.known))
    return _cifar_batches(root, present, torch.from_numpy(position[numbers]), size)


def _cifar_batches(root: Path, kinds: Sequence[str], labels: Tensor, size: int) -> Batches:
    for kind in kinds:
        arrays = _load(root / f"{kind}.npy")
        if arrays.ndim != 4 or arrays.shape[3] != 3 or len(arrays) != len(labels) or arrays.dtype != np.uint8:
            raise ValueError(
                f"corruptions: {root / f'{kind}.npy'}: expected uint8 [{len(labels)}, H, W, 3], "
                f"got {arrays.dtype} {list(arrays.shape)}"
            )
        for severity, rows in zip(SEVERITIES, torch.arange(len(labels)).chunk(len(SEVERITIES)), strict=True):
            for part in rows[labels[rows] >= 0].split(CHUNK):
                if len(part):
                    yield kind, severity, from_array(arrays[part.numpy()], size), labels[part]


def read_imagenet_layout(root: Path, data: OpenSetData, test: ImageSet, read: Read) -> Batches:
    """TinyImageNet-C's layout: ``kind/severity/<class>/*.JPEG``; classes that are not known are left out."""
    for kind in CORRUPTIONS:
        for severity in SEVERITIES:
            files, labels = [], []
            for label, name in enumerate(data.classes):
                folder = root / kind / str(severity) / name
                inside = list_images(folder) if folder.is_dir() else []
                files += inside
                labels += [label] * len(inside)
            images = ImageSet(torch.tensor(labels, dtype=torch.int64), test.size, files=files, fit=test.fit)
            for rows in torch.arange(len(images)).split(CHUNK):
                part = read(images.select(rows))
                if len(part):
                    yield kind, severity, part.pixels, part.labels


def corruption_table(result: dict[str, Any]) -> str:
    """Accuracies, mean error and mCE as text."""
    names = [key.split("/")[1] for key in result if key.startswith("corruptions/") and key.endswith("/ce/knn")]
    lines = [
        "",
        "accuracy on corrupted images, %, mean over severities",
        f"  {'':<20}{'kNN':>14}{'linear probe':>14}{'kNN on pixels':>16}",
    ]
    for name in ["clean", *names]:
        values = [100 * result[f"corruptions/{name}/{method}"] for method in METHODS]
        lines.append(f"  {name:<20}{values[0]:>14.2f}{values[1]:>14.2f}{values[2]:>16.2f}")
    mean = [100 * result[f"corruptions/mean_error/{method}"] for method in METHODS]
    mce = [100 * result[f"corruptions/mce/{method}"] for method in LEARNED]
    lines += [
        f"  {'mean error':<20}{mean[0]:>14.2f}{mean[1]:>14.2f}{mean[2]:>16.2f}",
        f"  {'mCE':<20}{mce[0]:>14.2f}{mce[1]:>14.2f}{100:>16.2f}",
        "",
        "  mCE: error relative to kNN on raw pixels, mean over kinds; lower is better.",
    ]
    if len(names) < len(CORRUPTIONS):
        missing = [kind for kind in CORRUPTIONS if kind not in names]
        lines.append(f"  {len(names)} of {len(CORRUPTIONS)} kinds; missing: {', '.join(missing)}")
    if bad := result["data/bad_images"]:
        lines.append(f"  image files that can't be read, left out: {bad:g}")
    return "\n".join(lines)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"corruptions: {path}: not a readable .npy file ({error})") from error
