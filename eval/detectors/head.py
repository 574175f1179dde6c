"""A linear classifier's logits, for the detectors that combine them with distances."""

from typing import ClassVar

import numpy as np
import torch

from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.detectors.base import Detector, Head
from gradmix.eval.features.arrays import to_numpy


def check_head(head: Head, classes: int, width: int) -> np.ndarray:
    """`(weight [K, F], bias [K])` as one float64 array `[K, F + 1]`, bias last; ValueError if it isn't."""
    arrays = [to_numpy(part) if isinstance(part, torch.Tensor) else part for part in head]
    weight, bias = (np.asarray(part, np.float64) for part in arrays)
    if weight.shape != (classes, width):
        raise ValueError(f"head: expected a weight of shape {(classes, width)}, got {weight.shape}")
    if bias.shape != (classes,):
        raise ValueError(f"head: expected a bias of shape {(classes,)}, got {bias.shape}")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ValueError("head: non-finite values")
    return np.concatenate([weight, bias[:, None]], axis=1)


def logits(head: np.ndarray, features: np.ndarray) -> np.ndarray:
    """`[N, K]` in float64."""
    return features @ head[:, :-1].T + head[:, -1]


def logsumexp(values: np.ndarray) -> np.ndarray:
    """log of the sum of exponentials along the last axis: the (negative) energy of logits."""
    largest = values.max(axis=-1, keepdims=True)
    return np.log(np.exp(values - largest).sum(axis=-1)) + largest[..., 0]


def fit_head(features: np.ndarray, positions: np.ndarray, classes: int) -> Head:
    """Weight and bias of a linear probe; of one class alone, zeros: the logit that a softmax ignores."""
    if classes == 1:
        return np.zeros((1, features.shape[1])), np.zeros(1)
    probe = LinearProbe().fit(features, positions)
    return probe.weight_, probe.bias_


class HeadDetector(Detector):
    """A detector that needs a linear head: the one that it is given, or a probe of its own."""

    TAKES_HEAD: ClassVar[bool] = True

    def _head(self, features: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """`[K, F + 1]`, see `check_head`."""
        head = self._given_head
        if head is None:
            head = fit_head(features, positions, self.class_count)
        return check_head(head, self.class_count, features.shape[1])
