"""SIGKILL at random moments in the commands after the training: what was there stays whole, and again is like never."""

import json
import os
import shutil
import time

import numpy as np
import pytest

from tests.stress.broken import digest
from tests.stress.commands import TINY, finish, refused, start, with_files_of_at_most, write_digits

KILLS, FULL = 30, 20
ARGUMENTS = {
    "eval": ("run=run",),
    "score": ("detector=run/detector", "images=images", "out=scores.csv", "batch_size=8", "explain=sheets"),
    "compare": ("run",),
}
WHOLE = {"eval": ("run/metrics.json", "run/report.html"), "score": ("scores.csv",), "compare": ("compare.html",)}
CHANGING = ("train/", "git/", "time/")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_digits(folder / "images")
    finish(folder, "pretrain", *TINY, "data.root=images", "run_dir=run")
    return folder


def results(folder, name):
    """What a command has written, without what no two runs have in common."""
    if name == "eval":
        numbers = json.loads((folder / "run/metrics.json").read_text())
        measured = {key: value for key, value in numbers.items() if not key.startswith(CHANGING)}
        inside = {path: of for path, of in digest(folder / "run").items() if path.startswith(("detector", "features"))}
        return measured, inside
    return [(folder / path).read_bytes() for path in WHOLE[name]]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_kills(name, trained, cases, tell, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "work")
    finish(folder, name, *ARGUMENTS[name])  # the first one waits for imports
    began = time.monotonic()
    finish(folder, name, *ARGUMENTS[name])
    seconds, expected, rng, kills = time.monotonic() - began, results(folder, name), np.random.default_rng(0), 0
    for number in range(cases(KILLS)):
        if name != "eval" and number % 2:  # half of them over what is there already
            for path in WHOLE[name]:
                (folder / path).unlink(missing_ok=True)
        before = {path: (folder / path).read_bytes() for path in WHOLE[name] if (folder / path).exists()}
        process = start(folder, name, *ARGUMENTS[name])
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        kills += process.exitcode != 0
        for path, content in before.items():
            now = (folder / path).read_bytes() if (folder / path).exists() else None
            if name == "eval" and now is None:
                continue  # taken away before what belongs to it is replaced
            assert now is not None and (now == content or name == "eval"), path
            if path.endswith(".json"):
                json.loads(now)
        finish(folder, name, *ARGUMENTS[name])
        assert results(folder, name) == expected
        assert not [path for path in digest(folder) if "gradmix-tmp" in path or path.endswith(".part")]
    assert kills > 0.5 * cases(KILLS)
    tell(f"{kills} kills, 0 results lost or different")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_files_that_can_not_be_written_whole(name, trained, cases, tell, tmp_path):
    """As on a disk that fills up: one line that names the file, what was there stays, and later it goes on."""
    folder = shutil.copytree(trained, tmp_path / "work")
    finish(folder, name, *ARGUMENTS[name])
    expected, largest = results(folder, name), max(os.path.getsize(folder / path) for path in WHOLE[name])
    rng, full = np.random.default_rng(0), 0
    for _ in range(cases(FULL)):
        if name == "eval":
            shutil.rmtree(folder / "run/features")
        limit = int(rng.uniform(min(1000, 0.5 * largest), 0.9 * largest))  # what it says goes to a file too
        said = refused(folder, name, *ARGUMENTS[name], prepare=with_files_of_at_most(limit))
        full += 1
        assert "can't be written" in said or "File too large" in said, said
        if name != "eval":
            assert results(folder, name) == expected
        finish(folder, name, *ARGUMENTS[name])
        assert results(folder, name) == expected
    tell(f"{full} files that could not be written, 0 results lost")
