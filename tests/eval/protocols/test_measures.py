"""The loop over measures, what gradmix-eval adds when asked, and feature quality while training."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.detectors import Detector
from gradmix.eval.protocols.closed_set import Majority
from gradmix.eval.protocols.evaluate import evaluate
from gradmix.eval.protocols.measure import Measure, Skipped
from gradmix.eval.protocols.measures import can_be_measured, measure_all
from gradmix.eval.protocols.online import OnlineQuality, watchers
from gradmix.eval.protocols.subject import Subject
from gradmix.eval.quality import class_spread, effective_rank
from gradmix.ssl.config import Config, DataConfig
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.open_set import OpenSetData, load_data
from gradmix.ssl.runs.folder import read_config
from gradmix.ssl.train import train


def test_what_no_measure_needs_is_not_looked_for():
    class Answers:
        def lacks(self, need):
            assert need == "pixels"
            return "there are none"

    needy = SimpleNamespace(name="a", KIND="kind", needs=("pixels",))
    assert can_be_measured([needy], Answers()) == ([], {"raw pixels": "there are none"})


def test_the_majority_is_the_training_images():
    train, test = (SimpleNamespace(labels=torch.tensor(labels)) for labels in ([0, 0, 0, 1], [1, 1, 0, -1]))
    data = SimpleNamespace(train=train, test=test, classes=["a", "b"])
    numbers = dict(Majority().measure(SimpleNamespace(data=data, known=test.labels >= 0)))
    assert numbers["majority/top1"] == pytest.approx(1 / 3)


def test_many_knn_settings_are_scikit_learns(command, tmp_path, digits_run):
    """On an open-set subset: six of ten digits are known, the test set has all."""
    result = command("eval", f"run={digits_run}", "knn_k=[1,5,50]", "knn_temperature=[0.07,1]", "out=out")
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "out/metrics.json").read_text())
    fit, test = (load_file(tmp_path / f"out/features/{name}.safetensors") for name in ("train", "test"))
    known = test["labels"] >= 0
    bank, queries = (normalize(part["features"].double().numpy()) for part in (fit, test))
    for k in (1, 5, 50):
        for t in (0.07, 1):
            vote = KNeighborsClassifier(k, weights=lambda d, t=t: np.exp((1 - d**2 / 2) / t), algorithm="brute")
            right = vote.fit(bank, fit["labels"]).predict(queries[known]) == test["labels"].numpy()[known]
            assert numbers[f"knn/k={k},t={t:g}/top1"] == pytest.approx(right.mean(), abs=0.006)
    assert numbers["knn/top1"] == json.loads((digits_run / "metrics.json").read_text())["knn/top1"]
    assert numbers["quality/effective_rank"] == pytest.approx(effective_rank(fit["features"]))
    assert numbers["quality/class_spread"] == pytest.approx(class_spread(fit["features"], fit["labels"]))
    assert numbers["quality/alignment"] > 0
    labels, right = fit["labels"].numpy(), test["labels"][known].numpy()
    assert numbers["majority/top1"] == pytest.approx((right == np.bincount(labels).argmax()).mean())
    scaler = StandardScaler().fit(fit["features"])
    theirs = LogisticRegression(max_iter=5000).fit(scaler.transform(fit["features"]), labels)
    expected = theirs.score(scaler.transform(test["features"][known]), right)
    assert numbers["linear/top1"] == pytest.approx(expected, abs=0.04)  # another strength of decay


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("knn_k=[0]", "knn_k: expected at least 1, got 0"),
        ("knn_k=[5000]", "knn_k: expected 1 to 646, the size of the training set, got 5000"),
        ("knn_temperature=[0]", "knn_temperature: expected a number above 0, got 0.0"),
        ("protocols=[linear]", "protocols: expected some of cached, augmented, finetune, got 'linear'"),
        ("few_labels=[5000]", "few_labels: 5000 images of each class asked for"),
        ("few_labels=[few]", "few_labels: expected a share such as 1%"),
    ],
)
def test_bad_settings_are_one_line(command, digits_run, argument, message):
    before = (digits_run / "metrics.json").read_bytes()
    result = command("eval", f"run={digits_run}", argument)
    assert result.code == 2 and message in result.err and len(result.err.strip().splitlines()) == 1
    assert (digits_run / "metrics.json").read_bytes() == before


def test_quality_over_training_changes_nothing_else(digits_run, tmp_path):
    config = read_config(digits_run)
    config.run_dir, config.quality_every = str(tmp_path / "run"), 1
    data = load_data(config.data, config.seed)
    callbacks = watchers(data, config)
    assert any(isinstance(callback, OnlineQuality) for callback in callbacks)
    train(config, data, callbacks)
    ours, theirs = (load_file(folder / "backbone.safetensors") for folder in (tmp_path / "run", digits_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for name in ("alignment", "uniformity", "effective_rank", "class_spread"):
        assert len(events.Scalars(f"quality/{name}")) == 2  # one an epoch


def test_features_beyond_memory_give_the_same_numbers(command, tmp_path, digits_run):
    small = ("data=digits", "data.split=0", "data.holdout=0.1", "detectors=[deep_knn,mahalanobis,vim]")
    for name, memory in (("whole", 4), ("mapped", 1e-6)):
        result = command("eval", f"run={digits_run}", *small, f"data.memory_gib={memory}", f"out={name}")
        assert result.code == 0, result.err
    whole, mapped = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "mapped"))
    assert mapped["skipped"]["raw pixels"] == "they exceed data.memory_gib"
    numbers = [key for key, value in whole.items() if isinstance(value, float) and "pixels" not in key]
    assert {"knn/top1", "linear/top1", "osr/vim/auroc", "quality/class_spread"} < set(numbers)
    for key in numbers:
        assert mapped[key] == pytest.approx(whole[key], abs=0.006), key


class Wants(Measure):
    def __init__(self, kind, *needs):
        self.KIND, self.needs = kind, needs

    def measure(self, subject):
        yield f"{self.KIND}/a", 1.0
        yield f"{self.KIND}/b", Skipped("too far")


def subject_with(labels, spaces=("features",), classes=("a",), memory=1.0):
    images = ImageSet(torch.tensor(labels), 8, torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8))
    config = Config(data=DataConfig(name="x", memory_gib=memory))
    data = OpenSetData(images, images, images, list(classes), [], [0])
    return Subject(config, data, torch.nn.Identity(), torch.device("cpu"), {space: {} for space in spaces})


def test_detectors_share_one_probe_in_every_space(monkeypatch):
    fitted, fit = [], LinearProbe.fit
    monkeypatch.setattr(LinearProbe, "fit", lambda self, *arrays: fitted.append(self.device) or fit(self, *arrays))
    subject = subject_with([0, 1] * 10, (), ("a", "b"))
    generator = torch.Generator().manual_seed(0)
    for space in ("features", "projections", "start"):
        subject.spaces[space] = {"train": torch.randn(20, 4, generator=generator)}
        for name in ("msp", "energy", "max_logit", "mahalanobis"):
            subject.detector(name, space)
        head = subject.detector("energy", space).head_
        np.testing.assert_array_equal(head[:, :-1], subject.linear_probe(space).weight_)
    assert fitted == [subject.device] * 3


def test_what_is_missing_is_said_once_for_all_measures_that_need_it():
    measures = [
        Wants("one", "features", "classes"),
        Wants("two", "classes", "pixels"),
        Wants("two", "projections", "classes"),
        Wants("three", "unknown images", "classes", "features"),
    ]
    everything = subject_with([0, -1], ("features", "projections"))
    result, skipped = measure_all(measures, everything)
    assert list(result) == ["one/a", "two/a", "three/a"]
    assert skipped == dict.fromkeys(["one/b", "two/b", "three/b"], "too far")
    _, skipped = measure_all(measures, subject_with([-1, -1], classes=(), memory=1e-9))
    assert skipped == {
        "two": "the checkpoint has no projection head",
        "one, two, three": "the images have no classes",
    }
    result, skipped = measure_all(measures, subject_with([0, 0], ("features", "projections"), memory=1e-9))
    assert list(result) == ["one/a", "two/a"]
    assert skipped["raw pixels"] == "they exceed data.memory_gib"
    assert skipped["three"] == "the test set has no unknown classes"
    _, skipped = measure_all(measures[:1], subject_with([-1, -1]))
    assert skipped == {"one": "the test set has no images of known classes"}


def test_what_is_missing_beside_features_is_no_checkpoints_fault():
    subject = replace(subject_with([0, 1]), encoder=None)
    assert subject.lacks("projections") == "there are features, and no projections"


def test_each_detector_is_fitted_once(digits_run, tmp_path, monkeypatch):
    """By features and labels alone, where it takes no head: detectors from outside may know no more."""
    fits, fit = [], Detector.fit
    monkeypatch.setattr(Detector, "fit", lambda self, *arrays: fits.append(self.NAME) or fit(self, *arrays))
    config = read_config(digits_run)
    evaluate(digits_run, config, load_data(config.data, config.seed), out=tmp_path / "out")
    assert sorted(fits) == ["class_knn", "deep_knn", "deep_knn", "mahalanobis"]  # deep_knn on the raw pixels too
