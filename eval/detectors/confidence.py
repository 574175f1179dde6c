"""The field's baselines: how sure a linear classifier on the features is of its class. No distance enters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors.head import HeadDetector, logits, logsumexp


class Confidence(HeadDetector):
    """A detector that looks at the logits of a linear head alone. The class is the head's."""

    ARRAYS: ClassVar[Mapping[str, str]] = {"head_": "float classes width+1"}

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        self.head_ = self._head(features, positions)

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = logits(self.head_, features)
        return self._unsure(values), values.argmax(axis=1)

    def _unsure(self, values: np.ndarray) -> np.ndarray:
        """Scores `[N]` of float64 logits `[N, K]`."""
        raise NotImplementedError


@dataclass
class MSP(Confidence):
    """Score: 1 less the largest softmax probability (Hendrycks and Gimpel, arXiv 1610.02136).

    Summed from the other probabilities, so that an image that the head is very sure of has digits left.
    """

    NAME: ClassVar[str] = "msp"

    def _unsure(self, values: np.ndarray) -> np.ndarray:
        return shares_and_rests(values)[1][:, 0]


@dataclass
class MaxLogit(Confidence):
    """Score: minus the largest logit (Hendrycks et al., arXiv 1911.11132)."""

    NAME: ClassVar[str] = "max_logit"

    def _unsure(self, values: np.ndarray) -> np.ndarray:
        return -values.max(axis=1)


@dataclass
class Energy(Confidence):
    """Score: -T logsumexp(logits / T) (Liu et al., arXiv 2010.03759).

    Args:
        temperature: T.
    """

    temperature: float = 1.0

    NAME: ClassVar[str] = "energy"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")

    def _unsure(self, values: np.ndarray) -> np.ndarray:
        return -self.temperature * logsumexp(values / self.temperature)


@dataclass
class GEN(Confidence):
    """Score: generalized entropy, the sum of (p (1 - p))^gamma over the largest probabilities (Liu et al., CVPR 2023).

    Args:
        gamma: in (0, 1); small ones look at the small probabilities too.
        largest: how many probabilities count; all, where there are fewer classes.
    """

    gamma: float = 0.1
    largest: int = 100

    NAME: ClassVar[str] = "gen"

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma: expected a number in (0, 1), got {self.gamma}")
        if self.largest < 1:
            raise ValueError(f"largest: expected at least 1, got {self.largest}")

    def _unsure(self, values: np.ndarray) -> np.ndarray:
        shares, rests = shares_and_rests(values)
        return ((shares * rests) ** self.gamma)[:, : self.largest].sum(axis=1)


def shares_and_rests(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax probabilities p of logits `[N, K]`, the largest first, and 1 - p with all its digits near p = 1."""
    shares = -np.sort(-np.exp(values - logsumexp(values)[:, None]), axis=1)
    rests = (1 - shares).clip(0)
    rests[:, 0] = shares[:, 1:].sum(axis=1)
    return shares, rests
