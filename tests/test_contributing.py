"""CONTRIBUTING.md's package, built and installed as printed: a mixer, detector, measure, data set and method from
outside."""

import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from gradmix.eval.detectors import DETECTORS, load
from gradmix.mixing import MIXERS, CutMix

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
SMALL = ("epochs=1", "batch_size=32", "encoder.width=4", "knn_k=5", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the package is installed in."""
    files = defaultdict(str)
    for name, text in re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', PAGE, re.M | re.S):
        files[name] += text
    assert {"pyproject.toml", "toys/__init__.py"} < set(files)
    package, site = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    quiet = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", str(site), str(package)], check=True)
    return site


@pytest.fixture
def toys(installed, monkeypatch, command):
    monkeypatch.syspath_prepend(installed)
    return command


def test_the_commands_on_the_page(toys, tmp_path):
    lines = re.findall(r"^gradmix-(\w+) (.*)$", PAGE, re.M)
    assert [name for name, _ in lines] == ["pretrain", "eval"]
    result = toys("pretrain", *shlex.split(lines[0][1]), *SMALL)
    assert result.code == 0, result.err
    assert "3 known classes: across, down, cross; 1 unknown" in result.out
    assert "half with mix=strip" in result.out
    first = json.loads((tmp_path / "runs/bars/metrics.json").read_text())
    assert 0 <= first["osr/mean_ratio/auroc"] <= 1
    assert first["train/kept"] == pytest.approx(0.75)  # the mixer was given its share, and asked
    report = (tmp_path / "runs/bars/report.html").read_text()
    assert "<code>mix.options.share</code>" in report and "mean_ratio" in report
    result = toys("eval", *shlex.split(lines[1][1]))
    assert result.code == 0, result.err
    again = json.loads((tmp_path / "runs/bars/metrics.json").read_text())
    assert "osr/deep_knn/auroc" not in again
    assert again["osr/mean_ratio/auroc"] == pytest.approx(first["osr/mean_ratio/auroc"])  # a power keeps the order

    assert "knn/worst_class" not in first  # nobody asked for it
    fit, test = (load_file(tmp_path / f"runs/bars/features/{name}.safetensors") for name in ("train", "test"))
    vote = KNeighborsClassifier(5, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    predicted = vote.fit(normalize(fit["features"]), fit["labels"]).predict(normalize(test["features"]))
    known = test["labels"] >= 0
    recalls = recall_score(test["labels"][known], predicted[known], average=None)
    assert again["knn/worst_class"] == pytest.approx(recalls.min(), abs=0.04) and again["knn/top1"] >= recalls.min()
    result = toys("eval", "run=runs/bars", "measures=[worst_clas]")
    assert result.code == 2 and "measures: no 'worst_clas'; did you mean worst_class?" in result.err


def test_a_detector_from_outside_is_saved_and_found_again(toys, tmp_path):
    features = np.random.default_rng(0).normal(size=(40, 5))
    fitted = DETECTORS["mean_ratio"](power=2.0).fit(features, np.arange(40) % 4)
    fitted.save(tmp_path / "saved")
    assert np.array_equal(load(tmp_path / "saved").score(features), fitted.score(features))


def test_mistakes_in_names_and_options_from_outside(toys):
    for arguments, message in (
        (["data=bars", "data.split=2"], "data.split: 2 does not exist; choose 0-1, or all"),
        (["mix=stripe"], "mix: no option 'stripe'; did you mean strip?"),
        (["mix.name=stripe"], "mix.name: no 'stripe'; did you mean strip?"),
        (["detectors=[mean_rati]"], "detectors: no 'mean_rati'; did you mean mean_ratio?"),
        (["data=bar"], "data: no option 'bar'; did you mean bars?"),
        (["mix=strip", "mix.options.shar=1"], "mix.options.shar: strip has no such argument; did you mean share?"),
    ):
        result = toys("pretrain", *SMALL, *arguments, "run_dir=run")
        assert result.code == 2 and message in result.err
        assert len(result.err.strip().splitlines()) == 1


def test_a_package_that_does_not_import_is_named_and_ours_cannot_be_replaced(tmp_path, monkeypatch, command):
    info = tmp_path / "site" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gradmix.mixers]\nlost = nowhere:Lost\ncutmix = nowhere:CutMix\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    result = command("pretrain", "mix.name=lost", *SMALL, "run_dir=run")
    assert result.code == 2
    assert "gradmix.mixers: lost = nowhere:Lost of the package broken can't be loaded" in result.err
    assert "No module named 'nowhere'" in result.err
    assert MIXERS["cutmix"] is CutMix


def test_config_files_from_any_folder(command, tmp_path):
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/gentle.yaml").write_text("name: gentle\nselfsup: 0.5\n")
    result = command("pretrain", "--config-dir=conf", "method=gentle", *SMALL, "pictures_every=0", "run_dir=run")
    assert result.code == 0 and "gentle with mix=gradmix" in result.out, result.err
    report = (tmp_path / "run/report.html").read_text()
    assert re.search(r"<code>method.name</code></th><td[^>]*>joint</td><td[^>]*>gentle</td>", report)
