"""Distance to a classifier's decision boundaries (Liu and Qin, arXiv 2312.11536)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors.head import HeadDetector, logits
from gradmix.eval.features.arrays import blocks

SMALLEST = 1e-12


@dataclass
class FDBD(HeadDetector):
    """Score: minus the mean distance of the feature to the boundaries between the head's class and each other one, over
    its distance to the mean of the training features.

    A boundary's distance is the difference of two logits over the distance of the two classes' weights; two classes
    with the same weights have none. The class is the head's.
    """

    NAME: ClassVar[str] = "fdbd"
    ARRAYS: ClassVar[Mapping[str, str]] = {
        "head_": "float classes width+1",
        "mean_": "float width",
        "gaps_": "positive classes classes",
    }

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        self.head_ = self._head(features, positions)
        self.mean_ = features.mean(axis=0, dtype=np.float64)
        weight = self.head_[:, :-1]
        gaps = np.array([np.linalg.norm(weight - row, axis=1) for row in weight])
        self.gaps_ = np.where(gaps > 0, gaps, 1.0)  # of a class with itself the logits don't differ

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = logits(self.head_, features)
        position = values.argmax(axis=1)
        distance = np.empty(len(features))
        for rows in blocks(values.shape):
            apart = values[rows].max(axis=1, keepdims=True) - values[rows]
            distance[rows] = (apart / self.gaps_[position[rows]]).sum(axis=1)
        away = np.linalg.norm(features - self.mean_, axis=1)
        return -distance / max(1, values.shape[1] - 1) / np.maximum(away, SMALLEST), position
