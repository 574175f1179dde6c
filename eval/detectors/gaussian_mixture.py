"""A Gaussian mixture for every class, on the features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from gradmix.eval.detectors.base import Detector
from gradmix.eval.detectors.class_mean import class_means
from gradmix.eval.features.arrays import blocks

if TYPE_CHECKING:
    from sklearn import mixture


@dataclass
class GaussianMixture(Detector):
    """Score: minus the largest log-density of the raw feature under a class.

    Each class has its own mixture of Gaussians with diagonal covariances, fitted by scikit-learn's EM. The
    class is the one under which the feature is densest; class sizes don't count.

    Args:
        components: per class, at most one per distinct feature in it.
        regularisation: added to every variance, as a share of the mean variance within classes (of 1 where
            that is 0), so that a class with one image, or a dead feature, has a finite density.
        seed: of EM's start.
    """

    components: int = 2
    regularisation: float = 1e-3
    seed: int = 0

    NAME: ClassVar[str] = "gaussian_mixture"
    ARRAYS: ClassVar[Mapping[str, str]] = {
        "centre_": "float width",
        "weights_": "positive components",
        "means_": "float components width",
        "variances_": "positive components width",
        "starts_": "starts:components classes+1",
    }

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components: expected at least 1, got {self.components}")
        if self.regularisation <= 0:
            raise ValueError(f"regularisation: expected a positive number, got {self.regularisation}")

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        self.centre_ = features.mean(axis=0, dtype=np.float64)
        added = self.regularisation * (within_variance(features, positions, self.class_count) or 1.0)
        fitted = [
            self._fit_class(features[positions == position] - self.centre_, added)
            for position in range(self.class_count)
        ]
        # all components in one list; those of class c are starts[c] to starts[c + 1]
        self.starts_ = np.cumsum([0, *(len(part.weights_) for part in fitted)])
        self.weights_ = np.concatenate([part.weights_ for part in fitted])
        self.means_ = np.concatenate([part.means_ for part in fitted])
        self.variances_ = np.concatenate([part.covariances_ for part in fitted])

    def _fit_class(self, features: np.ndarray, added: float) -> "mixture.GaussianMixture":
        components = min(self.components, len(np.unique(features, axis=0)))
        if len(features) == 1:
            features = np.repeat(features, 2, axis=0)  # scikit-learn wants two
        from sklearn import mixture  # only here: scoring needs no scikit-learn, which takes seconds

        model = mixture.GaussianMixture(
            components, covariance_type="diag", reg_covar=added, max_iter=200, random_state=self.seed
        )
        return model.fit(features)

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, precision = features - self.centre_, 1 / self.variances_
        # (x - m)^2 / v, multiplied out so that no array is [N, components, F]
        distance = x**2 @ precision.T - 2 * x @ (self.means_ * precision).T + (self.means_**2 * precision).sum(axis=1)
        constant = np.log(self.weights_) - np.log(2 * np.pi * self.variances_).sum(axis=1) / 2
        density = np.logaddexp.reduceat(constant - distance / 2, self.starts_[:-1], axis=1)
        return -density.max(axis=1), density.argmax(axis=1)


def within_variance(features: np.ndarray, positions: np.ndarray, classes: int) -> float:
    """Mean over images and dimensions of the squared deviation from the class mean."""
    means = class_means(features, positions, classes)
    return (
        sum(np.square(features[rows] - means[positions[rows]]).sum() for rows in blocks(features.shape)) / features.size
    )
