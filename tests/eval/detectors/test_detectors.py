"""Detectors against slow float64 computations written from the papers."""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from scipy.linalg import pinvh
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_normal
from sklearn import mixture
from sklearn.covariance import EmpiricalCovariance

from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.detectors import (
    ASH,
    DETECTORS,
    FDBD,
    GEN,
    MSP,
    NCI,
    ClassKNN,
    DeepKNN,
    GaussianMixture,
    Mahalanobis,
    MeanShift,
    NNGuide,
    ReAct,
    RelativeMahalanobis,
    Scale,
    ViM,
    load,
)
from gradmix.eval.detectors.class_mean import class_means
from gradmix.eval.features import arrays
from gradmix.eval.metrics import auroc

LABELS = (2, 3, 7, 40)  # gaps on purpose


def clusters(n, seed, labels=LABELS, width=12):
    """Known features around one centre per class, which float16 holds exactly, and their labels."""
    generator = np.random.default_rng(seed)
    centres = np.abs(np.random.default_rng(99).normal(size=(50, width)))
    chosen = generator.choice(labels, n)
    features = centres[chosen] + 0.3 * generator.normal(size=(n, width))
    return features.astype(np.float16).astype(np.float32), chosen


TRAIN, TRAIN_LABELS = clusters(200, 0)
TEST, TEST_LABELS = clusters(60, 1)
UNKNOWN, _ = clusters(60, 2, labels=(0, 1, 4, 5))
QUERIES = np.concatenate([TEST, UNKNOWN])


@cache
def fitted_once(name):
    return DETECTORS[name]().fit(TRAIN, TRAIN_LABELS)


@cache
def probe_of_train():
    return LinearProbe().fit(TRAIN, TRAIN_LABELS)


def probe_of(train, labels):
    """Half a second each; most loops ask for the same one."""
    same = train is TRAIN and labels is TRAIN_LABELS
    return probe_of_train() if same else LinearProbe().fit(train, labels)


def unit(features):
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


# each takes training features, labels and test features, and returns scores [N] and classes [N]


def slow_deep_knn(train, labels, test, k=5):
    train, scores, classes = unit(train), [], []
    for query in unit(test):
        distance = np.sqrt(((query - train) ** 2).sum(axis=1))
        nearest = np.argsort(distance)[:k]
        scores.append(distance[nearest[-1]])
        votes = {label: 0.0 for label in sorted(set(labels))}
        for row in nearest:
            votes[labels[row]] += np.exp(train[row] @ query / 0.07)
        classes.append(max(votes, key=votes.get))
    return np.array(scores), np.array(classes)


def slow_class_knn(train, labels, test, k=3):
    train, scores, classes = unit(train), [], []
    for query in unit(test):
        similarity = {}
        for label in sorted(set(labels)):
            cosine = sorted(train[labels == label] @ query, reverse=True)[:k]
            similarity[label] = np.mean(cosine) * k
        scores.append(-max(similarity.values()) / sum(similarity.values()))
        classes.append(max(similarity, key=similarity.get))
    return np.array(scores), np.array(classes)


def slow_mahalanobis(train, labels, test):
    train, test = train.astype(np.float64), test.astype(np.float64)
    means = {label: train[labels == label].mean(axis=0) for label in sorted(set(labels))}
    deviation = np.array([row - means[label] for row, label in zip(train, labels, strict=True)])
    precision = pinvh(sum(np.outer(row, row) for row in deviation) / len(train))  # scikit-learn's, and OpenOOD's
    distance = np.array([[(x - m) @ precision @ (x - m) for m in means.values()] for x in test])
    return distance.min(axis=1), np.array(list(means))[distance.argmin(axis=1)]


def slow_relative_mahalanobis(train, labels, test):
    scores, classes = slow_mahalanobis(train, labels, test)
    background, _ = slow_mahalanobis(train, np.zeros(len(train), int), test)
    return scores - background, classes


def slow_confidence(unsure):
    def slow(train, labels, test):
        probe = probe_of(train, labels)
        values = test.astype(np.float64) @ np.asarray(probe.weight_, np.float64).T + np.asarray(probe.bias_, np.float64)
        return unsure(values), np.unique(labels)[values.argmax(axis=1)]

    return slow


def slow_gen(values, gamma=0.1):
    shares = softmax(values, axis=1)
    rests = np.array([[np.delete(row, i).sum() for i in range(len(row))] for row in shares])
    return ((shares * rests) ** gamma).sum(axis=1)


