"""Virtual-logit matching (Wang et al., arXiv 2203.10807)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors.base import Detector
from gradmix.eval.detectors.class_mean import class_means
from gradmix.eval.detectors.head import check_head, logits, logsumexp
from gradmix.eval.detectors.mahalanobis import covariance
from gradmix.eval.features.arrays import blocks, unit_rows
from gradmix.eval.features.search import inner_product

HEAD_ROUNDING = float(np.finfo(np.float32).eps)  # of weights that sum to zero over the classes; it is no direction
SMALLEST_VARIANCE = 1e-10  # of a direction that the features span, relative to the largest


@dataclass
class ViM(Detector):
    """Score: the part of a feature outside the principal space of the training features, as a virtual logit.

    With a linear head: alpha * residual - logsumexp(logits), where the residual is the norm of the feature
    (from the origin -pinv(W) b) outside the space of the largest `dimension` eigenvalues, and alpha makes the
    mean residual of training features their mean largest logit. This orders images as the paper's softmax
    probability of the virtual logit does. The class is the head's. Without a head: the residual norm alone,
    from the training mean; the class is that of the class mean with the largest cosine.

    Args:
        dimension: of the principal space; None takes the paper's, 1000 for features of 2048 or more, 512 from
            768, else half, but half the rank of the training features where those don't span more than that.
    """

    dimension: int | None = None

    NAME: ClassVar[str] = "vim"
    ARRAYS: ClassVar[Mapping[str, str]] = {
        "origin_": "float width",
        "residual_space_": "float width rest",
        "alpha_": "float 1",
        "head_": "float classes width+1",
        "means_": "unit classes width",
    }
    NEEDS_LABELS: ClassVar[bool] = False
    TAKES_HEAD: ClassVar[bool] = True

    def absent(self) -> set[str]:
        if self.classes_ is None:
            return {"alpha_", "head_", "means_"}
        return {"alpha_", "head_"} if self.means_ is not None else {"means_"}

    def _fit(self, features: np.ndarray, positions: np.ndarray | None) -> None:
        count, width = features.shape
        self.head_: np.ndarray | None = None
        self.alpha_: np.ndarray | None = None
        self.means_: np.ndarray | None = None
        self.origin_ = features.mean(axis=0, dtype=np.float64)
        if self._given_head is not None:
            self.head_ = check_head(self._given_head, self.class_count, width)
            weight, bias = self.head_[:, :-1], self.head_[:, -1]
            self.origin_ = -np.linalg.pinv(weight, rcond=max(weight.shape) * HEAD_ROUNDING) @ bias
        elif positions is not None:
            self.means_ = unit_rows(class_means(features, positions, self.class_count, prepare=unit_rows))

        spread = covariance(features, self.origin_[None], np.zeros(count, np.int64))
        variance, directions = np.linalg.eigh(spread)
        self.residual_space_ = np.ascontiguousarray(directions[:, : width - self._dimension(variance)])
        if (head := self.head_) is not None:
            residual = block_mean(self._residual, features)
            largest = block_mean(lambda block: logits(head, block).max(axis=1), features)
            self.alpha_ = np.array([largest / residual if residual > 0 else 1.0])

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        residual = self._residual(features)
        if self.head_ is not None and self.alpha_ is not None:
            values = logits(self.head_, features)
            return self.alpha_[0] * residual - logsumexp(values), values.argmax(axis=1)
        if self.means_ is not None:
            return residual, inner_product(unit_rows(features), self.means_, 1)[1][:, 0]
        return residual, None

    def _residual(self, features: np.ndarray) -> np.ndarray:
        return np.linalg.norm((features - self.origin_) @ self.residual_space_, axis=1)

    def _dimension(self, variance: np.ndarray) -> int:
        """Of the principal space, for ascending eigenvalues `[F]`."""
        width = len(variance)
        rank = int((variance > SMALLEST_VARIANCE * variance[-1]).sum())
        if self.dimension is None:
            paper = 1000 if width >= 2048 else 512 if width >= 768 else width // 2
            return paper if paper < rank else rank // 2
        if not 0 <= self.dimension < rank:
            raise ValueError(f"dimension: expected 0 to {rank - 1}, below the features' rank, got {self.dimension}")
        return self.dimension


def block_mean(values: Callable[[np.ndarray], np.ndarray], features: np.ndarray) -> float:
    """Mean of `values(features)`, block by block."""
    return sum(values(features[rows]).sum() for rows in blocks(features.shape)) / len(features)
