"""What fails last is tried first: an output that can't be put in place is refused before any work. And what can only be
seen at the end, features that are not finite, is said then."""

import json
import os
import subprocess
import sys

import pytest

from gradmix.ssl.runs.folder import FILES, FOLDERS

TINY = ("epochs=1", "batch_size=128", "encoder.width=4", "data.image_size=8", "knn_every=0", "pictures_every=0")
QUICK = (*TINY, "trainer.accelerator=cpu", "detectors=[deep_knn]")


def test_the_list_of_what_a_run_writes_is_whole(digits_run):
    there = {path.name for path in digits_run.iterdir()}
    assert there <= {*FILES, *FOLDERS}
    assert {path.name for path in digits_run.iterdir() if path.is_dir()} <= {*FOLDERS}
    assert {*FILES} <= there


@pytest.mark.parametrize("name", ["metrics.json", "head.safetensors", "detector", "checkpoints"])
def test_a_run_that_could_not_be_written_does_not_begin(command, tmp_path, name):
    (tmp_path / "run").mkdir()
    wrong = tmp_path / "run" / name
    wrong.touch() if name in FOLDERS else wrong.mkdir()
    result = command("pretrain", *QUICK, "run_dir=run")
    assert result.code == 2 and result.err.startswith("gradmix-pretrain: run_dir: ") and name in result.err, result.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "key", "arguments"),
    [
        ("score", "explain", ["detector=RUN/detector", "images=a.png", "explain=taken", "out=new.csv"]),
        ("compare", "out", ["RUN", "out=folder.html"]),
        ("compare", "out", ["RUN", "out=taken/new.html"]),
        ("eval", "out", ["run=RUN", "out=taken"]),
        ("eval", "out", ["run=RUN", "out=taken/new"]),
        ("embed", "out", ["run=RUN", "images=a.png", "out=taken/new.npy"]),
        ("detector", "out", ["add", "RUN/detector", "images=a.png", "class=2", "out=taken/new"]),
        ("detector", "out", ["remove", "RUN/detector", "class=2", "out=taken/new"]),
        ("detector", "out", ["export", "RUN/detector", "out=taken/new.onnx"]),
        ("detector", "out", ["export", "RUN/detector", "out=folder.onnx"]),
    ],
)
def test_an_output_that_could_not_be_put_in_place(command, digits_run, tmp_path, name, key, arguments):
    (tmp_path / "taken").touch()
    for folder in ("folder.html", "folder.onnx"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a.png").touch()  # no image: said where the work begins
    result = command(name, *(argument.replace("RUN", str(digits_run)) for argument in arguments))
    assert result.code == 2 and result.err.startswith(f"gradmix-{name}: {key}: "), result.err
    assert len(result.err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.png", "folder.html", "folder.onnx", "taken"]


def test_a_training_that_diverged_is_said(command, tmp_path):
    """All weights are finite, and so large that no feature is: skipping steps does not see it."""
    wild = ("optimizer=sgd", "optimizer.base_lr=1e25", "on_nonfinite=skip", "max_skipped_steps=1000")
    for _ in range(2):
        result = command("pretrain", *QUICK, *wild, "run_dir=run")
        assert result.code == 2 and len(result.err.strip().splitlines()) == 1, result.err
        assert "the network's features are not finite" in result.err and "optimizer.base_lr" in result.err
    assert not (tmp_path / "run/metrics.json").exists()
    assert json.loads((tmp_path / "run/training.json").read_text())["train/steps"] == 5


def test_comparing_on_a_terminal_that_has_only_ascii(digits_run, tmp_path):
    """The table has arrows and the sign ±, and the page is UTF-8 whatever the locale says."""
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "from gradmix.eval.commands.compare import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, digits_run], cwd=tmp_path, env={**os.environ, **ascii_only}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b"" and "kNN" in done.stdout.decode("ascii") and "\\u2191" in done.stdout.decode("ascii")
    assert "↑" in (tmp_path / "compare.html").read_bytes().decode("utf-8")
