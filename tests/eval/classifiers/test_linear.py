import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from gradmix.eval.classifiers import linear
from gradmix.eval.classifiers.linear import LinearProbe, _merits, _Standardised


@pytest.fixture(scope="module")
def quick_evaluation():
    """Here probes train as long as anywhere."""


def digits():
    features, labels = load_digits(return_X_y=True)
    train = np.random.default_rng(0).random(len(labels)) < 2 / 3
    return features[train], labels[train], features[~train], labels[~train]


def noisy(n, seed, width=64, classes=5):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = generator.integers(classes, size=n)
    return 0.4 * centres[labels] + generator.normal(size=(n, width)), labels


def test_is_the_minimum_that_scikit_learn_finds():
    train, labels, test, _ = digits()
    scaler = StandardScaler().fit(train)
    theirs = LogisticRegression(C=1 / (1e-2 * len(train)), max_iter=5000, tol=1e-8)
    theirs.fit(scaler.transform(train), labels)
    ours = LinearProbe(lr=1, weight_decay=1e-2).fit(train, labels)
    expected = theirs.predict_proba(scaler.transform(test))
    np.testing.assert_allclose(ours.predict_proba(test), expected, atol=5e-3)
    assert ours.weight_decay_ == pytest.approx(1e-2)


@pytest.mark.parametrize("data", [digits(), (*noisy(2000, 0), *noisy(4000, 1))], ids=["digits", "noisy"])
def test_accuracy_is_within_a_fifth_of_a_point_of_scikit_learn(data):
    train, labels, test, test_labels = data
    theirs = LogisticRegression(max_iter=5000).fit(StandardScaler().fit(train).transform(train), labels)
    expected = theirs.score(StandardScaler().fit(train).transform(test), test_labels)
    accuracy = (LinearProbe().fit(train, labels).predict(test) == test_labels).mean()
    assert accuracy >= expected - 0.002


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_at_the_same_strength_on_half_of_the_digits(seed):
    """scikit-learn's default C = 1, whatever the split: 0.2 points are one image of 900, a tie may fall either way."""
    features, labels = load_digits(return_X_y=True)
    train = np.random.default_rng(seed).random(len(labels)) < 0.5
    scaler = StandardScaler().fit(features[train])
    theirs = LogisticRegression(max_iter=5000).fit(scaler.transform(features[train]), labels[train])
    ours = LinearProbe(lr=3, weight_decay=1 / train.sum()).fit(features[train], labels[train])
    accuracy = (ours.predict(features[~train]) == labels[~train]).mean()
    assert accuracy == pytest.approx(theirs.score(scaler.transform(features[~train]), labels[~train]), abs=0.002)


