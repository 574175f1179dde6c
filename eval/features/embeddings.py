"""Features of images from anywhere, in memory; :mod:`gradmix.eval.features.formats` has files of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gradmix.eval.features.arrays import check_features, check_labels


@dataclass(frozen=True)
class Embeddings:
    """Features of images, wherever they come from.

    Attributes:
        features: ``[N, F]``.
        labels: ``[N]`` int64 that count ``classes``; -1 where an image has none.
        classes: names.
        paths: of the images, None where nobody said.
        projections: ``[N, D]``, None where there are none.
    """

    features: np.ndarray
    labels: np.ndarray
    classes: list[str]
    paths: Sequence[str] | None = None
    projections: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def names(self) -> np.ndarray:
        """The label of each as text ``[N]``, empty where there is none."""
        return np.array([*self.classes, ""])[self.labels]


def embeddings(
    features: Any,
    labels: Any = None,
    paths: Sequence[str] | None = None,
    projections: Any = None,
    name: str = "features",
) -> Embeddings:
    """Arrays of anyone's as :class:`Embeddings`.

    Args:
        features, projections: ``[N, F]`` and ``[N, D]`` numbers: arrays, tensors, memory-mapped ones too.
        labels: ``[N]``, names of classes (empty: none) or integers (negative: none), whose name is the number; or None.
        name: what they are called in messages; the labels are ``labels`` instead of ``features`` in it.

    Raises:
        ValueError: a wrong shape or type, nothing at all, or non-finite values.
    """
    features = check_features(name, features)
    count, called = len(features), name.replace("features", "labels")
    if projections is not None:
        projections = check_features(name.replace("features", "projections"), projections)
        if len(projections) != count:
            raise ValueError(f"{name.replace('features', 'projections')}: {len(projections)} rows, {name} has {count}")
    if paths is not None and len(paths) != count:
        raise ValueError(f"{name.replace('features', 'paths')}: {len(paths)}, {name} has {count} rows")
    if labels is None:
        return Embeddings(features, np.full(count, -1), [], paths, projections)
    labels = labels if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if labels.dtype == object and all(isinstance(label, str) for label in labels.flat):  # as pandas has text
        labels = labels.astype("U")
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "US":
        if labels.shape != (count,):
            raise ValueError(f"{called}: expected one for each of {count} features, got shape {labels.shape}")
        texts = labels if labels.dtype.kind == "U" else np.char.decode(labels, "utf-8")
        names, codes = np.unique(texts, return_inverse=True)
    else:
        numbers = np.maximum(check_labels(called, labels, count), -1)
        values, codes = np.unique(numbers, return_inverse=True)
        names = np.array(["" if value < 0 else str(value) for value in values])
    named = names != ""
    place = np.where(named, np.cumsum(named) - 1, -1)
    return Embeddings(features, place[codes], [str(one) for one in names[named]], paths, projections)
