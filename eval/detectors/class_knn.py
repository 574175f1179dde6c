"""Class-wise nearest neighbours, normalised over classes: the score of the GradMix paper (arXiv
2505.12803)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors.base import Detector
from gradmix.eval.features.arrays import check_k, unit_rows
from gradmix.eval.features.search import inner_product

SMALLEST_SUM = 1e-6


@dataclass
class ClassKNN(Detector):
    """Score: minus the largest share that a class has in the similarities.

    A class's similarity is the sum of the k largest cosine similarities to its training features (a class
    with fewer, n, sums them all and counts them k / n times); its share is that, divided by the sum over
    classes. The class is the one with the largest share. Search is exact, within each class.

    The sum over classes is taken as at least 1e-6: where negative similarities outweigh the positive ones, an
    image that resembles some class stays known and one that resembles none scores above 0. A feature of zero
    norm scores 0.

    Args:
        k: neighbours per class.
    """

    k: int = 3

    NAME: ClassVar[str] = "class_knn"
    ARRAYS: ClassVar[Mapping[str, str]] = {"rows_": "unit rows width", "starts_": "starts:rows classes+1"}

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        check_k(self.k, len(features))
        order = np.argsort(positions, kind="stable")  # each class in one piece
        self.rows_ = unit_rows(features[order])
        self.starts_ = np.searchsorted(positions[order], np.arange(self.class_count + 1))

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        queries = unit_rows(features)
        similarity = np.empty((len(queries), self.class_count))
        for position in range(self.class_count):
            rows = self.rows_[self.starts_[position] : self.starts_[position + 1]]
            k = min(self.k, len(rows))
            top, _ = inner_product(queries, rows, k)
            similarity[:, position] = top.sum(axis=1, dtype=np.float64) * self.k / k
        total = np.maximum(similarity.sum(axis=1), SMALLEST_SUM)
        return -similarity.max(axis=1) / total, similarity.argmax(axis=1)