def test_every_setting_of_the_batch_is_trained_as_if_alone():
    """Against torch's own SGD and autograd, one setting after the other."""
    features, labels = noisy(300, 0, width=8)
    probe = LinearProbe(epochs=2, batch_size=64, seed=3)
    settings = torch.tensor([[0.5, 0.1], [0.05, 0.0], [0.2, 1e-3]])
    probe.fit(features, labels)  # sets the classes
    x, y = _Standardised(features, "cpu"), torch.from_numpy(labels)
    weights, biases = probe._train(x, y, np.arange(300), settings, 0.05)
    for (lr, weight_decay), weight, bias in zip(settings.tolist(), weights, biases, strict=True):
        head = torch.nn.Linear(8, 5)
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
        groups = [{"params": [head.weight], "weight_decay": weight_decay}, {"params": [head.bias]}]
        optimizer = torch.optim.SGD(groups, lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        for step in range(100):  # 0.05 of 2000
            if step % 5 == 0:
                order = np.random.default_rng([3, step]).permutation(300)
            rows = order[step % 5 * 64 : (step % 5 + 1) * 64]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x.ready[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight, head.weight, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(bias, head.bias, atol=2e-3, rtol=2e-3)


def test_a_setting_that_diverges_is_not_chosen():
    train, labels, test, test_labels = digits()
    probe = LinearProbe(lr=(1, 1e4), weight_decay=1e-3).fit(train, labels)
    assert probe.lr_ < 10 and (probe.predict(test) == test_labels).mean() > 0.9


def test_a_head_of_nans_is_worth_least():
    """Though its largest logit is the first, and all these images are of the first class."""
    features, _ = noisy(30, 0, width=8)
    weight = torch.zeros(2, 5, 8)
    weight[0] = torch.nan
    rows = torch.zeros(30, dtype=torch.int64)
    nans, zeros = _merits((weight, torch.zeros(2, 5)), _Standardised(features, "cpu"), rows, np.arange(30))
    assert nans < zeros == (1.0, pytest.approx(-np.log(5)))


def test_memory_mapped_features_give_the_same_probe(tmp_path):
    train, labels, test, _ = digits()
    train = train.astype(np.float32)
    mapped = np.memmap(tmp_path / "features", np.float32, "w+", shape=train.shape)
    mapped[:] = train
    ours, theirs = (LinearProbe(lr=1, weight_decay=1e-2).fit(x, labels).predict_proba(test) for x in (mapped, train))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_setting_is_the_best_on_the_held_out_images():
    """Few images in many dimensions, where it matters; every setting again on its own."""
    train, labels = noisy(150, 0)
    lr, strengths = (0.01, 3), (1, 1e-2, 1e-6)
    chosen = LinearProbe(lr, strengths).fit(train, labels)
    alone = {(a, b): LinearProbe(a, b).fit(train, labels) for a in lr for b in strengths}
    best = max(probe.held_out_accuracy_ for probe in alone.values())
    assert chosen.held_out_accuracy_ == best > min(probe.held_out_accuracy_ for probe in alone.values())
    at_its_setting = [p for p in alone.values() if (p.lr_, p.weight_decay_) == (chosen.lr_, chosen.weight_decay_)]
    assert len(at_its_setting) == 1 and at_its_setting[0].held_out_accuracy_ == best
    np.testing.assert_allclose(at_its_setting[0].weight_, chosen.weight_, atol=1e-4)


def test_is_deterministic():
    train, labels, test, _ = digits()
    first, second = (LinearProbe(epochs=1).fit(train, labels).predict_proba(test) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_weights_are_for_raw_features():
    train, labels, test, _ = digits()
    probe = LinearProbe(weight_decay=1e-2).fit(train, labels)
    np.testing.assert_array_equal((test @ probe.weight_.T + probe.bias_).argmax(axis=1), probe.predict(test))
    moved = LinearProbe(weight_decay=1e-2).fit(train * 50 - 300, labels)
    np.testing.assert_allclose(moved.predict_proba(test * 50 - 300), probe.predict_proba(test), atol=1e-3)


def test_labels_with_gaps_and_tensors():
    train, labels, test, test_labels = digits()
    gaps = np.array([3, 5, 8, 100, 101, 102, 103, 200, 300, 301])
    probe = LinearProbe(weight_decay=1e-2).fit(torch.from_numpy(train), torch.from_numpy(gaps[labels]))
    predicted, probabilities = (
        probe.predict(torch.from_numpy(test)),
        probe.predict_proba(torch.from_numpy(test)),
    )
    assert probe.classes_.tolist() == gaps.tolist()
    assert predicted.dtype == torch.int64 and probabilities.dtype == torch.float32
    assert (predicted.numpy() == gaps[test_labels]).mean() > 0.9
    np.testing.assert_allclose(probabilities.sum(dim=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(gaps[probabilities.argmax(dim=1)], predicted)


def test_classes_with_one_image_are_not_held_out():
    train, labels = noisy(40, 0)
    labels[0], labels[labels == 4] = 7, 3
    probe = LinearProbe().fit(train, labels)
    assert probe.classes_.tolist() == [0, 1, 2, 3, 7]
    assert probe.predict(train[:1]).tolist() == [7]
    held = probe._held_out(np.searchsorted(probe.classes_, labels))
    assert not held[0] and all(0 < held[labels == label].mean() < 0.5 for label in range(4))
    probe.seed = 1
    assert (probe._held_out(np.searchsorted(probe.classes_, labels)) != held).any()


def test_of_classes_with_two_images_one_trains_however_much_is_held_out():
    train, labels = noisy(6, 0)
    labels[:] = [0, 0, 1, 1, 2, 2]
    held = LinearProbe(holdout=0.8).fit(train, labels)._held_out(labels)
    assert held.reshape(3, 2).sum(axis=1).tolist() == [1, 1, 1]


def test_one_image_per_class_and_constant_columns():
    train = np.array([[1.0, 0.1, 5], [2.0, 0.1, 5], [4.0, 0.1, 5]])
    probe = LinearProbe().fit(train, [0, 1, 2])
    assert np.isfinite(probe.predict_proba(train)).all()
    assert np.abs(probe.weight_[:, 1:]).max() < 1e-5


def test_a_column_that_is_constant_but_for_rounding_has_no_weight():
    train, labels = noisy(1000, 0, width=4)
    train = train.astype(np.float32)
    train[:, 2] = 5
    train[::333, 2] = np.nextafter(np.float32(5), np.float32(6))
    probe = LinearProbe(lr=1, weight_decay=1e-2).fit(train, labels)
    assert np.abs(probe.weight_[:, 2]).max() < 1e-3 < np.abs(probe.weight_[:, 0]).max()


def test_a_long_training_says_how_long_and_choosing_has_an_end(monkeypatch, capsys):
    monkeypatch.setattr(linear, "LONG", 0)
    train, labels = noisy(100, 0, width=4)
    LinearProbe(weight_decay=1e-2).fit(train, labels)
    told = capsys.readouterr().err
    assert "linear probe, choosing among 4 settings: expected time " in told and "linear probe: expected" in told
    monkeypatch.setattr(linear, "MOST_CHOOSING", linear.TIMED)  # is over before its time is known
    LinearProbe(weight_decay=1e-2).fit(train, labels)
    assert "choosing" not in (told := capsys.readouterr().err) and "linear probe: expected" in told


def test_bad_input():
    train, labels = noisy(20, 0)
    with pytest.raises(ValueError, match="labels: a probe needs two classes, got only 3"):
        LinearProbe().fit(train, np.full(20, 3))
    with pytest.raises(ValueError, match=r"labels: expected one for each of 20 features, got shape \(19,\)"):
        LinearProbe().fit(train, labels[:19])
    with pytest.raises(ValueError, match=r"weight_decay: expected numbers >= 0, got -1"):
        LinearProbe(weight_decay=-1)
    with pytest.raises(ValueError, match=r"lr: expected numbers > 0, got \(0, 1\)"):
        LinearProbe(lr=(0, 1))
    with pytest.raises(ValueError, match=r"holdout: expected a share in \(0, 1\), got 1"):
        LinearProbe(holdout=1)
    train[4, 2] = np.nan
    with pytest.raises(ValueError, match="features: 1 non-finite value, first in row 4"):
        LinearProbe().fit(train, labels)