def slow_head(score):
    """`score(features, weight, bias, training features)` gives scores and the head's class positions."""

    def slow(train, labels, test, head=None):
        probe = probe_of(train, labels) if head is None else None
        weight, bias = (probe.weight_, probe.bias_) if head is None else head
        weight, bias = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
        scores, positions = zip(*(score(x.astype(np.float64), weight, bias, train) for x in test), strict=True)
        return np.array(scores), np.unique(labels)[list(positions)]

    return slow


def shaped_energy(shape):
    def score(x, weight, bias, train):
        shaped = shape(x, train)
        values = [sum(w * v for w, v in zip(row, shaped, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        return -logsumexp(values), int(np.argmax(values))

    return slow_head(score)


def react(percentile):
    def shape(x, train):
        ordered = sorted(train.astype(np.float64).ravel())
        place = percentile / 100 * (len(ordered) - 1)
        low = ordered[int(place)]
        limit = low + (place - int(place)) * (ordered[min(int(place) + 1, len(ordered) - 1)] - low)
        return [min(value, limit) for value in x]

    return shape


def pruned(percentile, what):
    """SCALE, ASH-S and ASH-B of one feature; values below 0 count as 0 in the sums."""

    def shape(x, train):
        kept = sorted(range(len(x)), key=lambda i: -x[i])[: max(1, len(x) - round(len(x) * percentile / 100))]
        everything, rest = sum(max(v, 0) for v in x), sum(max(x[i], 0) for i in kept)
        factor = np.exp(everything / rest)
        if what == "scale":
            return [factor * value for value in x]
        values = [factor * value if what == "s" else everything / len(kept) for value in x]
        return [value if i in kept else 0 for i, value in enumerate(values)]

    return shape


def fdbd(x, weight, bias, train):
    values, mean = weight @ x + bias, train.astype(np.float64).mean(axis=0)
    best = int(np.argmax(values))
    others = [c for c in range(len(bias)) if c != best]
    distances = [abs(values[best] - values[c]) / np.sqrt(((weight[best] - weight[c]) ** 2).sum()) for c in others]
    return -np.mean(distances) / np.sqrt(((x - mean) ** 2).sum()), best


def nci(alpha):
    def score(x, weight, bias, train):
        best, away = int(np.argmax(weight @ x + bias)), x - train.astype(np.float64).mean(axis=0)
        return -(weight[best] @ away) / np.sqrt(away @ away) - alpha * sum(abs(x)), best

    return score


def slow_class_mean(train, labels, test):
    means = {label: unit(train[labels == label]).mean(axis=0) for label in sorted(set(labels))}
    cosine = np.array([[x @ m / np.linalg.norm(m) for m in means.values()] for x in unit(test)])
    return -cosine.max(axis=1), np.array(list(means))[cosine.argmax(axis=1)]


def slow_mean_shift(train, labels, test, k=10):
    _, classes = slow_deep_knn(train, labels, test, k)
    train, scores = unit(train), []
    for query in unit(test):
        nearest = sorted(train, key=lambda row: ((query - row) ** 2).sum())[:k]
        scores.append(np.sqrt(((query - np.mean(nearest, axis=0)) ** 2).sum()))
    return np.array(scores), classes


def slow_vim(train, labels, test, head=None, dimension=6):
    """The reference steps of the paper's section 4; a head is a weight [K, F] and a bias [K]."""
    train, test = train.astype(np.float64), test.astype(np.float64)
    origin = train.mean(axis=0) if head is None else -np.linalg.pinv(head[0]) @ head[1]
    values, vectors = np.linalg.eig((train - origin).T @ (train - origin))
    null_space = vectors[:, np.argsort(values)[::-1][dimension:]]
    residual = np.array([np.linalg.norm(null_space.T @ (x - origin)) for x in test])
    if head is None:
        return residual, slow_class_mean(train, labels, test)[1]
    logit = train @ head[0].T + head[1]
    alpha = logit.max(axis=1).mean() / np.linalg.norm((train - origin) @ null_space, axis=1).mean()
    logit = test @ head[0].T + head[1]
    virtual = alpha * residual
    exponentials = np.exp(np.c_[logit, virtual])
    probability = exponentials[:, -1] / exponentials.sum(axis=1)
    # the paper ranks by this probability, of which virtual - logsumexp(logit) is the log-odds
    scores = np.log(probability / (1 - probability))
    return scores, np.unique(labels)[logit.argmax(axis=1)]


def slow_nnguide(train, labels, test, head=None, k=10):
    if head is None:
        probe = probe_of(train, labels)
        head = probe.weight_, probe.bias_
    logits = {"train": train @ head[0].T + head[1], "test": test @ head[0].T + head[1]}
    energy = {part: np.log(np.exp(values).sum(axis=1)) for part, values in logits.items()}
    scores = []
    for query, confidence in zip(unit(test), energy["test"], strict=True):
        guidance = sorted(energy["train"] * (unit(train) @ query))[-k:]
        scores.append(-confidence * np.mean(guidance))
    return np.array(scores), np.unique(labels)[logits["test"].argmax(axis=1)]


def slow_gaussian_mixture(train, labels, test, components=2):
    train = train.astype(np.float64)
    within = np.concatenate([train[labels == label] - train[labels == label].mean(axis=0) for label in LABELS])
    density = []
    for label in LABELS:
        model = mixture.GaussianMixture(
            components,
            covariance_type="diag",
            reg_covar=1e-3 * (within**2).mean(),
            max_iter=200,
            random_state=0,
        ).fit(train[labels == label])
        parts = zip(model.weights_, model.means_, model.covariances_, strict=True)
        density.append(np.log(sum(w * multivariate_normal(m, np.diag(v)).pdf(test) for w, m, v in parts)))
    return -np.max(density, axis=0), np.array(LABELS)[np.argmax(density, axis=0)]


SLOW = {
    "deep_knn": slow_deep_knn,
    "class_knn": slow_class_knn,
    "class_mean": slow_class_mean,
    "mahalanobis": slow_mahalanobis,
    "msp": slow_confidence(lambda values: np.sort(softmax(values, axis=1), axis=1)[:, :-1].sum(axis=1)),
    "max_logit": slow_confidence(lambda values: -values.max(axis=1)),
    "energy": slow_confidence(lambda values: -logsumexp(values, axis=1)),
    "gen": slow_confidence(slow_gen),
    "react": shaped_energy(react(90)),
    "ash": shaped_energy(pruned(90, "b")),
    "scale": shaped_energy(pruned(85, "scale")),
    "fdbd": slow_head(fdbd),
    "nci": slow_head(nci(1e-4)),
    "relative_mahalanobis": slow_relative_mahalanobis,
    "vim": slow_vim,
    "nnguide": slow_nnguide,
    "gaussian_mixture": slow_gaussian_mixture,
    "mean_shift": slow_mean_shift,
}


@pytest.mark.parametrize("name", DETECTORS)
def test_equals_a_slow_loop(name):
    assert name in SLOW, f"SLOW has no {name}: write it as a slow loop in float64, from its paper, and add it there"
    detector = fitted_once(name)
    scores, classes = SLOW[name](TRAIN, TRAIN_LABELS, QUERIES)
    np.testing.assert_allclose(detector.score(QUERIES), scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(detector.classify(QUERIES), classes)


@pytest.mark.parametrize("k", [1, 50])
def test_deep_knn_and_class_knn_at_other_k(k):
    """Some classes have fewer than 50 images: ClassKNN then counts the mean of what there is."""
    for detector, slow in ((DeepKNN(k), slow_deep_knn), (ClassKNN(k), slow_class_knn)):
        scores, classes = slow(TRAIN, TRAIN_LABELS, QUERIES, k)
        detector.fit(TRAIN, TRAIN_LABELS)
        np.testing.assert_allclose(detector.score(QUERIES), scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(detector.classify(QUERIES), classes)


def test_mahalanobis_equals_scikit_learn():
    """Of one class the tied covariance is the maximum-likelihood one, whose distance scikit-learn has."""
    ours = Mahalanobis().fit(TRAIN, np.full(len(TRAIN), 6)).score(QUERIES)
    np.testing.assert_allclose(ours, EmpiricalCovariance().fit(TRAIN).mahalanobis(QUERIES), rtol=1e-4)


def test_mahalanobis_keeps_the_directions_that_scikit_learn_keeps():
    """Variances from 1 down to 1e-17: those between rounding and 1e-10 of the largest count like all others."""
    generator = np.random.default_rng(0)
    scale = 10.0 ** -np.arange(0, 9, 0.75)
    train, queries = (generator.normal(size=(n, 12)) * scale for n in (300, 50))
    train, queries = (x.astype(np.float32).astype(np.float64) for x in (train, queries))
    expected = EmpiricalCovariance().fit(train).mahalanobis(queries)
    detector = Mahalanobis().fit(train, np.zeros(300, int))
    np.testing.assert_allclose(detector.score(queries), expected, rtol=1e-4)
    assert detector.whitening_.shape[1] == (scale**2 > 12 * 2.2e-16).sum() == 10


def test_mahalanobis_shrinkage():
    """Fully shrunk, it is the Euclidean distance in units of the mean variance."""
    means = np.array([TRAIN[TRAIN_LABELS == label].mean(axis=0, dtype=np.float64) for label in LABELS])
    variance = np.mean((TRAIN - means[np.searchsorted(LABELS, TRAIN_LABELS)]) ** 2)
    distance = ((QUERIES[:, None] - means) ** 2).sum(axis=2).min(axis=1) / variance
    ours = Mahalanobis(shrinkage=1.0).fit(TRAIN, TRAIN_LABELS).score(QUERIES)
    np.testing.assert_allclose(ours, distance, rtol=1e-4)
    away = TRAIN.astype(np.float64).mean(axis=0)
    background = ((QUERIES - away) ** 2).sum(axis=1) / np.mean((TRAIN - away) ** 2)
    ours = RelativeMahalanobis(shrinkage=1.0).fit(TRAIN, TRAIN_LABELS).score(QUERIES)
    np.testing.assert_allclose(ours, distance - background, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="shrinkage: expected 0 to 1, got 2"):
        Mahalanobis(shrinkage=2)


def test_mahalanobis_with_fewer_images_than_dimensions():
    """Equals the pseudo-inverse; whatever leaves the span of the deviations costs nothing."""
    generator = np.random.default_rng(0)
    train, labels = generator.normal(size=(9, 20)).astype(np.float32), np.repeat([0, 1, 2], 3)
    test = generator.normal(size=(30, 20)).astype(np.float32)
    for detector, slow in (
        (Mahalanobis(), slow_mahalanobis),
        (RelativeMahalanobis(), slow_relative_mahalanobis),
    ):
        scores, classes = slow(train, labels, test)
        detector.fit(train, labels)
        np.testing.assert_allclose(detector.score(test), scores, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(detector.classify(test), classes)
    _, _, rows = np.linalg.svd(train - train.mean(axis=0))
    ours = Mahalanobis().fit(train, labels)
    np.testing.assert_allclose(ours.score(test + 100 * rows[-1]), ours.score(test), rtol=1e-2)


def test_mahalanobis_finds_the_class_where_directions_hardly_vary():
    """Whitened, the classes lie 1e5 deviations away from the centre, and close together."""
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 8
    centres = np.zeros((8, 40))
    centres[:, 0], centres[:, 1] = np.where(np.arange(8) < 4, -1, 1), 2e-5 * np.arange(8)
    train, queries = (centres[rows] + 1e-5 * generator.normal(size=(400, 40)) for rows in (labels, labels[::-1]))
    train, queries = train.astype(np.float32), queries.astype(np.float32)
    scores, classes = slow_mahalanobis(train, labels, queries)
    detector = Mahalanobis().fit(train, labels)
    np.testing.assert_array_equal(detector.classify(queries), classes)
    np.testing.assert_allclose(detector.score(queries), scores, rtol=1e-3)


def test_mahalanobis_survives_a_large_offset():
    """Features far from zero: what counts is differences, whose digits the offset must not eat."""
    scores, _ = slow_mahalanobis(TRAIN + 1000, TRAIN_LABELS, QUERIES + 1000)
    ours = Mahalanobis().fit(TRAIN + 1000, TRAIN_LABELS).score(QUERIES + 1000)
    np.testing.assert_allclose(ours, scores, rtol=1e-4)


HEAD = 0.4 * np.random.default_rng(5).normal(size=(4, 12)), np.array([0.5, -0.2, 0.9, 0.4])


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_detectors_with_a_head_of_ones_own(kind):
    head = tuple(kind(part) for part in HEAD)
    for detector, slow in ((ViM(), slow_vim), (NNGuide(), slow_nnguide)):
        scores, classes = slow(TRAIN, TRAIN_LABELS, QUERIES, HEAD)
        detector.fit(TRAIN, TRAIN_LABELS, head=head)
        np.testing.assert_allclose(detector.score(QUERIES), scores, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(detector.classify(QUERIES), classes)


@pytest.mark.parametrize(
    ("detector", "slow"),
    [
        (ReAct(60), shaped_energy(react(60))),
        (ReAct(100), shaped_energy(react(100))),
        (ASH(65, "s"), shaped_energy(pruned(65, "s"))),
        (ASH(50), shaped_energy(pruned(50, "b"))),
        (Scale(65), shaped_energy(pruned(65, "scale"))),
        (FDBD(), slow_head(fdbd)),
        (NCI(0.01), slow_head(nci(0.01))),
    ],
)
def test_shapes_and_boundaries_of_other_parameters(detector, slow, tmp_path):
    """On features as a ReLU leaves them too, some of which are 0 throughout."""
    for change in (lambda x: x, lambda x: np.maximum(x - 0.5, 0)):
        train, queries = change(TRAIN), change(QUERIES)
        scores, classes = slow(train, TRAIN_LABELS, queries, HEAD)
        detector.fit(train, TRAIN_LABELS, head=HEAD)
        np.testing.assert_allclose(detector.score(queries), scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(detector.classify(queries), classes)
        assert np.isfinite(detector.score(np.zeros((1, 12)))).all()
        assert np.isfinite(detector.score(train.mean(axis=0, keepdims=True))).all()
    detector.save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).score(queries), detector.score(queries))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReAct(0), "percentile: expected a number above 0, at most 100, got 0"),
        (lambda: Scale(96), "percentile: expected 0 to 95, got 96"),
        (lambda: ASH(variant="p"), "variant: expected b or s, got 'p'"),
        (lambda: NCI(-1), "alpha: expected at least 0, got -1"),
    ],
)
def test_parameters_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_heads():
    for detector in (ViM(), NNGuide()):
        with pytest.raises(ValueError, match=r"head: expected a weight of shape \(4, 12\), got \(3, 12\)"):
            detector.fit(TRAIN, TRAIN_LABELS, head=(HEAD[0][:3], HEAD[1]))
        with pytest.raises(ValueError, match=r"head: expected a bias of shape \(4,\), got \(3,\)"):
            detector.fit(TRAIN, TRAIN_LABELS, head=(HEAD[0], HEAD[1][:3]))
        with pytest.raises(ValueError, match="head: non-finite values"):
            detector.fit(TRAIN, TRAIN_LABELS, head=(HEAD[0] * np.nan, HEAD[1]))
        with pytest.raises(ValueError, match=r"labels: .*need.*, got None"):
            detector.fit(TRAIN, head=HEAD)
    with pytest.raises(ValueError, match="head: DeepKNN takes none"):
        DeepKNN().fit(TRAIN, TRAIN_LABELS, head=HEAD)


@pytest.mark.parametrize("dimension", [0, 3, 11])
def test_vim_of_other_dimensions(dimension):
    scores, classes = slow_vim(TRAIN, TRAIN_LABELS, QUERIES, dimension=dimension)
    detector = ViM(dimension).fit(TRAIN, TRAIN_LABELS)
    np.testing.assert_allclose(detector.score(QUERIES), scores, rtol=1e-4)
    np.testing.assert_array_equal(detector.classify(QUERIES), classes)


def test_vim_of_a_head_whose_weights_sum_to_zero_over_the_classes():
    """As those of our probe do, up to rounding. The origin is the shortest feature with the same logit everywhere."""
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(4, 12)), generator.normal(size=4)
    weight = (weight - weight.mean(axis=0)).astype(np.float32)
    detector = ViM(5).fit(TRAIN, TRAIN_LABELS, head=(weight, bias))
    differences = np.diff(weight.astype(np.float64), axis=0)  # three of full rank
    origin = -np.linalg.pinv(differences) @ np.diff(bias)
    np.testing.assert_allclose(detector.origin_, origin, rtol=1e-5, atol=1e-6)


def test_vim_needs_something_outside_the_principal_space():
    with pytest.raises(ValueError, match="dimension: expected 0 to 11, below the features' rank, got 12"):
        ViM(12).fit(TRAIN)
    few = TRAIN[:5]  # four directions
    with pytest.raises(ValueError, match="dimension: expected 0 to 3, below the features' rank, got 4"):
        ViM(4).fit(few)
    np.testing.assert_allclose(ViM().fit(few).score(QUERIES), ViM(2).fit(few).score(QUERIES), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 40])
def test_mean_shift_and_nnguide_at_other_k(k):
    scores, _ = slow_mean_shift(TRAIN, TRAIN_LABELS, QUERIES, k)
    np.testing.assert_allclose(MeanShift(k).fit(TRAIN).score(QUERIES), scores, rtol=1e-4, atol=1e-5)
    scores, _ = slow_nnguide(TRAIN, TRAIN_LABELS, QUERIES, HEAD, k)
    ours = NNGuide(k).fit(TRAIN, TRAIN_LABELS, head=HEAD).score(QUERIES)
    np.testing.assert_allclose(ours, scores, rtol=1e-4, atol=1e-5)


def test_gaussian_mixture_of_one_component_and_of_too_many():
    within = np.mean([TRAIN[TRAIN_LABELS == label].var(axis=0) for label in np.sort(TRAIN_LABELS)])
    expected = []
    for label in LABELS:
        members = TRAIN[TRAIN_LABELS == label].astype(np.float64)
        variance = members.var(axis=0) + 0.1 * within
        distance = (QUERIES - members.mean(axis=0)) ** 2 / variance
        expected.append((distance + np.log(2 * np.pi * variance)).sum(axis=1) / 2)
    detector = GaussianMixture(components=1, regularisation=0.1).fit(TRAIN, TRAIN_LABELS)
    np.testing.assert_allclose(detector.score(QUERIES), np.min(expected, axis=0), rtol=1e-4)
    few = GaussianMixture(components=8).fit(TRAIN[:9], [0, 0, 0, 0, 0, 1, 1, 1, 2])
    assert few.starts_.tolist() == [0, 5, 8, 9] and np.isfinite(few.score(QUERIES)).all()
    with pytest.raises(ValueError, match="components: expected at least 1, got 0"):
        GaussianMixture(components=0)
    with pytest.raises(ValueError, match="regularisation: expected a positive number, got 0"):
        GaussianMixture(regularisation=0)


def test_the_seed_decides_the_mixtures():
    scores = [GaussianMixture(8, seed=seed).fit(TRAIN, TRAIN_LABELS).score(QUERIES) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).any()


@pytest.mark.parametrize("name", DETECTORS)
class TestEveryDetector:
    def fitted(self, name):
        """One to change, as if fitted anew."""
        return deepcopy(fitted_once(name))

    def test_unknown_scores_higher(self, name):
        detector = self.fitted(name)
        least = {"ash": 0.6, "scale": 0.8}.get(name, 0.9)  # of twelve values they leave one or two
        assert auroc(detector.score(TEST), detector.score(UNKNOWN)) > least
        assert (detector.classify(TEST) == TEST_LABELS).mean() >= 0.9

    def test_kind_follows_the_input(self, name):
        detector = DETECTORS[name]().fit(torch.from_numpy(TRAIN), torch.from_numpy(TRAIN_LABELS))
        detector.calibrate(torch.from_numpy(TEST))
        given_arrays = self.fitted(name).calibrate(TEST)
        queries = torch.from_numpy(QUERIES).requires_grad_()
        for method, dtype in (("score", torch.float32), ("classify", torch.int64), ("predict", torch.int64)):
            ours = getattr(detector, method)(queries)
            assert isinstance(ours, torch.Tensor) and ours.dtype == dtype and ours.shape == (120,)
            np.testing.assert_array_equal(ours.numpy(), getattr(given_arrays, method)(QUERIES))

    def test_float64_input_is_read_as_float32(self, name):
        ours = DETECTORS[name]().fit(TRAIN.astype(np.float64), TRAIN_LABELS.astype(np.int32))
        np.testing.assert_array_equal(ours.score(QUERIES.astype(np.float64)), self.fitted(name).score(QUERIES))

    def test_any_layout_and_precision(self, name):
        """float16, and arrays whose rows are not contiguous."""
        train, queries = TRAIN.astype(np.float16), QUERIES.astype(np.float16)
        expected = self.fitted(name).score(QUERIES)
        sparse = np.zeros((len(train), 24), np.float32)
        sparse[:, ::2] = train
        for fit, asked in (
            (train, queries),
            (sparse[:, ::2], np.asfortranarray(queries.astype(np.float64))),
            (torch.from_numpy(train.T.copy()).T, torch.from_numpy(queries.T.copy()).T),
        ):
            ours = DETECTORS[name]().fit(fit, TRAIN_LABELS).score(asked)
            np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-5, atol=1e-5)

    def test_small_blocks_change_nothing(self, name, monkeypatch):
        scores = self.fitted(name).score(QUERIES)
        monkeypatch.setattr(arrays, "BLOCK", 12 * 7)
        ours = DETECTORS[name]().fit(TRAIN, TRAIN_LABELS)
        np.testing.assert_allclose(ours.score(QUERIES), scores, rtol=1e-4, atol=1e-5)

    def test_memory_mapped_features(self, name, tmp_path):
        TRAIN.tofile(tmp_path / "train")
        mapped = np.memmap(tmp_path / "train", np.float32, "r", shape=TRAIN.shape)
        ours = DETECTORS[name]().fit(mapped, TRAIN_LABELS)
        np.testing.assert_allclose(ours.score(QUERIES), self.fitted(name).score(QUERIES), rtol=1e-5)

    @pytest.mark.parametrize(("accept", "accepted"), [(0.5, 31), (0.95, 58), (1.0, 60)])
    def test_calibration_accepts_the_share_asked_for(self, name, accept, accepted):
        detector = self.fitted(name).calibrate(TEST, accept)
        rejected = detector.predict(TEST) == -1
        assert accepted == (~rejected).sum()  # of the 61 that the image to come makes; no ties here
        np.testing.assert_array_equal(rejected, detector.score(TEST) > detector.threshold)
        np.testing.assert_array_equal(detector.predict(TEST)[~rejected], detector.classify(TEST)[~rejected])
        scores, labels = detector.assess(TEST)
        np.testing.assert_array_equal(scores, detector.score(TEST))
        np.testing.assert_array_equal(labels, detector.predict(TEST))

    def test_ties_at_the_threshold_are_accepted(self, name):
        held_out = np.repeat(TEST[:2], 10, axis=0)
        detector = self.fitted(name).calibrate(held_out, accept=0.05)
        assert (detector.predict(held_out) != -1).sum() == 10

    def test_predicting_needs_a_threshold(self, name):
        detector = self.fitted(name)
        with pytest.raises(ValueError, match="call calibrate"):
            detector.predict(TEST)
        with pytest.raises(ValueError, match=r"accept: expected a share in \(0, 1\], got 95"):
            detector.calibrate(TEST, accept=95)
        assert detector.calibrate(TEST).fit(TRAIN, TRAIN_LABELS).threshold is None

    def test_bad_input(self, name):
        with pytest.raises(ValueError, match="is not fitted yet"):
            DETECTORS[name]().score(TEST)
        with pytest.raises(ValueError, match="is not fitted yet"):
            DETECTORS[name]().save("nowhere")
        detector = self.fitted(name)
        with pytest.raises(ValueError, match=r"features: expected \[N, 12\], got shape \(60, 11\)"):
            detector.score(TEST[:, :11])
        with pytest.raises(ValueError, match=r"features: expected \[N, 12\], got shape \(12,\)"):
            detector.score(TEST[0])
        with pytest.raises(ValueError, match="features: empty"):
            detector.calibrate(TEST[:0])
        with pytest.raises(ValueError, match="features: 60 non-finite values, first in row 0"):
            detector.classify(np.where(np.arange(12) == 3, np.nan, TEST))
        with pytest.raises(ValueError, match=r"labels: expected one for each of 200 features, got shape \(60,\)"):
            detector.fit(TRAIN, TEST_LABELS)
        with pytest.raises(ValueError, match="labels: -1 in row 4, known classes are >= 0"):
            detector.fit(TRAIN[:6], [0, 0, 1, 1, -1, 2])

    @pytest.mark.parametrize("case", ["few", "duplicates", "all equal", "single", "zeros", "one class"])
    def test_awkward_features_are_finite(self, name, case):
        generator = np.random.default_rng(0)
        train, labels = generator.normal(size=(10, 30)), np.arange(10) % 2 * 5
        if case == "duplicates":
            train = np.repeat(train[:2], 5, axis=0)
        if case == "all equal":
            train[:] = 0.3
        if case == "single":
            labels = np.r_[9, np.zeros(9, int)]
        if case == "zeros":
            train[[2, 3]] = 0
        if case == "one class":
            labels = np.full(10, 4)
        detector = DETECTORS[name]().fit(train, labels)
        queries = np.concatenate([train, generator.normal(size=(5, 30)), np.zeros((2, 30)), 1e6 * train])
        assert np.isfinite(detector.score(queries)).all()
        assert np.isin(detector.classify(queries), labels).all()


