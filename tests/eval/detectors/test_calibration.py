"""A threshold to answer for: p-values and thresholds against slow loops, and the promise over thousands of draws."""

import itertools
import math
from collections import defaultdict
from copy import deepcopy
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

from gradmix.eval.detectors import DETECTORS, DeepKNN, load
from gradmix.eval.detectors.calibration import Calibration, discoveries, drift, needed


def slow_p_value(held_out, score):
    return Fraction(1 + sum(bool(one >= score) for one in held_out), len(held_out) + 1)


@pytest.mark.parametrize("accept", ["0.5", "0.55", "0.9", "0.95", "0.99"])  # 0.55 * 100 is above 55
def test_p_values_and_thresholds_say_the_same_as_a_slow_loop(accept):
    rng, share = np.random.default_rng(0), Fraction(accept)
    for count in (1, 5, 18, 19, 20, 98, 99, 100, 137):
        for decimals in (9, 1):  # without ties, and with many
            held_out = rng.normal(size=count).round(decimals)
            scores = np.r_[rng.normal(size=50), held_out, held_out + 1].round(decimals)
            calibration = Calibration(held_out, accept=float(accept))
            slow = [slow_p_value(held_out, score) for score in scores]
            np.testing.assert_allclose(calibration.p_values(scores, None), [float(p) for p in slow], rtol=1e-15)
            flagged = scores > calibration.thresholds(None, len(scores))
            assert (calibration.thresholds(None, 2) == calibration.threshold).all()
            if calibration.enough:
                np.testing.assert_array_equal(flagged, [p <= 1 - share for p in slow])
            else:  # too few to promise so much
                np.testing.assert_array_equal(flagged, scores > held_out.max())
            assert calibration.enough == (math.ceil((count + 1) * share) <= count) == (count >= needed(float(accept)))


def test_how_many_images_it_takes():
    assert [needed(accept) for accept in (0.5, 0.9, 0.95, 0.99, 0.999, 1)] == [1, 9, 19, 99, 999, math.inf]


@pytest.mark.parametrize("accept", [0.95, 0.99])
def test_known_images_are_flagged_as_often_as_promised(accept):
    """Over 4,000 draws of held-out and new images. Of continuous scores the chance is known exactly."""
    rng, draws = np.random.default_rng(0), 4000
    for count in (needed(accept), needed(accept) + 1, 150):
        flagged = without = 0
        for _ in range(draws):
            *held_out, new = rng.standard_t(3, size=count + 1)
            flagged += new > Calibration(np.array(held_out), accept=accept).threshold
            without += new > np.sort(held_out)[math.ceil(accept * count - 1e-9) - 1]  # n instead of n + 1
        exact = 1 - math.ceil((count + 1) * accept - 1e-9) / (count + 1)
        assert exact <= 1 - accept + 1e-12
        low, high = stats.binom.interval(1 - 1e-5, draws, exact)
        assert low <= flagged <= high, (count, flagged / draws)
        if count == needed(accept) + 1:  # where the n + 1 makes the most of a difference
            assert without > stats.binom.ppf(0.999, draws, 1 - accept) >= flagged


def test_per_class_the_promise_holds_in_every_class():
    """Two classes of very unequal spread, and two too small for a threshold of their own: 2,000 draws."""
    rng, draws, accept = np.random.default_rng(0), 2000, 0.9
    spread, share = np.array([1.0, 6.0, 2.0, 2.0]), [0.5, 0.36, 0.07, 0.07]
    wrong = {False: np.zeros(4), True: np.zeros(4)}
    for _ in range(draws):
        positions = rng.choice(4, 120, p=share)
        scores = rng.normal(size=120) * spread[positions]
        new = np.arange(4)
        new_scores = rng.normal(size=4) * spread
        for per_class in wrong:
            calibration = Calibration(scores, positions, 4, accept, per_class)
            flagged = new_scores > calibration.thresholds(new, 4)
            np.testing.assert_array_equal(flagged, calibration.p_values(new_scores, new) <= 1 - accept + 1e-12)
            wrong[per_class] += flagged
    high = stats.binom.ppf(1 - 1e-5, draws, 1 - accept)
    assert (wrong[True] <= high).all(), wrong[True] / draws
    assert wrong[False][1] > 1.5 * high  # one threshold for all flags the wide class far too often


