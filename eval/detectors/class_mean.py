"""Cosine similarity to the class means, the nearest-prototype baseline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors.base import Detector
from gradmix.eval.features.arrays import blocks, unit_rows
from gradmix.eval.features.search import inner_product


@dataclass
class ClassMean(Detector):
    """Score: minus the largest cosine similarity to a class mean, -1 to 1.

    A class's mean is that of its L2-normalised features. The class is the nearest one. A feature of zero norm
    scores 0, and so does everything if all class means are zero.
    """

    NAME: ClassVar[str] = "class_mean"
    ARRAYS: ClassVar[Mapping[str, str]] = {"means_": "unit classes width"}

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        self.means_ = unit_rows(class_means(features, positions, self.class_count, prepare=unit_rows))

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosine, position = inner_product(unit_rows(features), self.means_, 1)
        return -cosine[:, 0], position[:, 0]


def class_means(
    features: np.ndarray, positions: np.ndarray, classes: int, prepare: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> np.ndarray:
    """Means `[classes, F]` in float64 of `prepare(features)`, block by block."""
    sums = np.zeros((classes, features.shape[1]))
    for rows in blocks(features.shape):
        order = np.argsort(positions[rows], kind="stable")
        present, starts = np.unique(positions[rows][order], return_index=True)
        sums[present] += np.add.reduceat(prepare(features[rows])[order], starts, axis=0, dtype=np.float64)
    return sums / np.bincount(positions, minlength=classes)[:, None]
