"""Against loops written from the papers' definitions, and closed forms."""

import numpy as np
import pytest

from gradmix.eval.quality import alignment, class_spread, effective_rank, uniformity


def features(n=40, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width))


def unit(row):
    return row / np.sqrt((row**2).sum())


def test_alignment_is_the_mean_squared_distance():
    first, second = features(), features(seed=1)
    expected = np.mean([((unit(a) - unit(b)) ** 2).sum() for a, b in zip(first, second, strict=True)])
    assert alignment(first, second) == pytest.approx(expected, abs=1e-6)
    assert alignment(first, 3 * first) == pytest.approx(0, abs=1e-9) and alignment(first, -first) == pytest.approx(4)
    with pytest.raises(ValueError, match="second: expected 40 features, got 39"):
        alignment(first, second[1:])


def test_uniformity_is_the_gaussian_potential_of_all_pairs():
    rows = features()
    pairs = [np.exp(-2 * ((unit(a) - unit(b)) ** 2).sum()) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    assert uniformity(rows) == pytest.approx(np.log(np.mean(pairs)), abs=1e-6)
    assert uniformity(np.ones((5, 3))) == pytest.approx(0, abs=1e-6)  # all in one place
    assert uniformity(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    assert uniformity(features(3000), most=1500) == pytest.approx(uniformity(features(3000)), abs=0.02)


def test_effective_rank_is_that_of_the_singular_values():
    rows = features() * [3, 2, 1, 1, 0.1, 0]
    share = np.linalg.svd(rows, compute_uv=False)
    share = share[share > 0] / share.sum()
    assert effective_rank(rows) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.outer(np.ones(9), np.arange(1, 5))) == pytest.approx(1, abs=1e-4)
    assert effective_rank(np.zeros((4, 3))) == 1


def test_effective_rank_of_few_wide_rows(monkeypatch):
    """As of their transpose, which has the same singular values; no [F, F] array is decomposed."""
    rows = features(12, 900) * np.geomspace(1, 1e-6, 12)[:, None]
    expected = effective_rank(rows.T.copy())
    monkeypatch.setattr(np.linalg, "eigvalsh", None)
    assert effective_rank(rows) == pytest.approx(expected, rel=1e-3)
    assert effective_rank(np.eye(3, 50)) == pytest.approx(3)
    assert effective_rank(np.zeros((2, 3))) == 1


def test_class_spread_is_nc1():
    rows, labels = features(60, 4), np.repeat([3, 5, 9], 20)  # labels with gaps
    rows[labels == 5] += 4
    rows[labels == 9] -= [3, 0, 2, 0]
    means = {label: rows[labels == label].mean(axis=0) for label in (3, 5, 9)}
    within = sum(np.outer(r - means[c], r - means[c]) for r, c in zip(rows, labels, strict=True)) / 60
    middle = np.mean(list(means.values()), axis=0)
    between = sum(np.outer(m - middle, m - middle) for m in means.values()) / 3
    assert class_spread(rows, labels) == pytest.approx(np.trace(within @ np.linalg.pinv(between)) / 3)
    wide, rank = features(60, 300) + 3 * features(3, 300, seed=1)[np.repeat([0, 1, 2], 20)], 2  # most have no spread
    means = np.array([wide[labels == label].mean(axis=0) for label in (3, 5, 9)])
    values, vectors = np.linalg.eigh((means - means.mean(axis=0)).T @ (means - means.mean(axis=0)) / 3)
    deviation = (wide - np.repeat(means, 20, axis=0)) @ vectors[:, -rank:]
    assert class_spread(wide, labels) == pytest.approx((deviation**2 / values[-rank:]).sum() / 60 / 3)
    points = np.eye(3)[np.repeat([0, 1, 2], 4)]
    assert class_spread(points, np.repeat([0, 1, 2], 4)) == pytest.approx(0, abs=1e-12)
    assert class_spread(0.5 * rows + 7, labels) == pytest.approx(class_spread(rows, labels))  # no unit, no origin
    with pytest.raises(ValueError, match="class_spread needs two classes, got only 3"):
        class_spread(rows[:20], labels[:20])


def test_class_spread_of_a_collapsed_network_is_not_zero():
    labels = np.repeat([0, 1, 2], 20)
    cloud = features(20, 4)
    assert class_spread(np.tile(cloud, (3, 1)), labels) == np.inf  # the means coincide, the classes are spread
    assert (
        class_spread(np.tile(cloud - cloud.mean(axis=0), (3, 1)), labels) == np.inf
    )  # at the origin, where they are 0
    assert class_spread(np.full((60, 4), 0.1, np.float32), labels) == np.inf  # one point
    assert class_spread(np.zeros((60, 4)), labels) == np.inf
    # nearly: two classes d apart around the mean, spread s along the same line, have NC1 (s / (d / 2))^2 / 2
    near = np.zeros((40, 3))
    near[:, 0] = np.tile([-1.0, 1.0], 20) + np.repeat([0, 2e-4], 20) + 5
    assert class_spread(near, np.repeat([4, 7], 20)) == pytest.approx(1e8 / 2)