def test_deep_knn_resolves_near_duplicates():
    """Distances near 0, where 2 - 2 cos has no digits left in float32."""
    near = unit(TRAIN[:12]) + 1e-5 * np.eye(12)
    scores, _ = slow_deep_knn(TRAIN, TRAIN_LABELS, near.astype(np.float32), k=1)
    np.testing.assert_allclose(DeepKNN(1).fit(TRAIN).score(near), scores, rtol=0.01)
    np.testing.assert_array_equal(DeepKNN(1).fit(TRAIN).score(TRAIN), np.zeros(len(TRAIN)))


@pytest.mark.parametrize("kind", [DeepKNN, MeanShift, ViM])
def test_detectors_without_labels(kind, tmp_path):
    detector = kind().fit(TRAIN)
    np.testing.assert_array_equal(detector.score(TEST), kind().fit(TRAIN, TRAIN_LABELS).score(TEST))
    for method in (detector.classify, detector.calibrate(TEST).predict, detector.assess):
        with pytest.raises(ValueError, match=r"was fitted without labels and cannot name a class"):
            method(TEST)
    detector.save(tmp_path)
    assert load(tmp_path).classes_ is None
    np.testing.assert_array_equal(load(tmp_path).score(TEST), detector.score(TEST))


@pytest.mark.parametrize("kind", [kind for kind in DETECTORS.values() if kind.NEEDS_LABELS])
def test_other_detectors_ask_for_labels(kind):
    with pytest.raises(ValueError, match=rf"labels: {kind.__name__} needs them, got None"):
        kind().fit(TRAIN)


