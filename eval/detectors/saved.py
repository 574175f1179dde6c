"""What the arrays of a saved detector must be, so that its scores mean something.

A detector says of each array its kind and shape, such as ``"class rows"`` or ``"float classes width+1"``. The sizes
``width`` and ``classes`` are known; any other is set by the array that has it first. Kinds:

    float      finite numbers
    positive   finite numbers above 0
    unit       rows of length 1, or 0
    class      positions in ``classes_``
    starts:X   where each class begins among X rows, and the end: from 0, rising
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from gradmix.eval.features.arrays import blocks, check_k
from gradmix.eval.features.search import SavedIndex

if TYPE_CHECKING:
    from gradmix.eval.detectors.base import Detector


def check_saved(detector: "Detector", arrays: Mapping[str, np.ndarray], index: SavedIndex | None) -> None:
    """
    Args:
        arrays: all that the file holds; the detector has those that it knows.

    Raises:
        ValueError: arrays are missing, unknown, of the wrong type or shape, or hold impossible values.
    """
    shapes = dict(detector.ARRAYS)
    if detector.classes_ is not None:
        shapes = {"classes_": "label classes", **shapes}
    elif detector.NEEDS_LABELS:
        raise ValueError("classes_: missing")
    if index is not None and index.factory.startswith("IVF") and index.factory.endswith(",Flat"):
        shapes |= {"centres_": "float lists width", "lists_": "list rows"}
    expected = set(shapes) - detector.absent()
    for name in sorted(expected ^ set(arrays)):
        raise ValueError(f"{name!a:.40}: {'missing' if name in expected else 'nothing that this detector has'}")
    sizes = {"width": detector.width_, "classes": detector.class_count}
    for name, about in shapes.items():
        if name in expected:
            kind, *sides = about.split()
            _check_shape(name, arrays[name], sides, sizes)
            _check_values(name, arrays[name], kind, sizes)
    k = getattr(detector, "k", None)
    if k is not None and "rows" in sizes:
        check_k(k, sizes["rows"])


def _check_shape(name: str, array: np.ndarray, sides: list[str], sizes: dict[str, int]) -> None:
    if array.ndim != len(sides):
        raise ValueError(f"{name}: expected [{', '.join(sides)}], got shape {array.shape}")
    for side, actual in zip(sides, array.shape, strict=True):
        symbol, _, more = side.partition("+")
        size = int(symbol) if symbol.isdigit() else sizes.setdefault(symbol, actual - int(more or 0))
        if actual != size + int(more or 0):
            raise ValueError(f"{name}: expected [{', '.join(sides)}] with {symbol} = {size}, got shape {array.shape}")


def _check_values(name: str, array: np.ndarray, kind: str, sizes: dict[str, int]) -> None:
    if array.dtype.kind != ("f" if kind in ("float", "positive", "unit") else "i"):
        raise ValueError(f"{name}: expected numbers of another type, got {array.dtype}")
    if array.dtype.kind == "f":
        for rows in blocks((len(array), max(1, array[0].size))):
            with np.errstate(invalid="ignore"):  # some NaNs would warn here, and are then reported
                block = np.asarray(array[rows], np.float64)
            _check_floats(name, block, kind)
        return
    if kind == "label" and (array[0] < 0 or (np.diff(array) <= 0).any()):
        raise ValueError(f"{name}: expected rising numbers from 0 on")
    if kind in ("class", "list"):
        most = sizes["classes" if kind == "class" else "lists"]
        if array.min() < 0 or array.max() >= most:
            raise ValueError(f"{name}: expected 0 to {most - 1}, got {array.min()} to {array.max()}")
    if kind.startswith("starts:"):
        most = sizes[kind.partition(":")[2]]
        if array[0] != 0 or array[-1] != most or (np.diff(array) <= 0).any():
            raise ValueError(f"{name}: expected numbers that rise from 0 to {most}")


def _check_floats(name: str, block: np.ndarray, kind: str) -> None:
    if not np.isfinite(block).all():
        raise ValueError(f"{name}: non-finite values")
    if kind == "positive" and (block <= 0).any():
        raise ValueError(f"{name}: expected numbers above 0")
    if kind == "unit":
        length = np.einsum("nf,nf->n", block, block)
        if ((np.abs(length - 1) > 1e-3) & (length > 0)).any():
            raise ValueError(f"{name}: expected rows of length 1 (or 0)")
