"""How far a feature moves when it is replaced by the mean of its nearest training features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.classifiers.knn import VOTE_TEMPERATURE, vote
from gradmix.eval.detectors.base import Detector
from gradmix.eval.features.arrays import check_k, unit_rows
from gradmix.eval.features.search import Neighbours


@dataclass
class MeanShift(Detector):
    """Score: Euclidean distance of the L2-normalised feature to the mean of its k nearest training features.

    That is the length of one mean-shift step (Cheng, 1995): short where the feature lies inside a cloud of
    training features, long beside one. The mean is not normalised again. A feature of zero norm moves by the
    length of the mean of k arbitrary rows. The class is the vote of the k neighbours as in `DeepKNN`.

    Args:
        k: neighbours that are averaged.
        index: how to search, see `gradmix.eval.features.search.Neighbours`.
    """

    k: int = 10
    index: str = "auto"

    NAME: ClassVar[str] = "mean_shift"
    ARRAYS: ClassVar[Mapping[str, str]] = {"bank_": "unit rows width", "positions_": "class rows"}
    NEEDS_LABELS: ClassVar[bool] = False

    def _fit(self, features: np.ndarray, positions: np.ndarray | None) -> None:
        check_k(self.k, len(features))
        self.bank_, self.positions_ = Neighbours(features, self.index), positions

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        similarity, rows = self.bank_.search(features, self.k)
        # one column at a time: [N, k, F] would be k times a block
        mean = sum(self.bank_[rows[:, column]].astype(np.float64) for column in range(self.k)) / self.k
        shift = np.linalg.norm(unit_rows(features) - mean, axis=1)
        if self.positions_ is None:
            return shift, None
        return shift, vote(similarity, self.positions_[rows], self.class_count, VOTE_TEMPERATURE).argmax(axis=1)
