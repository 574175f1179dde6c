"""Linear probes on a few labelled images: 1 %, 10 %, or n of each class, in fixed subsets."""

from contextlib import suppress

import numpy as np
import torch

from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.features.arrays import Array
from gradmix.eval.metrics import closed_set_accuracy

SEEDS = 5


def subset(labels: Array, amount: str | int, seed: int) -> np.ndarray:
    """Rows of a subset, `[M]` int64, ascending: a function of the labels, the amount and the seed alone.

    Args:
        labels: `[N]` integers.
        amount: images of each class, an integer; or a share of each class, such as "1%", at least one image.

    Raises ValueError for another amount, or one that a class does not have.
    """
    labels = np.asarray(labels)
    text, share, count = str(amount), 0.0, 0
    with suppress(ValueError):
        if text.endswith("%"):
            share = float(text[:-1]) / 100
        else:
            count = int(text)
    if not 0 < share <= 1 and count < 1:
        raise ValueError(f"few_labels: expected a share such as 1% or images per class such as 4, got {amount!r}")
    generator = np.random.default_rng([seed, 0xFE3])
    rows = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        wanted = count or max(1, round(share * len(members)))
        if wanted > len(members):
            raise ValueError(f"few_labels: {wanted} images of each class asked for, class {label} has {len(members)}")
        # the first of one shuffled order: larger subsets of the same seed contain the smaller ones
        rows.append(generator.permutation(members)[:wanted])
    return np.sort(np.concatenate(rows))


def few_labels(
    train: Array,
    labels: np.ndarray,
    test: Array,
    test_labels: Array,
    amount: str | int,
    seeds: int = SEEDS,
    device: str | torch.device | None = None,
) -> np.ndarray:
    """Accuracies `[seeds]` on test features of cached probes that saw a subset of the training features each."""
    accuracies = []
    for seed in range(seeds):
        rows = subset(labels, amount, seed)
        probe = LinearProbe(seed=seed, device=device).fit(train[rows], labels[rows])
        accuracies.append(closed_set_accuracy(probe.predict(test), test_labels))
    return np.array(accuracies)
