"""Features from elsewhere as what an evaluation needs: training, held-out and test rows, known and unknown.

``train`` alone is divided as a folder of images is: a part of each class to test (``data.test_fraction``), and with
``data.known=[...]`` the other classes are unknown. With ``test``, classes that only it has are unknown. Rows of
``test`` without a class are unknown, and so is all of ``unknown``. With ``data.pseudo_unknown`` the last known classes
play the unknown ones, and what is really unknown is left out. ``held_out`` without labels is of known classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradmix.eval.config import EvalConfig
from gradmix.eval.counted import counted
from gradmix.eval.features.arrays import blocks
from gradmix.eval.features.embeddings import Embeddings, embeddings
from gradmix.eval.features.formats import read_embeddings
from gradmix.eval.features.mapped import Arrays, map_arrays, write_arrays
from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.open_set import OpenSetData, known_classes, play_unknown
from gradmix.ssl.data.sources import Source, stratified

FEATURES = "features"  # data.name of what was evaluated without images
Parts = list[tuple[Embeddings, np.ndarray]]  # rows of features, in order


@dataclass(frozen=True)
class FeatureSets:
    """Features by what they are for; see the module."""

    train: Embeddings
    test: Embeddings | None = None
    unknown: Embeddings | None = None
    held_out: Embeddings | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: sets of another width.
        """
        sets = {"train": self.train, "test": self.test, "unknown": self.unknown, "held_out": self.held_out}
        for space in ("features", "projections"):
            arrays = {name: getattr(one, space, None) for name, one in sets.items()}
            widths = {f"{name}_{space}": array.shape[1] for name, array in arrays.items() if array is not None}
            for name, width in widths.items():
                first = next(iter(widths))
                if width != widths[first]:
                    raise ValueError(f"{name}: {width} wide, {first} are {widths[first]}")


