"""Nearest-neighbour guidance of a classifier's confidence (Park et al., arXiv 2309.14888)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors.head import HeadDetector, logits, logsumexp
from gradmix.eval.features.arrays import blocks, check_k
from gradmix.eval.features.search import Neighbours


@dataclass
class NNGuide(HeadDetector):
    """Score: minus energy(x) times the guidance of x.

    The energy is the logsumexp of a linear head's logits; the guidance is the mean of the k largest values of
    energy(t) * cosine(x, t) over the training features t, all of them. The class is the head's. With a head
    of one's own an energy can be negative, and the product then means little, as in the paper; the probe
    fitted here has logits that sum to zero, so that its energies are positive.

    Args:
        k: neighbours that guide.
        index: how to search, see `gradmix.eval.features.search.Neighbours`.
    """

    k: int = 10
    index: str = "auto"

    NAME: ClassVar[str] = "nnguide"
    ARRAYS: ClassVar[Mapping[str, str]] = {"bank_": "float rows width", "head_": "float classes width+1"}

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        check_k(self.k, len(features))
        self.head_ = self._head(features, positions)
        energy = [logsumexp(logits(self.head_, features[rows])) for rows in blocks(features.shape)]
        self.bank_ = Neighbours(features, self.index, weight=np.concatenate(energy))

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = logits(self.head_, features)
        guidance, _ = self.bank_.search(features, self.k)
        return -logsumexp(values) * guidance.mean(axis=1, dtype=np.float64), values.argmax(axis=1)