def test_known_digits_are_flagged_as_often_as_promised_over_a_thousand_splits():
    """DeepKNN on the pixels of real images, cut at random into images to fit, held out and to test. Of m test images
    that are compared with n held-out ones, the flagged ones are beta-binomial, whatever the images and the scores.
    """
    images, labels = load_digits(return_X_y=True)
    images, labels = images[labels < 4], labels[labels < 4]
    rng, seen = np.random.default_rng(0), defaultdict(list)
    for _ in range(1000):
        fit, held_out, test = np.split(rng.permutation(len(images)), [80, 580])
        detector = DeepKNN().fit(images[fit], labels[fit]).calibrate(images[held_out])
        score, closest, *_ = detector.judge(images[test])
        looks_like = detector.calibration_.positions
        for share, per_class in itertools.product((0.95, 0.99), (False, True)):
            flagged = score > detector.accept(share, per_class).calibration_.thresholds(closest, len(test))
            for group in range(4) if per_class else [slice(None)]:
                rows, n = (closest == group, sum(looks_like == group)) if per_class else (group, len(held_out))
                assert n >= needed(share)  # so that every class has a threshold of its own
                seen[share, str(group)].append((n, len(flagged[rows]), flagged[rows].sum(), flagged[rows][0]))
    assert len(seen) == 2 * 5
    for (share, group), splits in seen.items():
        n, m, flagged, first = np.transpose(splits)
        rank = np.ceil((n + 1) * share - 1e-9)
        mean, variance = stats.betabinom.stats(m, n + 1 - rank, rank)
        assert (mean <= m * (1 - share) + 1e-9).all()
        assert abs(flagged.sum() - mean.sum()) < 4.4 * np.sqrt(variance.sum()), (share, group)
        assert first.sum() <= stats.binom.ppf(1 - 1e-5, 1000, 1 - share), (share, group)  # one new image a split


def test_small_classes_share_a_threshold_and_are_joined_where_they_are_few():
    rng = np.random.default_rng(0)
    scores, positions = rng.normal(size=60), np.repeat([0, 1, 2, 3], [30, 15, 10, 5])
    mondrian = Calibration(scores, positions, 5, 0.95, per_class=True)  # class 4 has no image at all
    pooled = np.sort(scores[30:])[math.ceil(31 * 0.95) - 1]
    own = np.sort(scores[:30])[math.ceil(31 * 0.95) - 1]
    assert mondrian.thresholds(np.arange(5), 5).tolist() == [own, *[pooled] * 4] and mondrian.own_thresholds == 1
    for counts in ([30, 20, 10], [30, 30, 0]):  # the last has too few: one of 20 joins it, or the first of two
        positions = np.repeat([0, 1, 2], counts)
        joined = [1, 2] if counts[2] else [0, 2]
        shared = np.sort(scores[np.isin(positions, joined)])
        limits = Calibration(scores, positions, 3, 0.95, per_class=True).thresholds(np.array(joined), 2)
        assert limits.tolist() == [shared[math.ceil((len(shared) + 1) * 0.95) - 1]] * 2
    few = Calibration(scores[:40], np.repeat([0, 1], [30, 10]), 2, 0.95, per_class=True)
    assert few.thresholds(np.arange(2), 2).tolist() == [few.threshold] * 2 and few.own_thresholds == 0
    with pytest.raises(ValueError, match="per_class: there are no classes"):
        Calibration(scores, per_class=True)


@pytest.mark.parametrize("sizes", [(81, 10), (300, 12), (100, 40, 6)])
def test_per_class_the_promise_holds_over_all_images_too(sizes):
    """The smallest class has too few held-out images for a threshold of its own, and scores far higher: 4,000 draws."""
    rng, draws, accept, wrong = np.random.default_rng(0), 4000, 0.95, 0
    last, count = len(sizes) - 1, sum(sizes)
    for _ in range(draws):
        positions = rng.choice(len(sizes), count + 1, p=np.array(sizes) / count)
        scores = rng.normal(size=count + 1) + 3 * (positions == last)
        calibration = Calibration(scores[:-1], positions[:-1], len(sizes), accept, per_class=True)
        wrong += (scores[-1:] > calibration.thresholds(positions[-1:], 1)).item()
    assert wrong <= stats.binom.ppf(1 - 1e-5, draws, 1 - accept), wrong / draws


