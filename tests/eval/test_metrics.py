from itertools import pairwise, product

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, recall_score, roc_auc_score, roc_curve

from gradmix.eval.metrics import (
    aupr,
    auroc,
    balanced_accuracy,
    bootstrap,
    class_recalls,
    closed_set_accuracy,
    fpr_at_tpr,
    mean_recall,
    oscr,
    paired_bootstrap,
    threshold_for,
)


def arrays_with_ties(count=200):
    """Known and unknown scores of random sizes, rounded so that many are equal, and which are correct."""
    for seed in range(count):
        generator = np.random.default_rng(seed)
        known = generator.normal(size=generator.integers(1, 40)).round(generator.integers(0, 3))
        unknown = (generator.normal(size=generator.integers(1, 40)) + 0.5).round(generator.integers(0, 3))
        yield known, unknown, generator.random(len(known)) < 0.7


def targets(known, unknown):
    return np.r_[np.zeros(len(known)), np.ones(len(unknown))], np.r_[known, unknown]


def test_auroc_equals_scikit_learn_and_pair_counting():
    for known, unknown, _ in arrays_with_ties():
        pairs = [(u > k) + 0.5 * (u == k) for k, u in product(known, unknown)]
        assert auroc(known, unknown) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
        assert auroc(known, unknown) == pytest.approx(roc_auc_score(*targets(known, unknown)), abs=1e-12)
        assert auroc(-known, -unknown) == pytest.approx(1 - auroc(known, unknown), abs=1e-12)


def test_equal_scores_are_a_coin_toss():
    for sizes in ((1, 1), (3, 7), (1000, 331)):
        known, unknown = (np.full(size, 0.1) for size in sizes)
        assert auroc(known, unknown) == 0.5
        assert oscr(known, unknown, np.ones(len(known), bool)) == 0.5


def slow_average_precision(positive, negative):
    """Precision at every distinct threshold, weighted by the recall gained there."""
    total, recall = 0.0, 0.0
    for threshold in sorted({*positive, *negative}, reverse=True):
        found, wrong = (positive >= threshold).sum(), (negative >= threshold).sum()
        total += (found / len(positive) - recall) * found / (found + wrong)
        recall = found / len(positive)
    return total


def test_aupr_of_both_sides():
    for known, unknown, _ in arrays_with_ties():
        target, scores = targets(known, unknown)
        assert aupr(known, unknown) == pytest.approx(slow_average_precision(unknown, known), abs=1e-12)
        assert aupr(known, unknown) == pytest.approx(average_precision_score(target, scores), abs=1e-12)
        expected = slow_average_precision(-known, -unknown)
        assert aupr(known, unknown, positive="known") == pytest.approx(expected, abs=1e-12)


def slow_fpr(positive, negative, tpr):
    """Try every threshold: the smallest false-positive rate among those that find enough."""
    rates = []
    for threshold in (*positive, *negative):
        if (positive >= threshold).mean() >= tpr - 1e-9:
            rates.append((negative >= threshold).mean())
    return min(rates)


@pytest.mark.parametrize("tpr", [0.5, 0.8, 0.95, 1.0])
def test_fpr_of_both_conventions(tpr):
    for known, unknown, _ in arrays_with_ties():
        assert fpr_at_tpr(known, unknown, tpr) == pytest.approx(slow_fpr(unknown, known, tpr), abs=1e-12)
        expected = slow_fpr(-known, -unknown, tpr)
        assert fpr_at_tpr(known, unknown, tpr, positive="known") == pytest.approx(expected, abs=1e-12)


def test_the_default_is_openood_s_and_pytorch_ood_s_convention():
    """Both take the unknown images as positive: the first point of scikit-learn's ROC curve with recall of 95 %."""
    for known, unknown, _ in arrays_with_ties(50):
        rates, recalls, _ = roc_curve(*targets(known, unknown), drop_intermediate=False)
        assert fpr_at_tpr(known, unknown) == pytest.approx(rates[np.argmax(recalls >= 0.95 - 1e-9)], abs=1e-12)


def test_the_two_conventions_differ():
    known, unknown = np.r_[np.zeros(90), np.full(10, 9.0)], np.full(100, 5.0)
    assert fpr_at_tpr(known, unknown) == 0.1  # all unknown images are found at 5, with the ten known at 9
    assert fpr_at_tpr(known, unknown, positive="known") == 1.0  # 95 % of the known need a threshold of 9


def slow_oscr(known, unknown, correct):
    """Dhamija et al.: the area under (false-positive rate, correct classification rate), by trapezoids."""
    points = [(0.0, 0.0)]
    for threshold in sorted({*known, *unknown}):
        accepted = (known <= threshold) & correct
        points.append(((unknown <= threshold).mean(), accepted.sum() / len(known)))
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))


