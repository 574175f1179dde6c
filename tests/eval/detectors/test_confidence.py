"""Confidence of a head against slow formulas of the papers and scipy."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax

from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.detectors import GEN, MSP, Energy, MaxLogit, load

RNG = np.random.default_rng(0)
LABELS = np.array([2, 3, 7, 40])[np.arange(200) % 4]  # gaps on purpose
TRAIN = (RNG.normal(size=(200, 8)) + 3 * np.eye(8)[np.arange(200) % 4]).astype(np.float32)
QUERIES = np.concatenate([TRAIN[:20] + 0.1, RNG.normal(size=(30, 8)) * 3, np.zeros((1, 8))]).astype(np.float32)
HEAD = RNG.normal(size=(4, 8)), RNG.normal(size=4)


def slow_gen(row, gamma, largest):
    shares = sorted((math.exp(value - max(row)) for value in row), reverse=True)
    shares = [share / sum(shares) for share in shares]
    rests = [sum(shares[:i] + shares[i + 1 :]) for i in range(len(shares))]  # 1 - share has no digits left near 1
    return sum(share**gamma * rest**gamma for share, rest in list(zip(shares, rests, strict=True))[:largest])


SLOW = [
    (MSP(), lambda logits: np.sort(softmax(logits, axis=1), axis=1)[:, :-1].sum(axis=1)),
    (MaxLogit(), lambda logits: -logits.max(axis=1)),
    (Energy(), lambda logits: -logsumexp(logits, axis=1)),
    (Energy(2.5), lambda logits: -2.5 * logsumexp(logits / 2.5, axis=1)),
    (GEN(), lambda logits: np.array([slow_gen(row, 0.1, 100) for row in logits])),
    (GEN(0.4, 2), lambda logits: np.array([slow_gen(row, 0.4, 2) for row in logits])),
]


@cache
def probe_head():
    probe = LinearProbe().fit(TRAIN, np.arange(200) % 4)
    return np.asarray(probe.weight_, np.float64), np.asarray(probe.bias_, np.float64)


@pytest.mark.parametrize(("detector", "slow"), SLOW)
@pytest.mark.parametrize("own", [True, False])
def test_scores_and_classes(detector, slow, own, tmp_path):
    """With a head of one's own, and with the probe that is fitted otherwise."""
    detector.fit(TRAIN, LABELS, head=HEAD if own else None)
    weight, bias = HEAD
    if not own:
        weight, bias = probe_head()
    logits = QUERIES.astype(np.float64) @ weight.T + bias
    np.testing.assert_allclose(detector.score(QUERIES), slow(logits), rtol=1e-5)
    assert detector.classify(torch.from_numpy(QUERIES)).tolist() == np.unique(LABELS)[logits.argmax(axis=1)].tolist()
    detector.save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).score(QUERIES), detector.score(QUERIES))


def test_bad_parameters():
    for make, message in (
        (lambda: Energy(0.0), "temperature: expected a number above 0, got 0"),
        (lambda: GEN(1.5), r"gamma: expected a number in \(0, 1\), got 1.5"),
        (lambda: GEN(largest=0), "largest: expected at least 1, got 0"),
        (lambda: MSP().fit(TRAIN, LABELS, head=(HEAD[0][:3], HEAD[1])), r"head: expected a weight of shape \(4, 8\)"),
        (lambda: MSP().fit(TRAIN), "labels: MSP needs them"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