def test_benjamini_hochberg_as_scipy_has_it():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p_values = np.r_[rng.random(40), rng.random(rng.integers(0, 30)) ** 6].round(rng.integers(2, 9)).clip(1e-9)
        rate = rng.choice([0.01, 0.05, 0.1, 0.3])
        adjusted = stats.false_discovery_control(p_values)
        np.testing.assert_array_equal(p_values <= discoveries(p_values, rate), adjusted <= rate * (1 + 1e-9))
    assert discoveries(np.ones(5), 0.1) == discoveries(np.zeros(0), 0.1) == 0


def test_the_share_of_false_discoveries_is_as_promised():
    rng, shares = np.random.default_rng(0), []
    for _ in range(1000):
        calibration = Calibration(rng.normal(size=200))
        p_values = calibration.p_values(np.r_[rng.normal(size=80), rng.normal(size=20) + 3.5], None)
        found = p_values <= discoveries(p_values, 0.2)
        shares.append(found[:80].sum() / max(1, found.sum()))
    assert 0.1 < np.mean(shares) < 0.2 + 4 * np.std(shares) / math.sqrt(1000)


def test_drift_is_the_distance_of_the_distribution_functions():
    rng = np.random.default_rng(0)
    for shift, unlike in ((0, False), (1, True)):
        held_out, scores = rng.normal(size=120), rng.normal(size=300) + shift
        distance, p_value = drift(held_out, scores)
        everywhere = np.r_[held_out, scores]
        slow = max(abs((held_out <= x).mean() - (scores <= x).mean()) for x in everywhere)
        assert distance == pytest.approx(slow, abs=1e-12) and (p_value < 0.01) == unlike
        calibration = Calibration(held_out)
        same, _ = drift(calibration.p_values(held_out, None), calibration.p_values(scores, None))
        assert same <= distance + 1e-12
    several = [drift(rng.normal(size=60), rng.normal(size=40))[1] for _ in range(1000)]
    assert stats.binom.cdf(sum(p <= 0.05 for p in several), 1000, 0.05) < 1 - 1e-5  # of equal ones as often as it says


@pytest.mark.parametrize("name", DETECTORS)
def test_a_saved_detector_can_be_asked_for_another_share(name, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3 * 2
    train, held_out, test = (rng.normal(size=(300, 8)) + 4 * np.eye(8)[labels] for _ in range(3))
    fitted = DETECTORS[name]().fit(train, labels)
    deepcopy(fitted).calibrate(held_out, 0.95).save(tmp_path)
    loaded = load(tmp_path)
    for share, per_class in ((None, None), (0.8, None), (0.9, True), (None, False)):
        expected = deepcopy(fitted)
        expected.calibrate(held_out, loaded.accept(share, per_class).calibration_.accept, bool(per_class))
        for ours, theirs in zip(loaded.judge(test), expected.judge(test), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(loaded.predict(test), expected.predict(test))
        assert loaded.threshold == expected.threshold
    held_scores, looks_like = fitted.score(held_out), fitted.classify(held_out)
    limits = {}
    for label in (0, 2, 4):
        own = np.sort(held_scores[looks_like == label])
        limits[label] = own[math.ceil((len(own) + 1) * 0.9 - 1e-9) - 1]
    score, closest = fitted.score(test), fitted.classify(test)
    flagged = score > np.array([limits[label] for label in closest])
    assert flagged.any() and len(set(limits.values())) == 3
    np.testing.assert_array_equal(loaded.accept(0.9, True).predict(test), np.where(flagged, -1, closest))
    loaded.accept(0.9, False)
    loaded.save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).predict(test), loaded.predict(test))
    with pytest.raises(ValueError, match=r"accept: 0\.999 can't be promised with 300 held-out images, it takes 999"):
        loaded.accept(0.999)
    with pytest.raises(ValueError, match=r"accept: 1 can't be promised .*, no number is enough; at most 0\.9966 can"):
        loaded.accept(1.0)
    with pytest.raises(ValueError, match="accept: the detector keeps no scores of held-out images"):
        fitted.accept(0.9)