def test_oscr_equals_the_curve_and_pair_counting():
    for known, unknown, correct in arrays_with_ties():
        ours = oscr(known, unknown, correct)
        pairs = [c * ((k < u) + 0.5 * (k == u)) for (k, c), u in product(zip(known, correct, strict=True), unknown)]
        assert ours == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
        assert ours == pytest.approx(slow_oscr(known, unknown, correct), abs=1e-12)
        assert ours <= correct.mean() + 1e-12
        assert oscr(known, unknown, np.ones(len(known))) == pytest.approx(auroc(known, unknown), abs=1e-12)
        assert oscr(known, unknown, np.zeros(len(known))) == 0


def test_closed_set_accuracy():
    assert closed_set_accuracy([1, 2, 2, 9], [1, 2, 3, 9]) == 0.75
    assert closed_set_accuracy(torch.tensor([1, 0]), np.array([1, 1])) == 0.5


@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
def test_recalls_equal_scikit_learn():
    for seed in range(50):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 6, generator.integers(1, 40)) ** 2  # unlike sizes, classes without images
        predicted = np.where(generator.random(len(labels)) < 0.6, labels, generator.integers(0, 40, len(labels)))
        recalls = class_recalls(torch.from_numpy(predicted), labels)
        assert list(recalls) == sorted(set(labels.tolist()))
        expected = recall_score(labels, predicted, average=None, labels=list(recalls), zero_division=0)
        assert list(recalls.values()) == pytest.approx(expected, abs=1e-12)
        assert mean_recall(recalls) == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    with pytest.raises(ValueError, match=r"labels: expected \[N\], got shape \(0,\)"):
        class_recalls([], [])


def test_balanced_accuracy_equals_scikit_learn():
    for known, unknown, _ in arrays_with_ties():
        target, scores = targets(known, unknown)
        expected = balanced_accuracy_score(target, scores > 0.2)
        assert balanced_accuracy(known, unknown, 0.2) == pytest.approx(expected, abs=1e-12)


def test_threshold_accepts_the_share_and_no_lower_one_does():
    for known, _, _ in arrays_with_ties():
        for share in (0.05, 0.35, 0.95, 1.0):
            threshold = threshold_for(known, share)
            assert (known <= threshold).mean() >= share - 1e-9
            assert (known < threshold).mean() < share - 1e-9
    assert threshold_for(np.arange(100), 1e-12) == 0  # one image at least
    assert threshold_for(np.arange(100), 0.55) == 54  # 0.55 * 100 is above 55 in floating point


def test_tensors_are_taken():
    known, unknown = torch.tensor([0.0, 1, 2], requires_grad=True), torch.tensor([1.5, 3])
    assert auroc(known, unknown) == pytest.approx(5 / 6, abs=1e-15)
    assert oscr(known, unknown, torch.tensor([True, True, False])) == pytest.approx(4 / 6, abs=1e-15)
    assert auroc(known.bfloat16(), unknown.half()) == pytest.approx(5 / 6, abs=1e-15)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.float16, np.float32])
def test_small_numbers_are_computed_in_double_precision(kind):
    """Of bytes -1 would be 255."""
    for known, unknown, correct in arrays_with_ties(20):
        known, unknown = (np.abs(10 * scores).astype(kind) for scores in (known, unknown))
        wide = known.astype(float), unknown.astype(float)
        for metric, more in ((auroc, {}), (aupr, {"positive": "known"}), (fpr_at_tpr, {"tpr": 0.8})):
            assert metric(known, unknown, **more) == metric(*wide, **more)
        assert oscr(known, unknown, correct) == oscr(*wide, correct)


@pytest.mark.parametrize("metric", [auroc, aupr, fpr_at_tpr, lambda k, u: oscr(k, u, np.ones(len(k)))])
def test_bad_scores(metric):
    good = np.ones(4)
    with pytest.raises(ValueError, match="known_scores: empty"):
        metric(np.ones(0), good)
    with pytest.raises(ValueError, match="unknown_scores: empty"):
        metric(good, [])
    with pytest.raises(ValueError, match="known_scores: 1 non-finite, first at 2"):
        metric(np.array([0, 1, np.nan]), good)
    with pytest.raises(ValueError, match="unknown_scores: 2 non-finite, first at 0"):
        metric(good, np.array([np.inf, np.nan]))
    with pytest.raises(ValueError, match=r"known_scores: expected \[N\], got shape \(4, 1\)"):
        metric(good[:, None], good)


