"""Distance to the k-th nearest training feature (Sun et al., arXiv 2204.06507)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.classifiers.knn import VOTE_TEMPERATURE, vote
from gradmix.eval.detectors.base import Assessed, Detector
from gradmix.eval.features.arrays import Array, check_features, check_k, like, unit_rows
from gradmix.eval.features.search import Neighbours


@dataclass
class DeepKNN(Detector):
    """Score: Euclidean distance (not squared, 0 to 2) of the L2-normalised feature to its k-th neighbour.

    A feature of zero norm is at distance 1 from every other. The class is the vote of the k neighbours with
    weight exp(cosine / VOTE_TEMPERATURE), the smallest label on a tie. Needs labels only for `classify`.

    Args:
        k: which neighbour.
        index: how to search, see `gradmix.eval.features.search.Neighbours`.
    """

    k: int = 5
    index: str = "auto"

    NAME: ClassVar[str] = "deep_knn"
    ARRAYS: ClassVar[Mapping[str, str]] = {"bank_": "unit rows width", "positions_": "class rows"}
    NEEDS_LABELS: ClassVar[bool] = False

    def neighbours(self, features: Array, k: int = 1) -> tuple[Array, Array]:
        """Cosines `[N, k]`, descending, and row numbers `[N, k]` of the nearest training features."""
        queries = check_features("features", features, width=self.width_)
        similarity, rows = self.bank_.search(queries, k)
        return like(similarity, features), like(rows, features)

    def _fit(self, features: np.ndarray, positions: np.ndarray | None) -> None:
        check_k(self.k, len(features))
        self.bank_, self.positions_ = Neighbours(features, self.index), positions

    def _assess(self, features: np.ndarray) -> Assessed:
        similarity, rows = self.bank_.search(features, self.k)
        # 2 - 2 cos cancels for near duplicates, so the one distance that matters is computed from the rows
        distance = np.linalg.norm(unit_rows(features) - self.bank_[rows[:, -1]], axis=1)
        if self.positions_ is None:
            return Assessed(distance, None, rows[:, 0])
        position = vote(similarity, self.positions_[rows], self.class_count, VOTE_TEMPERATURE).argmax(axis=1)
        return Assessed(distance, position, rows[:, 0])
