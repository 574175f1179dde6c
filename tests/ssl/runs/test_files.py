"""Files appear whole or not at all, one by one and together."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from gradmix.ssl.runs.files import remove_strays, replacing, write_json, write_tensors, write_text


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_error_while_writing_leaves_the_old_content(tmp_path):
    write_text(tmp_path / "a", "old")
    write_tensors(tmp_path / "b", {"x": torch.ones(3)})
    before = (tmp_path / "b").read_bytes()
    with pytest.raises(TypeError):
        write_text(tmp_path / "a", 3)
    with pytest.raises(RuntimeError):
        write_tensors(tmp_path / "b", {"x": torch.ones(3, device="meta")})
    assert (tmp_path / "a").read_text() == "old" and (tmp_path / "b").read_bytes() == before
    assert names(tmp_path) == ["a", "b"]


def test_what_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/below/metrics\.json: can't be written"):
        write_json(tmp_path / "file/below/metrics.json", {})


def test_what_a_killed_process_left_goes_with_the_next_writing(tmp_path):
    """And only that: not what a living process writes, nor what belongs to another file."""
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    left = tmp_path / f".a [1].{killed.pid}.gradmix-tmp"
    others = [f".a [1].{os.getppid()}.gradmix-tmp", f".b.{killed.pid}.gradmix-tmp", f".a 1.{killed.pid}.gradmix-tmp"]
    for path in (left, *(tmp_path / name for name in others)):
        path.touch()
    write_text(tmp_path / "a [1]", "new")
    assert names(tmp_path) == sorted(["a [1]", *others])


@pytest.fixture
def results(tmp_path):
    for name in ("features/a", "features/old only", "metrics.json", "config.yaml"):
        write_text(tmp_path / name, "old")
    return tmp_path


def write_new(folder):
    for name in ("features/a", "features/b", "metrics.json"):
        write_text(folder / name, "new")


def test_results_are_replaced_together(results):
    with replacing(results, "metrics.json") as new:
        write_new(new)
        assert (results / "features/a").read_text() == "old"
    assert names(results) == ["config.yaml", "features/a", "features/b", "metrics.json"]
    assert (results / "features/a").read_text() == (results / "metrics.json").read_text() == "new"


def test_an_error_replaces_nothing(results):
    with pytest.raises(ZeroDivisionError), replacing(results, "metrics.json") as new:
        write_new(new)
        raise ZeroDivisionError
    assert names(results) == ["config.yaml", "features/a", "features/old only", "metrics.json"]
    assert {path.read_text() for path in results.rglob("*") if path.is_file()} == {"old"}


@pytest.mark.parametrize("die_at", range(4))
def test_dying_between_renames_leaves_no_numbers_beside_other_features(results, die_at, monkeypatch, tmp_path_factory):
    """There are three renames: the old features aside, the new ones in, then metrics.json."""
    rename, count, copy = os.replace, 0, tmp_path_factory.mktemp("power") / "went"

    def count_and_copy(source, target):
        nonlocal count
        if count == die_at:
            shutil.copytree(results, copy)
        count += 1
        rename(source, target)

    with replacing(results, "metrics.json") as new:
        write_new(new)
        monkeypatch.setattr(os, "replace", count_and_copy)
    if die_at == 3:
        assert count == 3
        return
    remove_strays(copy)
    assert not (copy / "metrics.json").exists()
    assert not [path for path in copy.iterdir() if "tmp" in path.name]


def test_a_signal_between_renames_comes_after_them(results, monkeypatch):
    rename, renamed = os.replace, []

    def stop_and_replace(source, target):
        os.kill(os.getpid(), signal.SIGTERM)
        renamed.append(target)
        rename(source, target)

    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with pytest.raises(SystemExit) as stopped, replacing(results, "metrics.json") as new:
            write_new(new)
            monkeypatch.setattr(os, "replace", stop_and_replace)
        assert stopped.value.code == 143 and len(renamed) == 3
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert names(results) == ["config.yaml", "features/a", "features/b", "metrics.json"]
    assert (results / "features/a").read_text() == (results / "metrics.json").read_text() == "new"


def test_strays_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    kept = ["a", ".hidden", ".vimrc.tmp", "checkpoints/step-00000001.ckpt"]
    strays = [".metrics.json.77.gradmix-tmp", "checkpoints/.step-00000002.ckpt.77.gradmix-tmp"]
    strays += [".new.gradmix-tmp/features/a", ".old.gradmix-tmp/b"]
    for name in (*kept, *strays):
        write_text(tmp_path / name, "")
    remove_strays(tmp_path)
    assert names(tmp_path) == sorted(kept)
