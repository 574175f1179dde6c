"""Every detector that pytorch-ood has too: its own code on the same features and the same head."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import relu

from gradmix.eval import detectors as ours

theirs = pytest.importorskip("pytorch_ood.detector")

CLASSES = 6
IMAGES, LABELS = load_digits(return_X_y=True)
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(64, 48, generator=GENERATOR) / 8
FEATURES = relu(torch.from_numpy(IMAGES / 16).float() @ WEIGHT + 0.3)  # as a last layer leaves them
KNOWN = LABELS < CLASSES
TRAIN, TRAIN_LABELS = FEATURES[KNOWN][::2], torch.from_numpy(LABELS[KNOWN][::2])
QUERIES = torch.cat([FEATURES[KNOWN][1::2], FEATURES[~KNOWN]])
HEAD = torch.nn.Linear(48, CLASSES)
with torch.no_grad():
    means = torch.stack([TRAIN[TRAIN_LABELS == label].mean(dim=0) for label in range(CLASSES)])
    HEAD.weight[:] = 2 * (means - means.mean(dim=0))
    HEAD.bias[:] = torch.linspace(-0.5, 0.5, CLASSES) - (means**2 - means.mean(dim=0) ** 2).sum(dim=1)


def shaped(kind, **options):
    """Of those that take feature maps [N, F, 1, 1]: their scores of features [N, F]."""
    detector = kind(backbone=None, head=lambda maps: HEAD(maps.flatten(1)), **options)
    if hasattr(detector, "fit_feature_maps"):
        detector.fit_feature_maps(TRAIN[:, :, None, None], TRAIN_LABELS)
    return lambda queries: detector.predict_feature_maps(queries[:, :, None, None].clone())


def confident(detector):
    return lambda queries: detector.predict_logits(HEAD(queries))


def fitted(detector):
    return detector.fit_features(TRAIN, TRAIN_LABELS).predict_features


N = len(TRAIN)
# Ours; theirs, on features; and what theirs has to be multiplied with, where their scale is another one.
PAIRS = [
    (ours.MSP(), lambda: lambda queries: 1 + confident(theirs.MaxSoftmax(None))(queries), 1),
    (ours.MaxLogit(), lambda: confident(theirs.MaxLogit(None)), 1),
    (ours.Energy(), lambda: confident(theirs.EnergyBased(None)), 1),
    (ours.Energy(2.5), lambda: confident(theirs.EnergyBased(None, t=2.5)), 1),
    (ours.GEN(), lambda: confident(theirs.GEN(None)), CLASSES),  # their mean is our sum
    (ours.GEN(0.3, 3), lambda: confident(theirs.GEN(None, gamma=0.3, M=3)), 3),
    (ours.ReAct(85.0), lambda: shaped(theirs.ReAct, percentile=0.85), 1),
    (ours.ASH(65.0), lambda: shaped(theirs.ASH, variant="ash-b", percentile=0.65), 1),
    (ours.ASH(65.0, "s"), lambda: shaped(theirs.ASH, variant="ash-s", percentile=0.65), 1),
    (ours.Scale(85.0), lambda: shaped(theirs.SCALE, percentile=0.85), 1),
    (ours.DeepKNN(5), lambda: fitted(theirs.KNN(None, k=5)), 1),
    (ours.Mahalanobis(), lambda: fitted(theirs.Mahalanobis(None)), 2 * N),  # half of it, and a sum where we have a mean
    (ours.RelativeMahalanobis(), lambda: fitted(theirs.RMD(None)), N),
    (ours.ViM(20), lambda: fitted(theirs.ViM(None, d=20, w=HEAD.weight, b=HEAD.bias)), 1),
    (ours.NNGuide(10), lambda: fitted(theirs.NNGuide(None, head=HEAD, k=10)), 1),
    (ours.FDBD(), lambda: fitted(theirs.fDBD(None, head=HEAD)), 1),
    (ours.NCI(0.001), lambda: fitted(theirs.NCI(None, head=HEAD, alpha=0.001)), 1),
]


@pytest.mark.parametrize(("detector", "peer", "times"), PAIRS, ids=lambda value: getattr(value, "NAME", ""))
def test_scores_are_those_of_pytorch_ood(detector, peer, times):
    head = {"head": (HEAD.weight, HEAD.bias)} if "head_" in detector.ARRAYS else {}
    score = detector.fit(TRAIN, TRAIN_LABELS, **head).score(QUERIES).double()
    with torch.no_grad():
        expected = times * peer()(QUERIES).double()
    assert score.std() > 0
    np.testing.assert_allclose(score, expected, rtol=1e-3, atol=3e-4 * float(score.std()))
