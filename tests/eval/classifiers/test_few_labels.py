import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from gradmix.eval.classifiers.few_labels import few_labels, subset

FEATURES, LABELS = load_digits(return_X_y=True)


@pytest.fixture(scope="module")
def quick_evaluation():
    """Here probes train as long as anywhere."""


@pytest.mark.parametrize(("amount", "least", "most"), [("1%", 2, 2), ("10%", 17, 18), (4, 4, 4), ("100%", 174, 183)])
def test_every_class_has_its_share(amount, least, most):
    rows = subset(LABELS, amount, seed=0)
    counts = np.bincount(LABELS[rows])
    assert counts.min() == least and counts.max() == most and len(set(rows.tolist())) == len(rows)


def test_a_small_share_is_one_image_at_least():
    assert np.bincount(np.arange(30)[subset(np.arange(30) % 3, "1%", 0)] % 3).tolist() == [1, 1, 1]


def test_subsets_are_fixed_differ_by_seed_and_contain_each_other():
    first, again, other = (subset(LABELS, 5, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    assert set(first) < set(subset(LABELS, "10%", 0))
    np.testing.assert_array_equal(subset(LABELS * 7 + 3, 5, 0), first)  # labels with gaps


def test_accuracy_is_a_logistic_regressions_on_the_same_images():
    train = np.arange(len(LABELS)) < 1200
    sets = FEATURES[train], LABELS[train], FEATURES[~train], LABELS[~train]
    ours, theirs = few_labels(*sets, 1, seeds=2), []
    for seed in range(2):
        rows = subset(sets[1], 1, seed)
        scaler = StandardScaler().fit(sets[0][rows])
        probe = LogisticRegression(max_iter=2000).fit(scaler.transform(sets[0][rows]), sets[1][rows])
        theirs.append(probe.score(scaler.transform(sets[2]), sets[3]))
    assert ours == pytest.approx(theirs, abs=0.003)  # an image


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ("x", "expected a share such as 1% or images per class such as 4, got 'x'"),
        ("0%", "expected a share"),
        ("101%", "expected a share"),
        (0, "expected a share"),
        (175, "175 images of each class asked for, class 8 has 174"),
    ],
)
def test_bad_amounts(amount, message):
    with pytest.raises(ValueError, match=f"few_labels: {message}"):
        subset(LABELS, amount, 0)
