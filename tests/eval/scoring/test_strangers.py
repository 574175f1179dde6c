"""A detector's folder and images of someone else: nothing is overwritten, nothing silently wrong."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from gradmix.eval.scoring.scorer import Scorer


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
        ("images=photos", "out=scores.txt"),
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


def resealed(detector, name, change):
    """Change a manifest and make every hash right again, as who sends it would."""
    from tests.stress.broken import seal

    said = json.loads((detector / name).read_text())
    change(said)
    (detector / name).write_text(json.dumps(said))
    seal(detector)


def rearranged(detector, change):
    """Change the fitted arrays, likewise."""
    from safetensors.numpy import load_file, save_file

    from tests.stress.broken import seal

    arrays = load_file(detector / "detector.safetensors")
    save_file(change(arrays), detector / "detector.safetensors")
    seal(detector)


ARRAYS = {
    "bank_: non-finite values": lambda a: {**a, "bank_": a["bank_"] * np.float32("nan")},
    "bank_: expected rows of length 1": lambda a: {**a, "bank_": a["bank_"] * 2},
    "positions_: expected .rows. with rows": lambda a: {**a, "bank_": a["bank_"][:-1].copy()},
    "positions_: expected 0 to 5, got -1": lambda a: {**a, "positions_": a["positions_"] - 1},
    "positions_: expected numbers of another type": lambda a: {**a, "positions_": a["positions_"].astype("f8")},
    "classes_: expected rising numbers": lambda a: {**a, "classes_": a["classes_"] - 1},
    "classes: 6 names, the detector's last is number 6": lambda a: {**a, "classes_": a["classes_"] + 1},
    "'more': nothing that this detector has": lambda a: {**a, "more": a["classes_"]},
    "bank_: expected .rows, width. with width = 32": lambda a: {**a, "bank_": a["bank_"][:, :8].copy()},
}


@pytest.mark.parametrize("message", ARRAYS)
def test_arrays_that_make_no_sense(message, detector):
    rearranged(detector, ARRAYS[message])
    with pytest.raises(ValueError, match=message):
        Scorer(detector)


MANIFESTS = [
    ("detector.json", lambda m: m.update(threshold=float("nan")), "NaN is no number"),
    ("detector.json", lambda m: m.update(threshold="0"), "threshold: expected a number or null, got '0'"),
    ("detector.json", lambda m: m.update(files={}), r"files: expected detector\.safetensors alone"),
    ("detector.json", lambda m: m["parameters"].update(k=0), "k=0 is smaller than 1"),
    ("detector.json", lambda m: m["parameters"].update(k=10**6), "k=1000000 is larger"),
    ("detector.json", lambda m: m["parameters"].update(k="5"), "parameters: k: expected a whole number, got '5'"),
    ("detector.json", lambda m: m.update(index={"factory": "IVF9,Flat", "effort": 1}), "'centres_': missing"),
    ("detector.json", lambda m: m.update(index={"factory": "PQ4", "effort": 1}), "'PQ4' is not read from a file"),
    ("detector.json", lambda m: m.update(index={"factory": "HNSW999", "effort": 1}), "'HNSW999' is too large"),
    ("detector.json", lambda m: m.update(width=10**30), "width: expected a whole number, got a number beyond 64 bits"),
    ("detector.json", lambda m: m.update(detector="os.system"), "no 'os.system'"),
    ("scorer.json", lambda m: m.update(files={}), "files: expected backbone.safetensors, detector.json"),
    ("scorer.json", lambda m: m["classes"].__setitem__(0, "unknown"), "a known class is called 'unknown'"),
    ("scorer.json", lambda m: m["classes"].__setitem__(0, "4"), "two classes are called '4'"),
    ("scorer.json", lambda m: m.update(classes="245983"), "classes: expected a list, got '245983'"),
    ("scorer.json", lambda m: m.update(train_files=["a.png"]), "files: expected|train_files: 1 names"),
]


@pytest.mark.parametrize(("name", "change", "message"), MANIFESTS, ids=[message for *_, message in MANIFESTS])
def test_manifests_that_make_no_sense(name, change, message, detector):
    resealed(detector, name, change)
    with pytest.raises(ValueError, match=message) as caught:
        Scorer(detector)
    assert len(str(caught.value).splitlines()) == 1


def test_the_untouched_folder_is_good(detector):
    """The control of the two tests above."""
    resealed(detector, "detector.json", lambda manifest: None)
    rearranged(detector, lambda arrays: arrays)
    assert Scorer(detector).classes == ["2", "4", "5", "9", "8", "3"]


def test_a_network_that_the_file_can_not_fill_is_not_built(detector):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from tests.stress.broken import seal

    path = detector / "backbone.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    about = json.loads(metadata["gradmix"])
    for change in ({"width": 2000}, {"width": 10**9}, {"width": -1}, {"name": "x"}, {"stem": 1}, {"more": 1}):
        described = json.dumps({**about, "encoder": {**about["encoder"], **change}})
        save_file(weights, path, {**metadata, "gradmix": described})
        seal(detector)
        with pytest.raises(ValueError, match=r"backbone\.safetensors: header") as caught:
            Scorer(detector)
        assert len(str(caught.value).splitlines()) == 1
    save_file(weights | {"bn1.weight": weights["bn1.weight"] * float("nan")}, path, metadata)
    seal(detector)
    with pytest.raises(ValueError, match=r"bn1\.weight: non-finite values"):
        Scorer(detector)


def test_an_index_file_is_not_read(detector):
    """FAISS would open whatever path an inverted file on disk names."""
    (detector / "detector.faiss").write_bytes(b"IwFl" + bytes(100))
    resealed(
        detector, "detector.json", lambda m: m["files"].update({"detector.faiss": m["files"]["detector.safetensors"]})
    )
    with pytest.raises(ValueError, match=r"detector\.faiss is of an earlier version and not read"):
        Scorer(detector)


def test_names_are_written_safely(command, detector, photos, monkeypatch):
    monkeypatch.chdir(photos)
    names = ["=1+1.png", "@a.png", "+b.png", "-c.png", "\td.png", "\x1b[31m.png"]
    for name in names:
        shutil.copy("00.png", name)
    result = command("score", f"detector={detector}", "images=*.png", "out=../scores.csv")
    rows = list(csv.DictReader((photos.parent / "scores.csv").open(newline="")))
    assert [row["path"] for row in rows] == sorted(
        ["'" + name if name[0] in "=@+-\t" else name for name in os.listdir()], key=lambda name: name.removeprefix("'")
    )
    assert all(not value.startswith(("=", "@", "+", "\t")) for row in rows for value in row.values())
    assert result.code == 0 and all(float(row["score"]) > 0 for row in rows)
    (photos / "\x1b[31m.png").write_text("no image")
    result = command("score", f"detector={detector}", "images=\x1b[31m.png", "out=\x1b[31m.csv")
    assert result.code == 2 and "\x1b" not in result.out + result.err and "\\x1b[31m.csv" in result.out


SCORE = "from gradmix.eval.commands.score import main; main()"


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_closed_streams_lose_no_score(closed, detector, photos, tmp_path):
    line = f'exec "$0" -c "{SCORE}" detector=detector images=photos {closed}'
    done = subprocess.run(["sh", "-c", line, sys.executable], cwd=tmp_path)
    assert done.returncode == 0
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 7
