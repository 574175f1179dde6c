"""The energy of a head on features that are shaped first: clipped, pruned or scaled."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors.head import HeadDetector, logits, logsumexp

MOST_VALUES = 2**26  # of the training features, for a percentile of them
MOST_PRUNED = 95.0  # per cent; exp(sum / sum of the rest) then stays below exp(20)


class Shaped(HeadDetector):
    """Score: -logsumexp of a linear head's logits of the shaped feature. The class is that of the largest of them.

    Made for features that a ReLU left, 0 or above. Of others the sums count what is above 0.
    """

    ARRAYS: ClassVar[Mapping[str, str]] = {"head_": "float classes width+1"}

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        self.head_ = self._head(features, positions)

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = logits(self.head_, self._shape(features.astype(np.float64)))
        return -logsumexp(values), values.argmax(axis=1)

    def _shape(self, features: np.ndarray) -> np.ndarray:
        """Shaped features `[N, F]` of float64 ones."""
        raise NotImplementedError


@dataclass
class ReAct(Shaped):
    """Shape: what is above a percentile of all values of the training features is clipped to it (Sun et al., arXiv
    2111.12797). Of more than 2^26 values, evenly spaced rows set it.

    Args:
        percentile: above 0, at most 100.
    """

    percentile: float = 90.0

    NAME: ClassVar[str] = "react"
    ARRAYS: ClassVar[Mapping[str, str]] = {**Shaped.ARRAYS, "limit_": "float 1"}

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile: expected a number above 0, at most 100, got {self.percentile}")

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        super()._fit(features, positions)
        count, width = features.shape
        rows = np.linspace(0, count - 1, min(count, max(1, MOST_VALUES // width))).astype(np.int64)
        self.limit_ = np.array([np.percentile(features[rows], self.percentile)], np.float64)

    def _shape(self, features: np.ndarray) -> np.ndarray:
        return np.minimum(features, self.limit_)


@dataclass
class Scale(Shaped):
    """Shape: the feature times exp(sum of its values / sum of its largest ones) (Xu et al., arXiv 2310.00227).

    Args:
        percentile: share of the values, in per cent, that are not among the largest; 0 to 95.
    """

    percentile: float = 85.0

    NAME: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= MOST_PRUNED:
            raise ValueError(f"percentile: expected 0 to {MOST_PRUNED:g}, got {self.percentile}")

    def _shape(self, features: np.ndarray) -> np.ndarray:
        return features * np.exp(self._excess(features, self._largest(features)))

    def _largest(self, features: np.ndarray) -> np.ndarray:
        """Which values of each feature are its largest, `[N, F]`; as many in each, one at least."""
        count = max(1, features.shape[1] - round(features.shape[1] * self.percentile / 100))
        order = np.argsort(-features, axis=1, kind="stable")[:, :count]
        largest = np.zeros(features.shape, bool)
        np.put_along_axis(largest, order, True, axis=1)
        return largest

    def _excess(self, features: np.ndarray, largest: np.ndarray) -> np.ndarray:
        """Sum of all over the sum of the largest, `[N, 1]`; 1 where nothing is above 0."""
        positive = np.maximum(features, 0)
        part = (positive * largest).sum(axis=1, keepdims=True)
        return np.divide(positive.sum(axis=1, keepdims=True), part, out=np.ones_like(part), where=part > 0)


@dataclass
class ASH(Scale):
    """Shape: all but the largest values of a feature are 0 (Djurisic et al., arXiv 2209.09858).

    Args:
        percentile: share of the values, in per cent, that become 0; 0 to 95.
        variant: `b`: the others become sum of all / their number, as in OpenOOD's tables; `s`: they are multiplied
            with exp(sum of all / sum of theirs).
    """

    percentile: float = 90.0
    variant: str = "b"

    NAME: ClassVar[str] = "ash"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("b", "s"):
            raise ValueError(f"variant: expected b or s, got {self.variant!r}")

    def _shape(self, features: np.ndarray) -> np.ndarray:
        largest = self._largest(features)
        if self.variant == "s":
            return features * largest * np.exp(self._excess(features, largest))
        return largest * np.maximum(features, 0).sum(axis=1, keepdims=True) / largest.sum(axis=1, keepdims=True)