def read_sets(config: EvalConfig) -> FeatureSets:
    """What ``features=``, ``test_features=`` and ``unknown_features=`` name.

    A file ``.npz`` has all of it: arrays ``train_features`` and ``train_labels``, and of ``test``, ``unknown`` and
    ``held_out`` those that there are.

    Raises:
        ValueError: missing or damaged files, or arrays that make no sense.
    """
    assert config.features is not None
    path = Path(config.features).expanduser()
    others = {"test": config.test_features, "unknown": config.unknown_features}
    given = {name: Path(other).expanduser() for name, other in others.items() if other is not None}
    if path.suffix != ".npz":
        return FeatureSets(
            read_embeddings(path), **{name: read_embeddings(other, f"{name}_features") for name, other in given.items()}
        )
    if given:
        raise ValueError(f"{next(iter(given))}_features: belongs into {path} itself, an .npz file has everything")
    if not path.is_file():
        raise ValueError(f"features: {path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # zipfile and numpy have no common base for what a damaged file raises
        raise ValueError(f"features: {path}: can't be read ({str(error).splitlines()[0]})") from error
    return sets_of(arrays, f"features: {path}: ")


def sets_of(arrays: dict[str, Any], where: str = "") -> FeatureSets:
    """Arrays by name: ``train_features``, ``train_labels``, ``test_features``, ...

    Raises:
        ValueError: ``train_features`` is missing, a name is unknown, or an array makes no sense.
    """
    kinds, parts = ("features", "labels", "projections", "paths"), ("train", "test", "unknown", "held_out")
    expected = [f"{part}_{kind}" for part in parts for kind in kinds]
    wrong = [name for name, array in arrays.items() if name not in expected and array is not None]
    if wrong:
        raise ValueError(f"{where}{wrong[0]}: no such array; expected {', '.join(expected)}")
    found: dict[str, Embeddings] = {}
    try:
        for part in parts:
            own = {kind: arrays.get(f"{part}_{kind}") for kind in kinds}
            if own["features"] is not None:
                found[part] = embeddings(**own, name=f"{part}_features")
            elif part == "train" or any(array is not None for array in own.values()):
                raise ValueError(f"{part}_features: missing")
        return FeatureSets(**found)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def divide(sets: FeatureSets, config: DataConfig, seed: int) -> tuple[OpenSetData, dict[str, Parts]]:
    """Which rows train, are held out and test, as images' data is (:func:`gradmix.ssl.data.open_set.load_data`); the
    images themselves are not there.

    Raises:
        ValueError: classes that make no sense, or training rows without one.
    """
    train, test = sets.train, sets.test
    classes = list(dict.fromkeys([*train.classes, *([] if test is None else test.classes)]))
    labels = torch.from_numpy(train.labels)
    if test is None:
        chosen, tested = (rows.numpy() for rows in _to_test(labels, config.test_fraction, seed))
        parts: Parts = [(train, tested)]
    else:
        chosen, parts = np.arange(len(train)), [(test, np.arange(len(test)))]
    if classes and (labels[chosen] < 0).any():
        what = counted(int((labels[chosen] < 0).sum()), "row")
        raise ValueError(f"train_labels: {what} without a class; leave them out, or give them as unknown_features")
    for key in ("known", "pseudo_unknown"):
        if getattr(config, key) and not classes:
            raise ValueError(f"data.{key}: the features have no classes, so that none is known; give train_labels")
    number = {name: place for place, name in enumerate(classes)}
    test_labels = np.concatenate([_renumbered(one, number)[rows] for one, rows in parts])
    known = known_classes(config, Source(_images(labels[chosen]), _images(labels[:0]), classes)) if classes else []
    unknown = sorted(set(range(len(classes))) - set(known))
    if config.pseudo_unknown:
        known, unknown = play_unknown(known, config.pseudo_unknown)
        in_test = np.isin(test_labels, [*known, *unknown])
        parts, test_labels = [(one, rows[in_test]) for one, rows in parts], test_labels[in_test]
    if classes and len(known) < 2:
        raise ValueError(f"features: one known class only ({classes[known[0]]}); give at least two, or no labels")
    place = np.full(len(classes) + 1, -1)
    place[known] = np.arange(len(known))
    chosen = chosen[place[train.labels[chosen]] >= 0] if classes else chosen
    missing = set(range(len(known))) - set(place[train.labels[chosen]].tolist())
    if missing:
        raise ValueError(f"features: no training rows of the known class {classes[known[min(missing)]]}")
    if sets.unknown is not None and not config.pseudo_unknown:
        parts = [*parts, (sets.unknown, np.arange(len(sets.unknown)))]
        test_labels = np.concatenate([test_labels, np.full(len(sets.unknown), -1)])
    by_set: dict[str, Parts] = {"train": [(train, chosen)], "test": parts}
    train_labels = place[train.labels[chosen]]
    aside = stratified(torch.from_numpy(train_labels), config.holdout, seed)
    held_labels = place[:0]
    if sets.held_out is not None:
        own, named = _renumbered(sets.held_out, number), bool(classes and sets.held_out.classes)
        if config.pseudo_unknown and not named:
            raise ValueError(
                "data.pseudo_unknown: needs held_out_labels, to leave out rows of classes that play unknown"
            )
        rows = np.flatnonzero(place[own] >= 0) if named else np.arange(len(own))
        by_set["held_out"], held_labels = [(sets.held_out, rows)], place[own[rows]]
    elif config.holdout:
        kept, away = (rows.numpy() for rows in aside)
        by_set |= {"train": [(train, chosen[kept])], "held_out": [(train, chosen[away])]}
        train_labels, held_labels = train_labels[kept], train_labels[away]
    labelled = {"train": train_labels, "held_out": held_labels, "test": place[test_labels]}
    images = {name: _images(torch.from_numpy(own), by_set.get(name, [])) for name, own in labelled.items()}
    names = [classes[i] for i in known], [classes[i] for i in unknown]
    return OpenSetData(images["train"], images["held_out"], images["test"], *names, known), by_set


def write_space(path: Path, parts: Parts, labels: torch.Tensor) -> Arrays:
    """Write features (and projections, where all have them) with labels as ``features/NAME.safetensors``, block by
    block; what it holds, mapped.
    """
    spaces = ["features", *(["projections"] if all(one.projections is not None for one, _ in parts) else [])]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"labels": ("I64", (len(labels),))}
    shapes |= {space: ("F32", (len(labels), getattr(parts[0][0], space).shape[1])) for space in spaces}

    def fill(arrays: Arrays) -> None:
        arrays["labels"][:] = labels.numpy()
        for space in spaces:
            end = 0
            for one, rows in parts:
                for some in blocks((len(rows), shapes[space][1][1])):
                    block = getattr(one, space)[rows[some]]
                    arrays[space][end : end + len(block)] = block
                    end += len(block)

    write_arrays(path, shapes, fill)
    return map_arrays(path)[1]


def _to_test(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on and to test with: a share of each class, and all that have no class where others have one."""
    kept, aside = stratified(labels, share, seed)
    if (labels >= 0).any():
        aside = torch.cat([aside[labels[aside] >= 0], (labels < 0).nonzero()[:, 0]])
        kept = kept[labels[kept] >= 0]
    return kept, aside


def _renumbered(one: Embeddings, number: dict[str, int]) -> np.ndarray:
    """Labels that count all classes; -1 for those of none."""
    return np.array([*(number.get(name, -1) for name in one.classes), -1])[one.labels]


def _images(labels: torch.Tensor, parts: Parts = ()) -> ImageSet:  # type: ignore[assignment]
    """Images of which labels are known, and paths where all have some."""
    files = None
    if parts and all(one.paths is not None for one, _ in parts):
        files = [one.paths[row] for one, rows in parts for row in rows.tolist()]  # type: ignore[index]
    return ImageSet(labels, 1, files=files)
