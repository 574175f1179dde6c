"""A run's numbers against scikit-learn on the features that the run saved."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import normalize

from gradmix.eval.evaluate import parse_detector
from gradmix.eval.features import raw_pixels
from gradmix.ssl.images import ImageSet

SMALL = ("epochs=1", "encoder.width=4", "trainer.accelerator=cpu")


def test_all_splits_in_one_command(command, tmp_path):
    result = command("pretrain", *SMALL, "data.split=all", "run_dir=all")
    assert result.code == 0, result.err
    assert "±" in result.out
    runs = [json.loads((tmp_path / f"all/split-{i}/metrics.json").read_text()) for i in range(5)]
    summary = json.loads((tmp_path / "all/metrics.json").read_text())
    for key in ("osr/deep_knn/auroc", "osr/pixels/oscr", "knn/top1"):
        values = np.array([run[key] for run in runs])
        assert summary[key] == pytest.approx(values.mean())
        assert summary[f"{key}/std"] == pytest.approx(values.std(ddof=1))

    # The first of them, against scikit-learn on the saved features
    run = tmp_path / "all/split-0"
    train, test = (load_file(run / "features" / f"{name}.safetensors") for name in ("train", "test"))
    known = test["labels"].numpy() >= 0
    bank, queries = (normalize(part["features"].double().numpy()) for part in (train, test))
    fifth = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(bank).kneighbors(queries)[0][:, 4]
    assert runs[0]["osr/deep_knn/auroc"] == pytest.approx(roc_auc_score(~known, fifth), abs=1e-4)

    vote = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    right = vote.fit(bank, train["labels"]).predict(queries[known]) == test["labels"].numpy()[known]
    assert runs[0]["knn/top1"] == pytest.approx(right.mean(), abs=0.003)


def test_the_raw_pixel_baseline_does_not_depend_on_the_run(command, tmp_path):
    command("pretrain", *SMALL, "run_dir=a")
    command("pretrain", *SMALL, "seed=0", "mix=none", "run_dir=b")
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "ab")
    pixels = [key for key in a if "pixels" in key]
    assert len(pixels) > 5
    assert all(a[key] == b[key] for key in pixels)
    assert a["osr/deep_knn/auroc"] != b["osr/deep_knn/auroc"]


def test_large_images_are_averaged_down_for_the_pixel_baseline():
    images = torch.randint(0, 256, (3, 3, 64, 64)).to(torch.uint8)
    got = raw_pixels(ImageSet(torch.zeros(3).long(), 64, images)).view(3, 3, 32, 32)
    blocks = images.double().view(3, 3, 32, 2, 32, 2).mean((3, 5)) / 255
    torch.testing.assert_close(got.double(), blocks, atol=1e-6, rtol=0)


def test_detector_entries():
    assert parse_detector("deep_knn")[0::2] == ("deep_knn", "features")
    assert parse_detector("class_knn")[0::2] == ("class_knn", "projections")
    assert parse_detector("class_knn@features")[0::2] == ("class_knn_features", "features")
    with pytest.raises(ValueError, match="expected @features or @projections"):
        parse_detector("deep_knn@pixels")
