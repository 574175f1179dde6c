"""How well scores tell unknown from known images. Unknown is positive; higher scores mean more unknown.

Every function takes numpy arrays, tensors or lists, computes in float64 and returns a Python float. Ties are
counted exactly: a pair of equal scores is half right. Empty or non-finite scores are a ValueError that names
the argument.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from gradmix.eval.features.arrays import to_numpy

Scores = np.ndarray | torch.Tensor | Sequence[float]
Rows = slice | np.ndarray
Evaluate = Callable[..., float]  # of (known_rows, unknown_rows), by default of all rows


def auroc(known_scores: Scores, unknown_scores: Scores) -> float:
    """Probability that an unknown image scores above a known one, ties half."""
    return _pairs(*_scores(known_scores, unknown_scores))()


def aupr(known_scores: Scores, unknown_scores: Scores, positive: str = "unknown") -> float:
    """Average precision (area under precision-recall in steps, as scikit-learn's) of one side.

    Args:
        positive: "unknown" finds unknown images by high scores, "known" finds known images by low ones. The
            value of random scores is the positive side's share of the images.
    """
    known, unknown = _scores(known_scores, unknown_scores)
    _check_side(positive)
    target = np.r_[np.zeros(len(known)), np.ones(len(unknown))]
    scores = np.r_[known, unknown]
    if positive == "known":
        target, scores = 1 - target, -scores
    return float(average_precision_score(target, scores))


def fpr_at_tpr(known_scores: Scores, unknown_scores: Scores, tpr: float = 0.95, positive: str = "unknown") -> float:
    """False-positive rate where at least `tpr` of the positive side is found. Both conventions of the field:

    positive="unknown": the share of known images rejected at the highest threshold that detects `tpr` of the
        unknown ones.
    positive="known": the share of unknown images accepted at the lowest threshold that accepts `tpr` of the
        known ones.

    Papers call either one FPR95. ODIN (arXiv 1706.02690) and the energy score (arXiv 2010.03759) take the known images
    as positive; OpenOOD since August 2023 and pytorch-ood take the unknown ones, as the default here.

    An image whose score equals the threshold counts as positive.

    Raises:
        ValueError: empty or non-finite scores, an unknown side, or a ``tpr`` that is no share.
    """
    known, unknown = _scores(known_scores, unknown_scores)
    _check_side(positive)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr: expected a share in (0, 1], got {tpr}")
    if positive == "known":
        return float((unknown <= threshold_for(known, tpr)).mean())
    return float((-known <= threshold_for(-unknown, tpr)).mean())


def oscr(known_scores: Scores, unknown_scores: Scores, correct: Scores) -> float:
    """Area under the open-set classification rate curve (Dhamija et al., arXiv 1811.04110).

    The share of known images that are accepted and correctly classified, against the share of unknown images
    accepted, over all thresholds: the probability that a known image is correctly classified and scores below
    an unknown one, ties half. At most the closed-set accuracy.

    Args:
        correct: `[N_known]` booleans, whether the closed-set class of each known image is right.

    Raises:
        ValueError: empty or non-finite scores, or other than one boolean for each known image.
    """
    return _pairs(*_scores(known_scores, unknown_scores), _array(correct))()


def closed_set_accuracy(predicted: Scores, labels: Scores) -> float:
    """Share of known images whose closest known class is their own.

    Raises:
        ValueError: no labels, or another number of predictions.
    """
    predicted, labels = _array(predicted), _array(labels)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels: expected [N], got shape {labels.shape}")
    if predicted.shape != labels.shape:
        raise ValueError(f"predicted: expected shape {labels.shape} as labels have, got {predicted.shape}")
    return float((predicted == labels).mean())


def class_recalls(predicted: Scores, labels: Scores) -> dict[int, float]:
    """By class, in order, the share of its images whose class is right; scikit-learn's `recall_score(average=None)`.

    Args:
        predicted, labels: class indices, `[N]`. Classes without an image have no recall and are left out.
    """
    closed_set_accuracy(predicted, labels)  # checks
    predicted, labels = _array(predicted), _array(labels)
    return {int(label): float((predicted[labels == label] == label).mean()) for label in np.unique(labels)}


def mean_recall(recalls: dict[int, float]) -> float:
    """Mean of the recalls that :func:`class_recalls` gives: scikit-learn's `balanced_accuracy_score`."""
    return float(np.mean(list(recalls.values())))


def balanced_accuracy(known_scores: Scores, unknown_scores: Scores, threshold: float) -> float:
    """Mean of the shares of known images at or below the threshold and of unknown images above it."""
    known, unknown = _scores(known_scores, unknown_scores)
    return float(((known <= threshold).mean() + (unknown > threshold).mean()) / 2)


class Interval(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    metric: Callable[..., float],
    known_scores: Scores,
    unknown_scores: Scores,
    *correct: Scores,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of `metric(known_scores, unknown_scores, *correct)`.

    Known and unknown images are drawn with replacement, separately.

    Args:
        metric: one of this module's functions, or any that takes the same arrays.
        correct: with `oscr`, its third argument.
    """
    run = _run((known_scores, unknown_scores, *correct))
    return _interval(_evaluator(metric, run), run, samples, level, seed)


def paired_bootstrap(
    metric: Callable[..., float],
    first: Sequence[Scores],
    second: Sequence[Scores],
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of `metric(second) - metric(first)` for two runs on the same images in the same order.

    Args:
        first, second: `(known_scores, unknown_scores)`, with `oscr` `(known_scores, unknown_scores,
            correct)`. A drawn image is drawn for both, so what makes images easy or hard cancels out.

    Raises:
        ValueError: bad scores, or runs of different numbers of images.
    """
    ours, theirs = _run(first), _run(second)
    for name, one, other in zip(("known_scores", "unknown_scores"), ours, theirs, strict=False):
        if len(one) != len(other):
            raise ValueError(f"{name}: {len(one)} in the first run, {len(other)} in the second")

    before, after = _evaluator(metric, ours), _evaluator(metric, theirs)
    return _interval(lambda *rows: after(*rows) - before(*rows), ours, samples, level, seed)


def threshold_for(scores: np.ndarray, share: float) -> np.floating:
    """The lowest score such that at least `share` of `scores` are at or below it."""
    # the guard: 0.55 * 100 is 55.00000000000001 in floating point
    wanted = max(1, int(np.ceil(share * len(scores) - 1e-9)))
    return np.partition(scores, wanted - 1)[wanted - 1]


def _scores(known_scores: Scores, unknown_scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    known = _array(known_scores)
    unknown = _array(unknown_scores)
    for name, scores in (("known_scores", known), ("unknown_scores", unknown)):
        if scores.ndim != 1:
            raise ValueError(f"{name}: expected [N], got shape {scores.shape}")
        if len(scores) == 0:
            raise ValueError(f"{name}: empty")
        bad = ~np.isfinite(scores)
        if bad.any():
            raise ValueError(f"{name}: {bad.sum()} non-finite, first at {bad.argmax()}")
    return known.astype(np.float64), unknown.astype(np.float64)


def _array(values: Scores) -> np.ndarray:
    return to_numpy(values) if isinstance(values, torch.Tensor) else np.asarray(values)


def _pairs(known: np.ndarray, unknown: np.ndarray, correct: np.ndarray | None = None) -> Evaluate:
    """Share of pairs in which the known score is below the unknown one, and its image correct; ties half.

    Scores are ranked once. However many rows are drawn, they are counted by rank, and nothing is sorted again.
    """
    values, ranks = np.unique(np.r_[known, unknown], return_inverse=True)
    ours, theirs = np.split(ranks, [len(known)])
    if correct is not None:
        if correct.shape != known.shape or not np.isin(correct, (0, 1)).all():
            got = f"{correct.dtype} of shape {correct.shape}"
            raise ValueError(f"correct: expected {len(known)} booleans, got {got}")
        ours = np.where(correct, ours, len(values))  # above all

    def evaluate(known_rows: Rows = slice(None), unknown_rows: Rows = slice(None)) -> float:
        equal = np.bincount(ours[known_rows], minlength=len(values) + 1)[:-1]
        counts = np.bincount(theirs[unknown_rows], minlength=len(values))
        twice = counts @ (2 * equal.cumsum() - equal)  # 2 * those below + those equal
        return float(twice / (2 * len(known) * len(unknown)))

    return evaluate


def _check_side(positive: str) -> None:
    if positive not in ("unknown", "known"):
        raise ValueError(f"positive: expected unknown or known, got {positive!r}")


def _run(arrays: Sequence[Scores]) -> tuple[np.ndarray, ...]:
    known_scores, unknown_scores, *correct = arrays
    return *_scores(known_scores, unknown_scores), *(_array(part) for part in correct)


def _evaluator(metric: Callable[..., float], run: tuple[np.ndarray, ...]) -> Evaluate:
    """The metric of some rows of a run, by default of all."""
    known, unknown, *correct = run
    if (metric, len(correct)) in ((auroc, 0), (oscr, 1)):
        return _pairs(*run)

    def evaluate(known_rows: Rows = slice(None), unknown_rows: Rows = slice(None)) -> float:
        return metric(known[known_rows], unknown[unknown_rows], *(part[known_rows] for part in correct))

    return evaluate


def _interval(evaluate: Evaluate, run: tuple[np.ndarray, ...], samples: int, level: float, seed: int) -> Interval:
    """Of `evaluate`; `run` says how many rows there are."""
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a share in (0, 1), got {level}")
    value = evaluate()
    generator = np.random.default_rng(seed)
    draws = (tuple(generator.integers(len(side), size=len(side)) for side in run[:2]) for _ in range(samples))
    values = [evaluate(*rows) for rows in draws]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))
