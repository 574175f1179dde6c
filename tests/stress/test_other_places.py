"""Between two halves of a run: images moved, the folder copied, other threads, a clock that goes backwards, rights."""

import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradmix.eval.runs.folder import read_run
from tests.stress.broken import digest
from tests.stress.commands import TINY, as_an_ordinary_user, finish, refused, stopped_after, write_digits

GO = (*TINY, "data.root=images", "run_dir=run")


def weights(run):
    return load_file(run / "backbone.safetensors") | load_file(run / "head.safetensors")


def assert_same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A run to its end, and one that was stopped after its second step."""
    whole, half = (tmp_path_factory.mktemp(name) for name in ("whole", "half"))
    for folder, prepare, code in ((whole, None, 0), (half, stopped_after(2), 143)):
        write_digits(folder / "images")
        finish(folder, "pretrain", *GO, code=code, prepare=prepare)
    assert (half / "run/checkpoints/step-00000002.ckpt").exists()
    return whole, half


@pytest.fixture
def half(halves, tmp_path):
    return shutil.copytree(halves[1], tmp_path / "half")


@pytest.fixture
def whole(halves):
    return halves[0]


def test_images_that_moved(whole, half):
    (half / "images").rename(half / "elsewhere")
    kept = digest(half / "run")
    assert "images" in refused(half, "pretrain", *GO)
    assert digest(half / "run") == kept
    finish(half, "pretrain", *TINY, "data.root=elsewhere", "run_dir=run")
    assert_same(half / "run", whole / "run")
    (half / "elsewhere").rename(half / "third")
    assert "is not a folder here" in refused(half, "eval", "run=run")
    finish(half, "eval", "run=run", "root=third")
    finish(half, "score", "detector=run/detector", "images=third", "out=scores.csv", "explain=sheets")


def test_other_images_in_the_same_place(half):
    next((half / "images").rglob("*.png")).rename(half / "images/class 0/new.png")
    assert "not the training images" in refused(half, "pretrain", *GO)


def test_a_folder_that_was_copied(whole, half):
    shutil.copytree(half / "run", half / "copy")
    kept = digest(half / "run")
    finish(half, "pretrain", *TINY, "data.root=images", "run_dir=copy")
    assert_same(half / "copy", whole / "run")
    assert digest(half / "run") == kept
    shutil.copytree(half / "copy", half / "finished")
    assert "finished already" in finish(half, "pretrain", *TINY, "data.root=images", "run_dir=finished")
    finish(half, "compare", "copy", "finished")


def test_other_threads(whole, half):
    said = finish(half, "pretrain", *GO, prepare=partial(torch.set_num_threads, 2))
    assert "goes on after step 2" in said
    for name, value in weights(half / "run").items():
        torch.testing.assert_close(value, weights(whole / "run")[name], rtol=1e-3, atol=1e-3)
    assert "CPU, 2 threads" in (half / "run/metrics.json").read_text()


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.mark.skipif(FAKETIME is None, reason="no libfaketime (Debian: apt-get install faketime)")
@pytest.mark.parametrize("when", ["between", "while training"])
def test_a_clock_that_goes_backwards(when, whole, half, tmp_path):
    clock, folder = tmp_path / "clock", half
    if when == "while training":
        folder = tmp_path / "new"
        write_digits(folder / "images")
    clock.write_text("-400d" if when == "between" else "+0")
    environment = {
        **os.environ,
        **{"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_CACHE_DURATION": "1"},
        **{"FAKETIME_DONT_FAKE_MONOTONIC": "1", "OMP_NUM_THREADS": "1"},
    }
    code = "from gradmix.eval.commands.pretrain import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *GO], cwd=folder, env=environment, stderr=subprocess.PIPE)
    while process.poll() is None and not list(folder.glob("run/checkpoints/*")):
        time.sleep(0.02)
    clock.write_text("-400d")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert_same(folder / "run", whole / "run")
    curves = [read_run(path / "run", images=False).scalars["knn/top1"] for path in (folder, whole)]
    assert curves[0][0].tolist() == curves[1][0].tolist() and len(curves[0][0]) == 1
    finish(folder, "score", "detector=run/detector", "images=images", "out=scores.csv")


RIGHTS = {
    "the run's folder": ("run", 0o500, ("pretrain", *GO), "run"),
    "its checkpoints": ("run/checkpoints", 0o500, ("pretrain", *GO), "checkpoints"),
    "a checkpoint": ("run/checkpoints/step-00000002.ckpt", 0, ("pretrain", *GO), None),
    "its config": ("run/config.yaml", 0, ("pretrain", *GO), "config.yaml"),
    "the images": ("images", 0, ("pretrain", *GO), "images"),
    "a class": ("images/class 1", 0, ("pretrain", *GO), "class 1"),
    "an image": ("images/class 1/03.png", 0, ("pretrain", *GO), "03.png"),
    "where runs are": (".", 0o500, ("pretrain", *TINY, "data.root=images", "run_dir=new"), "new"),
}
FINISHED = {
    "the run's folder": ("run", 0o500, ("eval", "run=run"), "run"),
    "its detector": ("run/detector", 0o500, ("eval", "run=run"), "detector"),
    "its weights": ("run/backbone.safetensors", 0, ("eval", "run=run"), "backbone.safetensors"),
    "its numbers": ("run/metrics.json", 0, ("compare", "run"), "metrics.json"),
    "where the page goes": ("out", 0o500, ("compare", "run", "out=out/page.html"), "out"),
    "a detector": ("run/detector", 0, ("score", "detector=run/detector", "images=images"), "detector"),
    "a detector's file": ("run/detector/detector.json", 0, ("score", "detector=run/detector", "images=images"), "json"),
    "scored images": ("images/class 1", 0, ("score", "detector=run/detector", "images=images"), "class 1"),
    "where scores go": ("out", 0o500, ("score", "detector=run/detector", "images=images", "out=out/a.csv"), "out"),
}


@pytest.mark.parametrize(("finished", "what"), [(False, what) for what in RIGHTS] + [(True, what) for what in FINISHED])
def test_rights(finished, what, whole, half, tmp_path):
    """Refused in a line that names it, nothing changed; with the right given back it goes on."""
    folder = shutil.copytree(whole, tmp_path / "whole") if finished else half
    path, mode, (name, *arguments), named = (FINISHED if finished else RIGHTS)[what]
    (folder / "out").mkdir()
    (folder / "log").touch()
    before, was = digest(folder / "run"), (folder / path).stat().st_mode
    (folder / path).chmod(mode)
    try:
        said = refused(folder, name, *arguments, prepare=as_an_ordinary_user) if named else None
        if named is None:  # passed over for the one before, with a word
            said = finish(folder, name, *arguments, prepare=as_an_ordinary_user)
            named = "damaged checkpoint skipped"
    finally:
        if (folder / path).exists():  # of checkpoints the oldest go
            (folder / path).chmod(was)
    assert named in said, said
    if "skipped" not in said:
        assert digest(folder / "run") == before
        finish(folder, name, *arguments)
    if not finished and "run_dir=run" in arguments:
        assert_same(folder / "run", whole / "run")
