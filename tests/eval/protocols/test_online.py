"""What is watched while training is what the evaluation afterwards says."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmix.eval.protocols import online
from gradmix.ssl.config import Config, DataConfig
from gradmix.ssl.data.open_set import load_data


def test_the_last_look_is_the_result(command, tmp_path):
    """At the test images as metrics.json has it; at the held-out ones as scikit-learn has it, of the run's features."""
    quick = ("epochs=3", "encoder.width=4", "test_every=2", "knn_every=1", "trainer.accelerator=cpu")
    assert command("pretrain", *quick, "pictures_every=0", "run_dir=run").code == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    an_epoch = metrics["train/steps"] // 3
    for key in ("knn/top1", "osr/deep_knn/auroc"):
        curve = events.Scalars(f"test/{key}")
        assert [event.step for event in curve] == [2 * an_epoch, 3 * an_epoch]  # every second, and the last
        assert curve[-1].value == pytest.approx(metrics[key], abs=1e-6)
    held_out = events.Scalars("knn/held_out")
    assert [event.step for event in held_out] == [an_epoch, 2 * an_epoch, 3 * an_epoch]
    bank, asked = (load_file(tmp_path / f"run/features/{name}.safetensors") for name in ("train", "held_out"))
    knn = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = knn.fit(bank["features"], bank["labels"]).score(asked["features"], asked["labels"])
    assert held_out[-1].value == pytest.approx(expected, abs=1.5 / len(asked["labels"]))  # a tie may fall either way


def test_without_unknown_test_images_the_accuracy_alone_is_watched():
    for known, watched in ((None, ["knn", "osr/deep_knn"]), (list(range(10)), ["knn"])):
        config = Config(data=DataConfig(name="digits", image_size=8, split=None if known else 0, known=known))
        measures = online.OnlineTest(load_data(config.data, 0), config).measures
        assert [measure.name for measure in measures] == watched


def test_of_many_training_images_evenly_spaced_ones_are_compared_with(monkeypatch):
    data = load_data(DataConfig(name="digits", image_size=8, split=0), 0)
    monkeypatch.setattr(online, "BANK", 5)
    some = online.watched(data, data.held_out)
    rows = np.linspace(0, len(data.train) - 1, 5).astype(int)
    assert torch.equal(some.train.pixels, data.train.pixels[rows]) and some.test is data.held_out
    assert not len(some.held_out)
