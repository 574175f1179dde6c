"""Neural collapse: a feature near a class's weights, and long (Liu and Qin, arXiv 2311.01479)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors.head import HeadDetector, logits

SMALLEST = 1e-12


@dataclass
class NCI(HeadDetector):
    """Score: minus the projection of the head's weights for its class onto the direction of the feature from the mean
    of the training features, less `alpha` times the sum of the feature's absolute values. The class is the head's.

    Args:
        alpha: at least 0.
    """

    alpha: float = 1e-4

    NAME: ClassVar[str] = "nci"
    ARRAYS: ClassVar[Mapping[str, str]] = {"head_": "float classes width+1", "mean_": "float width"}

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha: expected at least 0, got {self.alpha}")

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        self.head_ = self._head(features, positions)
        self.mean_ = features.mean(axis=0, dtype=np.float64)

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position, away = logits(self.head_, features).argmax(axis=1), features - self.mean_
        along = np.einsum("nf,nf->n", self.head_[position, :-1], away)
        along /= np.maximum(np.linalg.norm(away, axis=1), SMALLEST)
        return -along - self.alpha * np.abs(features).sum(axis=1, dtype=np.float64), position