def test_deep_knn_names_the_nearest_images():
    similarity, rows = DeepKNN().fit(TRAIN).neighbours(torch.from_numpy(TEST), k=3)
    cosine = unit(TEST) @ unit(TRAIN).T
    np.testing.assert_array_equal(rows, np.argsort(-cosine, axis=1)[:, :3])
    np.testing.assert_allclose(similarity, np.sort(cosine, axis=1)[:, :-4:-1], atol=1e-6)


def test_zero_features_score_as_documented():
    zero = np.zeros((1, 12))
    assert DeepKNN().fit(TRAIN).score(zero) == pytest.approx(1)
    assert ClassKNN().fit(TRAIN, TRAIN_LABELS).score(zero).tolist() == [0]
    assert Mahalanobis().fit(np.full((4, 2), 0.3), [0, 0, 1, 1]).score([[5, 5]]).tolist() == [0]


def test_class_knn_where_similarities_are_negative():
    """Resembling one class stays known although the sum is negative; resembling none is above any ratio."""
    train, labels = np.array([[1.0, 0], [-1, 0.1], [-1, -0.1]]), [0, 1, 2]
    detector = ClassKNN(1).fit(train, labels)
    resembles_one, resembles_none = detector.score([[1.0, 0], [0, 1]]), detector.score([[0.0, 0]])
    assert resembles_one[0] < -1 and np.isfinite(resembles_one).all() and resembles_none[0] == 0
    none = ClassKNN(1).fit([[1.0, 0], [1, 0.1]], [0, 1]).score([[-1.0, 0], [-100.0, 0]])
    assert none[0] == none[1] > 0  # a feature's length says nothing


