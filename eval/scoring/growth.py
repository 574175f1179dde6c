"""A saved detector with more images, or with a class less: fitted and calibrated anew, on the features it has kept.

So it is equal to one that was fitted to all these images from the start, whatever detector it is.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.detectors import Detector
from gradmix.eval.features.arrays import blocks, check_features, check_labels
from gradmix.eval.features.mapped import Arrays, map_arrays, write_arrays
from gradmix.eval.scoring.scorer import FITTED_TO, THUMBNAILS, Scorer, shrunk, write_scorer
from gradmix.ssl.data.copies import first_copies
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.names import check_names
from gradmix.ssl.data.sources import stratified
from gradmix.ssl.runs.files import hash_file
from gradmix.ssl.runs.tensors import opened_tensors

IN_MEMORY = 4 * 2**30  # bytes; more training features are read from disk, as data.memory_gib has it while evaluating
TRAIN, HELD_OUT = FITTED_TO


class Part(NamedTuple):
    """Rows of features, and their labels: those of ``features`` at ``rows`` have ``labels``."""

    features: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


class Kept(NamedTuple):
    """What the grown detector is fitted to: parts, one after the other.

    Attributes:
        train_files, thumbnails: of its training images, where it shows them.
    """

    classes: list[str]
    train: list[Part]
    held_out: list[Part]
    train_files: list[str] | None
    thumbnails: Tensor | None


def add_images(
    scorer: Scorer, paths: Sequence[str], name: str | None, holdout: float, seed: int, batch_size: int = 256
) -> Kept:
    """All that the detector was fitted to, then new images.

    Args:
        name: their class, a new one or one that is there; None where the detector has no classes.
        holdout: share of the new images to calibrate on; none, where none were held out before.
        seed: draws them; exact copies stay together.

    Raises:
        ValueError: images that can't be read, a name that no class can have, or a detector that can't grow.
    """
    classes = list(scorer.classes)
    if (name is None) == (scorer.detector.classes_ is not None):
        raise ValueError("class: missing; give it as class=NAME" if name is None else "class: the detector has none")
    if name is not None and name not in classes:
        classes.append(name)
    new = torch.zeros(len(paths), dtype=torch.long)
    images = ImageSet(new, scorer.backbone.image_size, files=paths)
    check_names(classes, images)
    train, held_out = read_kept(scorer, TRAIN), read_kept(scorer, HELD_OUT)
    fresh, aside = stratified(new, holdout if held_out else 0.0, seed, first_copies(images))
    features, small = look_at(scorer, paths, batch_size)
    label = -1 if name is None else classes.index(name)
    train += [Part(features, fresh.numpy(), np.full(len(fresh), label))]
    held_out += [Part(features, aside.numpy(), np.full(len(aside), label))] if len(aside) else []
    files, thumbnails = scorer.train_files, None
    if files is not None:
        files = [*files, *(os.path.abspath(paths[row]) for row in fresh.tolist())]
    elif small is not None:
        thumbnails = torch.cat([stored_thumbnails(scorer), small[fresh]])
    return Kept(classes, train, held_out, files, thumbnails)


def without_class(scorer: Scorer, name: str) -> Kept:
    """All that the detector was fitted to, but one class.

    Raises:
        ValueError: there is no such class, or no other, or the detector can't shrink.
    """
    if name not in scorer.classes:
        raise ValueError(f"class: the detector has no {name!r}; its classes are {', '.join(scorer.classes) or 'none'}")
    if len(scorer.classes) == 1:
        raise ValueError(f"class: {name!r} is the detector's only one")
    gone = scorer.classes.index(name)
    left = [one for one in scorer.classes if one != name]
    whole = {file: read_kept(scorer, file) for file in FITTED_TO}
    if any((part.labels < 0).any() for part in whole[HELD_OUT]):
        raise ValueError(
            f"class: held-out images that have none may be of {name!r}; fit the detector anew, without them"
        )
    train, held_out = (
        [Part(p.features, p.rows[p.labels != gone], p.labels[p.labels != gone]) for p in parts]
        for parts in whole.values()
    )
    train, held_out = (
        [p._replace(labels=p.labels - (p.labels > gone)) for p in parts if len(p.rows)] for parts in (train, held_out)
    )
    rows = np.concatenate([part.rows for part in train])
    files = None if scorer.train_files is None else [scorer.train_files[row] for row in rows.tolist()]
    thumbnails = stored_thumbnails(scorer)[torch.from_numpy(rows)] if THUMBNAILS in scorer.files else None
    return Kept(left, train, held_out, files, thumbnails)


def write_grown(
    scorer: Scorer, kept: Kept, folder: Path, accept: float | None = None, per_class: bool | None = None, seed: int = 0
) -> Detector:
    """Fit, calibrate and write the detector's new folder; the old one is only read.

    Args:
        accept, per_class: of the threshold; None: as it was.
        seed: of the probe behind a detector with a head.
    """
    for name, parts in zip(FITTED_TO, (kept.train, kept.held_out), strict=True):
        if parts:
            write_parts(folder / "fitted_to" / name, scorer.space, parts)
    old = scorer.detector
    mapped, labels = read_space(folder / "fitted_to" / TRAIN, scorer.space)
    features = np.array(mapped) if mapped.nbytes <= IN_MEMORY else mapped
    classes = None if old.classes_ is None else labels
    head = {}
    if old.TAKES_HEAD and getattr(old, "head_", None) is not None and len(kept.classes) > 1:
        probe = LinearProbe(seed=seed).fit(features, labels)
        head = {"head": (probe.weight_, probe.bias_)}
    detector = dataclasses.replace(old).fit(features, classes, **head)
    if kept.held_out:
        said = old.calibration_
        if said is None:
            raise ValueError(
                f"{scorer.folder / 'fitted_to' / HELD_OUT}: the detector was not calibrated on these images"
            )
        accept = said.accept if accept is None else accept
        per_class = said.per_class if per_class is None else per_class
        detector.calibrate(read_space(folder / "fitted_to" / HELD_OUT, scorer.space)[0], accept, per_class)
    elif accept is not None or per_class is not None:
        raise ValueError("accept: the detector has no held-out images to calibrate on")
    weights = None if scorer.network is None else scorer.folder
    write_scorer(folder, detector, weights, kept.classes, scorer.space, kept.train_files, kept.thumbnails)
    return detector


def read_kept(scorer: Scorer, name: str) -> list[Part]:
    """What the detector's folder keeps of its training or held-out images; nothing, where none were held out.

    Raises:
        ValueError: it is missing, or not what was written.
    """
    path = scorer.folder / "fitted_to" / name
    if name not in scorer.fitted_to:
        if name == HELD_OUT and TRAIN in scorer.fitted_to:
            return []
        raise ValueError(
            f"{scorer.folder}: keeps no features of its images and can't change; gradmix-eval run=... writes it anew"
        )
    if not path.is_file():
        raise ValueError(f"{path}: missing; without the features of its images a detector can't change")
    if hash_file(path) != scorer.fitted_to[name]:
        raise ValueError(f"{path}: damaged, it does not match scorer.json's hash")
    features, labels = read_space(path, scorer.space)
    check_features(f"{path}: {scorer.space}", features, width=scorer.detector.width_)
    least, most = (-1, -1) if scorer.detector.classes_ is None else (0, len(scorer.classes) - 1)
    least = -1 if name == HELD_OUT else least  # known, of a class that nobody named
    if check_labels(f"{path}: labels", labels, len(features)).min() < least or labels.max() > most:
        raise ValueError(f"{path}: labels: expected {least} to {most}, got {labels.min()} to {labels.max()}")
    return [Part(features, np.arange(len(labels)), labels)]


def read_space(path: Path, space: str) -> tuple[np.memmap, np.ndarray]:
    """Features or projections ``[N, F]``, mapped, and labels ``[N]``."""
    arrays = map_arrays(path, "r")[1]
    if not {space, "labels"} <= set(arrays):
        raise ValueError(f"{path}: {space} or labels: missing")
    return arrays[space], np.array(arrays["labels"])


def write_parts(path: Path, space: str, parts: list[Part]) -> None:
    count, width = sum(len(part.rows) for part in parts), parts[0].features.shape[1]

    def fill(arrays: Arrays) -> None:
        arrays["labels"][:] = np.concatenate([part.labels for part in parts])
        start = 0
        for part in parts:
            for block in blocks((len(part.rows), width)):
                rows = part.rows[block]
                arrays[space][start : start + len(rows)] = part.features[rows]
                start += len(rows)

    write_arrays(path, {"labels": ("I64", (count,)), space: ("F32", (count, width))}, fill)


def look_at(scorer: Scorer, paths: Sequence[str], batch_size: int) -> tuple[np.ndarray, Tensor | None]:
    """What the detector looks at, ``[N, F]``, of image files; and thumbnails ``[N, 3, s, s]``, where it has such.

    Raises:
        ValueError: some can't be read.
    """
    side = stored_thumbnails(scorer, 1).shape[-1] if THUMBNAILS in scorer.files else 0
    found, small, wrong = [], [], []
    for batch, features in scorer.looks(paths, batch_size, progress=True):
        wrong += [image for image in batch if isinstance(image, str)]
        if features is None or wrong:
            continue
        found.append(features.numpy())
        if side:
            small.append(shrunk(torch.stack([image for image in batch if isinstance(image, Tensor)]), side))
    if wrong:
        raise ValueError(f"images: {len(wrong)} of {len(paths)} can't be read, take them out; the first: {wrong[0]}")
    return np.concatenate(found), torch.cat(small) if side else None


def stored_thumbnails(scorer: Scorer, count: int | None = None) -> Tensor:
    with opened_tensors(scorer.folder / THUMBNAILS) as file:
        return file.get_slice("images")[:count]
