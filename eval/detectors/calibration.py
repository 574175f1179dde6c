"""Thresholds and p-values from held-out known images: split conformal prediction (arXiv 2104.08279).

For an image of the same kind as the held-out ones the chance of a p-value of at most alpha is at most alpha, whatever
the network and the detector are. The chance is over the held-out images too: a single calibration with n of them has a
false alarm rate of its own, which varies around the promised one by about sqrt(accept * (1 - accept) / n).
"""

import math
from dataclasses import dataclass, field

import numpy as np

ROUNDING = 1e-9  # 0.55 * 100 is 55.00000000000001 in floating point
FEWEST = 5  # images that have a distribution to speak of
DRIFT = 0.01  # a p-value below it: these images as a whole are not like the held-out ones


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out known images, and the share of known images to accept.

    Args:
        scores: of the detector, `[n]`.
        positions: of the class that each held-out image looks most like, `[n]`, below `classes`; None without classes.
        classes: K.
        accept: share of known images to accept, in (0, 1].
        per_class: give a class a threshold of its own where at least `needed(accept)` held-out images look most like
            it (Mondrian). The other classes share one; where they have fewer together, the smallest of the former joins
            them. The promise then holds among the images that look like a class, or like one of those that share.
    """

    scores: np.ndarray
    positions: np.ndarray | None = None
    classes: int = 1
    accept: float = 0.95
    per_class: bool = False
    _pools: list[np.ndarray] = field(init=False, repr=False, compare=False)  # sorted scores that share a threshold
    _pool_of: np.ndarray = field(init=False, repr=False, compare=False)  # the number of each class's, [K]

    def __post_init__(self) -> None:
        if not 0 < self.accept <= 1:
            raise ValueError(f"accept: expected a share in (0, 1], got {self.accept}")
        pools, pool_of = [self.scores], np.zeros(self.classes, np.int64)
        if self.per_class:
            if self.positions is None:
                raise ValueError("per_class: there are no classes to have thresholds of their own")
            counts = np.bincount(self.positions, minlength=self.classes)
            own = counts >= needed(self.accept)
            if own.any() and not own.all() and counts[~own].sum() < needed(self.accept):
                own[np.where(own, counts, len(self.scores) + 1).argmin()] = False  # too few alone: the smallest joins
            others = self.scores[~own[self.positions]]
            pools = [others if len(others) else self.scores]  # nobody's, where all have their own
            pools += [self.scores[self.positions == position] for position in np.flatnonzero(own)]
            pool_of[own] = np.arange(1, len(pools))
        object.__setattr__(self, "_pools", [np.sort(pool) for pool in pools])
        object.__setattr__(self, "_pool_of", pool_of)

    @classmethod
    def read(
        cls, scores: np.ndarray, positions: np.ndarray | None, classes: int, accept: float | None, per_class: bool
    ) -> "Calibration":
        """What a saved detector says of its held-out images.

        Raises:
            ValueError: it makes no sense.
        """
        if accept is None:
            raise ValueError("accept: missing")
        if scores.dtype.kind != "f" or scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise ValueError("held_out_scores: expected [n] finite numbers")
        if positions is not None:
            if positions.dtype.kind != "i" or positions.shape != scores.shape:
                raise ValueError(f"held_out_positions: expected [{len(scores)}] whole numbers")
            if positions.min() < 0 or positions.max() >= classes:
                raise ValueError(f"held_out_positions: expected 0 to {classes - 1}")
        return cls(scores, positions, classes, accept, per_class)

    @property
    def threshold(self) -> float:
        """Of all classes together; with n + 1 for n: the image to come counts too."""
        return _threshold(np.sort(self.scores), self.accept)

    @property
    def enough(self) -> bool:
        """Whether there are enough held-out images to promise `accept`; else the largest score is the threshold."""
        return len(self.scores) >= needed(self.accept)

    @property
    def own_thresholds(self) -> int:
        """How many classes have a threshold of their own."""
        return len(self._pools) - 1

    def thresholds(self, positions: np.ndarray | None, count: int) -> np.ndarray:
        """Of each of `count` images, `[N]` float64, by the class that it looks most like."""
        limits = np.array([_threshold(pool, self.accept) for pool in self._pools])
        return limits[self._pool(positions, count)]

    def p_values(self, scores: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
        """Share of known images that would score as high or higher, `[N]`: (1 + held-out ones that do) / (n + 1)."""
        pool_of, values = self._pool(positions, len(scores)), np.empty(len(scores))
        for number, pool in enumerate(self._pools):
            rows = pool_of == number
            higher = len(pool) - np.searchsorted(pool, scores[rows], side="left")
            values[rows] = (1 + higher) / (len(pool) + 1)
        return values

    def _pool(self, positions: np.ndarray | None, count: int) -> np.ndarray:
        return self._pool_of[np.zeros(count, np.int64) if positions is None else positions]


def needed(accept: float) -> float:
    """How many held-out images it takes to promise that this share is accepted; 19 for 0.95, 99 for 0.99."""
    return math.ceil(accept / (1 - accept) - ROUNDING) if accept < 1 else math.inf


def discoveries(p_values: np.ndarray, rate: float) -> float:
    """The p-value up to which images are called unknown so that, on average, at most a share `rate` of them is known.

    Benjamini and Hochberg (1995), which holds for conformal p-values (arXiv 2104.08279). 0 where there are none.
    """
    ordered = np.sort(p_values)
    below = ordered <= rate * np.arange(1, len(ordered) + 1) / max(len(ordered), 1) + ROUNDING * rate
    return float(ordered[below][-1]) if below.any() else 0.0


def drift(held_out: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """How far apart two sets of scores are (0 to 1, Kolmogorov and Smirnov's distance), and the p-value of that.

    It is the same for scores and for their p-values, which have the same order.
    """
    from scipy.stats import ks_2samp  # only here: scoring starts without it

    result = ks_2samp(held_out, scores)
    return float(result.statistic), float(result.pvalue)


def _threshold(ordered: np.ndarray, accept: float) -> float:
    rank = max(1, math.ceil((len(ordered) + 1) * accept - ROUNDING))
    return float(ordered[min(rank, len(ordered)) - 1])
