"""Mahalanobis distance to the classes (arXiv 1807.03888), and relative to all data (arXiv 2106.09022)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors.base import Detector
from gradmix.eval.detectors.class_mean import class_means
from gradmix.eval.features.arrays import blocks


@dataclass
class Mahalanobis(Detector):
    """Score: smallest squared Mahalanobis distance of the raw feature to a class mean.

    One covariance for all classes, of the deviations from the class means, divided by N. Fewer images than
    dimensions, or dead features, make it singular; its pseudo-inverse then leaves out the directions whose
    variance is below F * 2.2e-16 of the largest, which is rounding (as scikit-learn has it, and with it
    OpenOOD): there the training features say nothing, and a deviation costs nothing. When no direction is left
    (all features of a class equal), every score is 0. The class is the nearest one.

    Args:
        shrinkage: share, 0 to 1, of the mean variance times identity that is mixed into the covariance.
    """

    shrinkage: float = 0.0

    NAME: ClassVar[str] = "mahalanobis"
    ARRAYS: ClassVar[Mapping[str, str]] = {
        "centre_": "float width",
        "whitening_": "float width rank",
        "means_": "float classes rank",
    }

    def __post_init__(self) -> None:
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage: expected 0 to 1, got {self.shrinkage}")

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        self.centre_ = features.mean(axis=0, dtype=np.float64)
        means = class_means(features, positions, self.class_count)
        self.whitening_ = whitening(covariance(features, means, positions), self.shrinkage)
        self.means_ = (means - self.centre_) @ self.whitening_

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whitened = (features - self.centre_) @ self.whitening_
        position = (np.square(self.means_).sum(axis=1) - whitened @ (2 * self.means_.T)).argmin(axis=1)
        # expanding the square loses digits, which the distance itself is to have
        return np.square(whitened - self.means_[position]).sum(axis=1), position


@dataclass
class RelativeMahalanobis(Mahalanobis):
    """Score: squared Mahalanobis distance to the nearest class less that to the mean of all training
    features.

    The second distance is under the covariance of all features around their mean, so that directions in which
    everything varies count less. Singular covariances are treated as `Mahalanobis` does, each by itself.
    """

    NAME: ClassVar[str] = "relative_mahalanobis"
    ARRAYS: ClassVar[Mapping[str, str]] = {**Mahalanobis.ARRAYS, "background_": "float width all"}

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        super()._fit(features, positions)
        everything = np.zeros(len(features), dtype=np.int64)
        self.background_ = whitening(covariance(features, self.centre_[None], everything), self.shrinkage)

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distance, position = super()._assess(features)
        return distance - np.square((features - self.centre_) @ self.background_).sum(axis=1), position


def covariance(features: np.ndarray, means: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Mean outer product of the deviations from `means[positions]`, `[F, F]` in float64."""
    total = np.zeros((features.shape[1],) * 2)
    for rows in blocks(features.shape):
        deviation = features[rows] - means[positions[rows]]
        total += deviation.T @ deviation
    return total / len(features)


def whitening(covariance: np.ndarray, shrinkage: float = 0.0) -> np.ndarray:
    """`[F, R]` such that |x @ whitening|^2 = x^T C^+ x, where C is the shrunk covariance of rank R.

    For a covariance of zero one column of zeros: all distances are 0.
    """
    width = len(covariance)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / width * np.eye(width)
    variance, directions = np.linalg.eigh(shrunk)
    kept = variance > width * np.finfo(np.float64).eps * max(variance[-1], 0)
    if not kept.any():
        return np.zeros((width, 1))
    return directions[:, kept] / np.sqrt(variance[kept])
