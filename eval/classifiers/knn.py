"""Weighted k-nearest-neighbour classification on frozen features (Wu et al., arXiv 1805.01978)."""

import numpy as np

from gradmix.eval.features.arrays import Array, blocks, check_features, check_k, check_labels, like
from gradmix.eval.features.search import Neighbours


class KNNClassifier:
    """Cosine neighbours vote for their class with weight exp(cosine / temperature).

    Several settings from one search, because the search is what costs:

        neighbours = classifier.neighbours(features, k=200)
        for k, temperature in settings:
            probabilities = classifier.vote(*neighbours, k=k, temperature=temperature)

    Args:
        k: neighbours that vote.
        temperature: small values let only the closest of them decide.
        index: how to search, see `gradmix.eval.features.search.Neighbours`.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07, index: str = "auto") -> None:
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        self.k, self.temperature, self.index = k, temperature, index

    def fit(self, features: Array, labels: Array) -> "KNNClassifier":
        """Keep training features `[N, F]` and integer labels `[N]`.

        Sets `classes_`: the labels that occur, sorted. Raises ValueError for bad arrays and for k > N.
        """
        features = check_features("features", features)
        labels = check_labels("labels", labels, len(features))
        check_k(self.k, len(features))
        self.classes_, self._positions = np.unique(labels, return_inverse=True)
        self._bank = Neighbours(features, self.index)
        return self

    def predict_proba(self, features: Array) -> Array:
        """Shares of the vote `[N, len(classes_)]` float32, columns in the order of `classes_`."""
        return like(self.vote(*self.neighbours(features)).astype(np.float32), features)

    def predict(self, features: Array) -> Array:
        """The class with the largest share of the vote, `[N]` int64; the smallest label on a tie."""
        return like(self.classes_[self.winners(*self.neighbours(features))], features)

    def neighbours(self, features: Array, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Numpy arrays `[N, k]`: cosines, descending, and the neighbours' positions in `classes_`."""
        features = check_features("features", features, width=self._bank.shape[1])
        similarity, rows = self._bank.search(features, self.k if k is None else k)
        return similarity, self._positions[rows]

    def vote(
        self, similarity: np.ndarray, positions: np.ndarray, k: int | None = None, temperature: float | None = None
    ) -> np.ndarray:
        """Shares of the vote `[N, len(classes_)]` float64 of the first k neighbours of a search."""
        k = self.k if k is None else k
        check_k(k, similarity.shape[1])
        temperature = self.temperature if temperature is None else temperature
        return vote(similarity[:, :k], positions[:, :k], len(self.classes_), temperature)

    def winners(
        self, similarity: np.ndarray, positions: np.ndarray, k: int | None = None, temperature: float | None = None
    ) -> np.ndarray:
        """Positions in `classes_` `[N]` of the largest share of `vote`, block by block; the first one on a tie."""
        parts = blocks((len(similarity), len(self.classes_)))
        return np.concatenate(
            [self.vote(similarity[rows], positions[rows], k, temperature).argmax(axis=1) for rows in parts]
        )


def vote(similarity: np.ndarray, positions: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Sum of exp(similarity / temperature) per class, divided by the sum over classes.

    Args:
        similarity: `[N, k]`, descending.
        positions: `[N, k]`, the class of each neighbour in 0..classes-1.

    Returns:
        `[N, classes]` float64, rows sum to 1.
    """
    # relative to the nearest neighbour: the same shares, and exp cannot overflow at a small temperature
    weight = np.exp((similarity.astype(np.float64) - similarity[:, :1]) / temperature)
    votes = np.zeros((len(similarity), classes))
    for column in range(similarity.shape[1]):
        votes[np.arange(len(votes)), positions[:, column]] += weight[:, column]
    return votes / weight.sum(axis=1, keepdims=True)
