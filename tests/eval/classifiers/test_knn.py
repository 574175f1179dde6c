import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import knn_predict
from sklearn.neighbors import KNeighborsClassifier

from gradmix.eval.classifiers.knn import KNNClassifier
from gradmix.eval.features import arrays


def data(n, seed, classes=(0, 1, 2, 3), width=16):
    """Overlapping clusters around fixed centres."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(max(classes) + 1, width))
    labels = generator.choice(classes, n)
    return (centres[labels] + 1.5 * generator.normal(size=(n, width))).astype(np.float32), labels


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def slow_vote(train, train_labels, test, k, temperature):
    """Wu et al., equation for the weighted vote, one image at a time in float64."""
    classes = sorted(set(train_labels.tolist()))
    shares = []
    for query in unit(test.astype(np.float64)):
        cosine = unit(train.astype(np.float64)) @ query
        votes = dict.fromkeys(classes, 0.0)
        for row in np.argsort(-cosine)[:k]:
            votes[train_labels[row]] += np.exp(cosine[row] / temperature)
        shares.append([votes[label] / sum(votes.values()) for label in classes])
    return np.array(shares)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (300, 0.5)])
def test_equals_a_slow_loop(k, temperature):
    (train, labels), (test, _) = data(300, 0), data(40, 1)
    ours = KNNClassifier(k, temperature).fit(train, labels).predict_proba(test)
    np.testing.assert_allclose(ours, slow_vote(train, labels, test, k, temperature), atol=1e-5)


@pytest.mark.parametrize("k", [5, 200])
def test_equals_lightly(k):
    (train, labels), (test, _) = data(500, 0), data(200, 1)
    theirs = knn_predict(
        torch.from_numpy(unit(test)),
        torch.from_numpy(unit(train)).T,
        torch.from_numpy(labels),
        num_classes=4,
        knn_k=k,
        knn_t=0.1,
    )[:, 0]
    ours = KNNClassifier(k, 0.1).fit(train, labels).predict(test)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_equals_scikit_learn():
    (train, labels), (test, _) = data(500, 0), data(200, 1)
    theirs = KNeighborsClassifier(
        15, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.2)
    )
    theirs.fit(train, labels)
    ours = KNNClassifier(15, 0.2).fit(train, labels)
    np.testing.assert_allclose(ours.predict_proba(test), theirs.predict_proba(test), atol=1e-5)
    np.testing.assert_array_equal(ours.predict(test), theirs.predict(test))


def test_labels_with_gaps():
    (train, labels), (test, _) = data(300, 0, classes=(3, 7, 40)), data(40, 1, classes=(3, 7, 40))
    ours = KNNClassifier(20).fit(train, labels)
    assert ours.classes_.tolist() == [3, 7, 40]
    assert ours.predict_proba(test).shape == (40, 3)
    expected = np.array([3, 7, 40])[slow_vote(train, labels, test, 20, 0.07).argmax(axis=1)]
    np.testing.assert_array_equal(ours.predict(test), expected)


def test_many_settings_from_one_search():
    (train, labels), (test, _) = data(300, 0), data(40, 1)
    ours = KNNClassifier(20).fit(train, labels)
    found = ours.neighbours(test, k=100)
    for k, temperature in [(1, 0.1), (50, 0.02), (100, 2.0)]:
        expected = slow_vote(train, labels, test, k, temperature)
        np.testing.assert_allclose(ours.vote(*found, k=k, temperature=temperature), expected, atol=1e-4)
        winners = ours.winners(*found, k=k, temperature=temperature)
        assert (np.take_along_axis(expected, winners[:, None], 1)[:, 0] >= expected.max(axis=1) - 1e-4).all()
    with pytest.raises(ValueError, match="k=101 is larger"):
        ours.vote(*found, k=101)


def test_a_tiny_temperature_does_not_overflow():
    (train, labels), (test, _) = data(300, 0), data(40, 1)
    probabilities = KNNClassifier(20, 1e-6).fit(train, labels).predict_proba(test)
    nearest = KNNClassifier(1).fit(train, labels).predict_proba(test)
    np.testing.assert_allclose(probabilities, nearest, atol=1e-3)


def test_a_tie_goes_to_the_smallest_label():
    train, labels = np.array([[1.0, 0], [1, 0]]), np.array([9, 4])
    assert KNNClassifier(2).fit(train, labels).predict(train[:1]).tolist() == [4]


def test_zero_features_are_finite():
    train, labels = data(30, 0)
    train[3] = 0
    probabilities = KNNClassifier(5).fit(train, labels).predict_proba(np.zeros((2, 16)))
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)


def test_kind_follows_the_input():
    (train, labels), (test, _) = data(300, 0), data(40, 1)
    tensors = KNNClassifier(20).fit(torch.from_numpy(train), torch.from_numpy(labels))
    arrays = KNNClassifier(20).fit(train, labels)
    probabilities, predicted = (
        tensors.predict_proba(torch.from_numpy(test)),
        tensors.predict(torch.from_numpy(test)),
    )
    assert probabilities.dtype == torch.float32 and predicted.dtype == torch.int64
    np.testing.assert_array_equal(probabilities.numpy(), arrays.predict_proba(test))
    np.testing.assert_array_equal(predicted.numpy(), arrays.predict(test))


def test_bad_input():
    train, labels = data(10, 0)
    with pytest.raises(ValueError, match="k=11 is larger than the number of reference features, 10"):
        KNNClassifier(11).fit(train, labels)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        KNNClassifier(5, 0)
    with pytest.raises(ValueError, match=r"labels: expected one for each of 10 features, got shape \(9,\)"):
        KNNClassifier(5).fit(train, labels[:9])
    with pytest.raises(ValueError, match=r"features: expected \[N, 16\], got shape \(10, 15\)"):
        KNNClassifier(5).fit(train, labels).predict(train[:, :15])


def test_many_classes_are_counted_block_by_block(monkeypatch):
    train, labels = data(200, 0)
    classifier = KNNClassifier(5).fit(train, labels)
    test, _ = data(40, 1)
    expected = classifier.predict_proba(test).argmax(axis=1)
    seen = []
    vote = classifier.vote
    monkeypatch.setattr(classifier, "vote", lambda *given: seen.append(len(given[0])) or vote(*given))
    monkeypatch.setattr(arrays, "BLOCK", 64)
    np.testing.assert_array_equal(classifier.predict(test), classifier.classes_[expected])
    assert seen == [16, 16, 8]  # rows of four classes each