def test_other_bad_input():
    good = np.ones(4)
    with pytest.raises(ValueError, match=r"correct: expected 4 booleans, got bool of shape \(3,\)"):
        oscr(good, good, np.ones(3, bool))
    with pytest.raises(ValueError, match="positive: expected unknown or known, got 'id'"):
        aupr(good, good, positive="id")
    with pytest.raises(ValueError, match=r"tpr: expected a share in \(0, 1\], got 95"):
        fpr_at_tpr(good, good, 95)
    with pytest.raises(ValueError, match=r"predicted: expected shape \(2,\) as labels have, got \(3,\)"):
        closed_set_accuracy([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"labels: expected \[N\], got shape \(0,\)"):
        closed_set_accuracy([], [])


def normal_scores(n, shift, seed):
    generator = np.random.default_rng(seed)
    return generator.normal(size=n), generator.normal(size=n) + shift


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    """AUROC of unit normals one apart is 0.7602; 90 % intervals should hold it in about 90 of 100 samples."""
    covered = 0
    for seed in range(100):
        interval = bootstrap(auroc, *normal_scores(60, 1.0, seed), samples=200, level=0.9)
        covered += interval.low <= 0.76025 <= interval.high
    assert 80 <= covered <= 98


def test_bootstrap_has_the_width_of_hanley_and_mcneil():
    known, unknown = normal_scores(400, 1.0, 0)
    interval = bootstrap(auroc, known, unknown, level=0.6827)
    a = interval.value
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    deviation = np.sqrt((a * (1 - a) + 399 * (q1 - a * a) + 399 * (q2 - a * a)) / 400**2)
    assert a == auroc(known, unknown)
    assert (interval.high - interval.low) / 2 == pytest.approx(deviation, rel=0.15)


def test_bootstrap_is_seeded_and_takes_oscr():
    known, unknown = normal_scores(50, 1.0, 0)
    correct = np.arange(50) % 3 > 0
    first = bootstrap(oscr, known, unknown, correct, samples=50)
    assert first == bootstrap(oscr, known, unknown, correct, samples=50)
    assert first != bootstrap(oscr, known, unknown, correct, samples=50, seed=1)
    assert first.value == oscr(known, unknown, correct) and first.low < first.value < first.high
    # whether an image is right is drawn along with its score: here only wrong images score low
    assert bootstrap(oscr, np.arange(50), np.full(50, 24.5), np.arange(50) >= 25, samples=50).high == 0


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_bootstrap_is_scikit_learn_s_auroc_of_the_drawn_rows(decimals, monkeypatch):
    """With ties and without; OSCR by the curve of the drawn rows. No draw sorts."""
    known, unknown = (scores.round(decimals) for scores in normal_scores(40, 1.0, 0))
    other, correct = known[::-1].copy(), np.arange(40) % 3 > 0
    generator = np.random.default_rng(5)
    draws = [(generator.integers(40, size=40), generator.integers(40, size=40)) for _ in range(30)]
    areas, differences, rates = [], [], []
    for k, u in draws:
        area, others = (roc_auc_score(*targets(one[k], unknown[u])) for one in (known, other))
        areas, differences = [*areas, area], [*differences, others - area]
        rates.append(slow_oscr(known[k], unknown[u], correct[k]))
    asked = {"samples": 30, "seed": 5, "level": 0.9}
    monkeypatch.setattr(np, "sort", None)
    for values, found in (
        (areas, bootstrap(auroc, known, unknown, **asked)),
        (differences, paired_bootstrap(auroc, (known, unknown), (other, unknown), **asked)),
        (rates, bootstrap(oscr, known, unknown, correct, **asked)),
    ):
        assert found[1:] == pytest.approx(np.quantile(values, [0.05, 0.95]), abs=1e-12)


def test_paired_bootstrap_sees_a_difference_that_separate_intervals_hide():
    known, unknown = normal_scores(150, 1.0, 0)
    generator = np.random.default_rng(1)
    better = (known - 0.1, unknown + 0.05 * generator.normal(size=150))
    difference = paired_bootstrap(auroc, (known, unknown), better, samples=300)
    assert difference.value == pytest.approx(auroc(*better) - auroc(known, unknown), abs=1e-15)
    assert 0 < difference.low < difference.value < difference.high
    one, other = bootstrap(auroc, known, unknown, samples=300), bootstrap(auroc, *better, samples=300)
    assert one.high > other.low
    same = paired_bootstrap(auroc, (known, unknown), (known, unknown), samples=20)
    assert same == (0, 0, 0)


def test_bad_bootstrap():
    with pytest.raises(ValueError, match="unknown_scores: 3 in the first run, 2 in the second"):
        paired_bootstrap(auroc, (np.ones(2), np.ones(3)), (np.ones(2), np.ones(2)))
    for count in (2, 4):
        with pytest.raises(ValueError, match=rf"correct: expected 3 booleans, got bool of shape \({count},\)"):
            bootstrap(oscr, np.ones(3), np.ones(3), np.ones(count, bool))
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        bootstrap(auroc, np.ones(2), np.ones(3), samples=0)
    with pytest.raises(ValueError, match=r"level: expected a share in \(0, 1\), got 95"):
        bootstrap(auroc, np.ones(2), np.ones(3), level=95)
