"""Outputs are never inputs, under whatever name."""

import os

import pytest

from gradmix.ssl.runs.outputs import check_output, check_writable


def test_outputs_are_no_inputs(tmp_path):
    (tmp_path / "photos/inner").mkdir(parents=True)
    (tmp_path / "a.jpg").write_text("a")
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    os.symlink("a.jpg", tmp_path / "c.jpg")
    os.symlink("photos", tmp_path / "link")
    for name in ("a.jpg", "b.jpg", "c.jpg", "photos/../a.jpg"):
        with pytest.raises(ValueError, match=r"out: .* is one of the files that are read"):
            check_output("out", tmp_path / name, files=[tmp_path / "a.jpg"])
    for name in ("photos", "photos/new.csv", "photos/inner/new/x.csv", "link/new.csv", "link"):
        with pytest.raises(ValueError, match=r"out: .* lies in .*photos, which is read"):
            check_output("out", tmp_path / name, folders=[tmp_path / "photos"])
    check_output("out", tmp_path / "photos.csv", [tmp_path / "a.jpg", tmp_path / "gone"], [tmp_path / "photos", "gone"])


def test_outputs_can_be_put_in_place(tmp_path):
    (tmp_path / "run").mkdir()
    for new in (tmp_path / "run", tmp_path / "new/inner"):
        check_writable("run_dir", new, ["a.json"], ["inner"])
        assert not (tmp_path / "new").exists()
    (tmp_path / "run/a.json").mkdir()
    with pytest.raises(ValueError, match=r"^run_dir: .*run/a\.json is a folder, where a file is to be"):
        check_writable("run_dir", tmp_path / "run", ["a.json"])
    (tmp_path / "file").touch()
    (tmp_path / "run/dangling").symlink_to("gone")
    for folder, inner in (("file", []), ("file/inner", []), ("run", ["dangling"])):
        with pytest.raises(ValueError, match=r"^run_dir: .* is no folder; remove it, or write elsewhere"):
            check_writable("run_dir", tmp_path / folder, folders=inner)
    check_writable("run_dir", tmp_path / "run", ["b.json"])