def test_k_larger_than_the_training_set():
    for kind in (DeepKNN, ClassKNN, MeanShift, NNGuide):
        with pytest.raises(ValueError, match="k=11 is larger than the number of reference features, 10"):
            kind(k=11).fit(TRAIN[:10], TRAIN_LABELS[:10])
        with pytest.raises(ValueError, match="k=0 is smaller than 1"):
            kind(k=0).fit(TRAIN, TRAIN_LABELS)
        with pytest.raises(ValueError, match=r"k=2.5 is no whole number"):
            kind(k=2.5).fit(TRAIN, TRAIN_LABELS)


def test_blocks_are_small_where_classes_are_more_than_dimensions(monkeypatch):
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(300, 4)).astype(np.float32), np.arange(300) % 100
    detector, seen = GEN().fit(features, labels), []
    expected = detector.score(features)
    assess = detector._assess
    monkeypatch.setattr(detector, "_assess", lambda block: seen.append(len(block)) or assess(block))
    monkeypatch.setattr(arrays, "BLOCK", 5000)
    np.testing.assert_allclose(detector.score(features), expected, rtol=1e-5)
    assert seen == [50] * 6


def test_class_means_equal_a_loop_over_classes(monkeypatch):
    generator = np.random.default_rng(0)
    features, positions = generator.normal(size=(500, 7)).astype(np.float32), generator.integers(40, size=500)
    expected = [features[positions == number].astype(np.float64).mean(axis=0) for number in range(40)]
    np.testing.assert_allclose(class_means(features, positions, 40), expected, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(arrays, "BLOCK", 7 * 60)  # nine blocks, and each class in several of them
    np.testing.assert_allclose(class_means(features, positions, 40), expected, rtol=1e-12, atol=1e-14)


def test_a_head_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    weight, bias = torch.randn(3, 5, generator=generator).bfloat16(), torch.zeros(3).bfloat16()
    found = MSP().fit(features, labels, head=(weight, bias)).score(features)
    torch.testing.assert_close(found, MSP().fit(features, labels, head=(weight.float(), bias.float())).score(features))
