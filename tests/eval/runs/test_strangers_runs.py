"""A run's folder of someone else: what is measured counts, what is not there is said, nothing is waited for."""

import json
import os
import shutil

import pytest
from PIL import Image

from gradmix.eval.runs.folder import read_run
from gradmix.eval.runs.numbers import read_metrics, read_training


@pytest.fixture
def run(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "run")


def test_recorded_numbers_never_replace_measured_ones(run, command):
    measured = json.loads((run / "metrics.json").read_text())["knn/top1"]
    said = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps({**said, "knn/top1": 1.0}))
    result = command("eval", "run=run")
    assert result.code == 2 and "training.json: 'knn/top1': a training measures no such number" in result.err
    assert json.loads((run / "metrics.json").read_text())["knn/top1"] == measured != 1.0


@pytest.mark.parametrize("change", [{"train/steps": "many"}, {"train/precision": 16}, {"command": 1}, {"skipped": "x"}])
def test_a_training_record_is_looked_at(change, run):
    (run / "training.json").write_text(json.dumps({**json.loads((run / "training.json").read_text()), **change}))
    with pytest.raises(ValueError, match=r"training\.json: "):
        read_training(run / "training.json")


@pytest.mark.parametrize(
    "change",
    [
        {"knn/top1": "1"},
        {"osr/deep_knn/fpr95_known": None},
        {"knn/top1": [1]},
        {"osr/deep_knn/auroc": True},
        {"train/steps": {}},
        {"skipped": []},
        {"detector_options": {"deep_knn": 1}},
        {"data/unknown_root": 3},
        {"data": {"name": "digits"}},
        {"anything": {"a": {"b": 1}}},
    ],
)
def test_metrics_are_numbers(change, run):
    read_metrics(run / "metrics.json")
    (run / "metrics.json").write_text(json.dumps({**json.loads((run / "metrics.json").read_text()), **change}))
    with pytest.raises(ValueError, match=r"metrics\.json: "):
        read_metrics(run / "metrics.json")


def test_nothing_waits_for_a_pipe(run):
    for path in (next((run / "tensorboard").glob("events*")), run / "metrics.json", run / "config.yaml"):
        copy = path.with_name("kept")
        path.rename(copy)
        os.mkfifo(path)
        with pytest.raises(ValueError, match=r"no regular file|is missing"):
            read_run(run)
        path.unlink()
        copy.rename(path)
    read_run(run)


def test_names_that_can_not_be_written_are_found_before_training(command, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for row in range(4):
            Image.new("RGB", (8, 8), (row, 0, 0)).save(tmp_path / "photos" / name / f"{row}.png")
    settings = ("data=imagefolder", "data.root=photos", "data.image_size=8", "run_dir=run")
    odd = tmp_path / "photos/cat" / os.fsdecode(b"caf\xe9.png")
    shutil.copy(tmp_path / "photos/cat/0.png", odd)
    result = command("pretrain", *settings)
    assert result.code == 2 and r"caf\udce9.png': the name is not UTF-8; rename the file" in result.err
    assert len(result.err.strip().splitlines()) == 1 and not (tmp_path / "run/config.yaml").exists()
    odd.unlink()
    (tmp_path / "photos/dog").rename(tmp_path / "photos/unknown")
    result = command("pretrain", *settings)
    assert result.code == 2 and "a known class is called 'unknown'" in result.err
