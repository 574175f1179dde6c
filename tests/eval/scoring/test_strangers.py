"""A detector's folder and images of someone else: nothing is overwritten, nothing silently wrong."""

import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture
def detector(digits_run, tmp_path):
    return shutil.copytree(digits_run / "detector", tmp_path / "detector")


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(load_digits().images[:6]):
        Image.fromarray((image * 15).astype(np.uint8)).save(tmp_path / "photos" / f"{i:02d}.png")
    return tmp_path / "photos"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "settings",
    [
        ("images=photos/00.png", "out=photos/00.png"),
        ("images=photos/*.png", "out=photos/01.png"),
        ("images=photos", "out=photos/scores.csv"),
        ("images=photos", "out=detector/scorer.json"),
        ("images=photos", "out=detector/scores.csv"),
        ("images=photos", "out=scores.csv", "explain=photos/sheets"),
        ("images=photos", "out=scores.csv", "explain=detector"),
        ("images=photos/00.png", "out=photos/01.png"),  # no input, but no scores either
    ],
)
def test_an_output_is_no_input(settings, command, detector, photos, tmp_path):
    before = contents(tmp_path)
    result = command("score", f"detector={detector}", *settings)
    assert result.code == 2 and len(result.err.strip().splitlines()) == 1, result
    assert result.err.startswith(("gradmix-score: out:", "gradmix-score: explain:"))
    assert contents(tmp_path) == before


def test_scores_replace_scores(command, detector, photos):
    for name in ("scores.csv", "scores.jsonl"):
        for _ in range(2):
            assert command("score", f"detector={detector}", "images=photos", f"out={name}").code == 0


def test_runs_are_not_written_over_data(command, tmp_path):
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
    result = command("pretrain", "data=imagefolder", "data.root=photos", "run_dir=photos/run")
    assert result.code == 2 and "run_dir: photos/run lies in photos, which is read" in result.err
    result = command(
        "eval", "checkpoint=x.pth", "encoder=resnet18", "data=imagefolder", "data.root=photos", "out=photos/a"
    )
    assert result.code == 2 and "out: photos/a lies in photos, which is read" in result.err
