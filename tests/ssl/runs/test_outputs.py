"""Outputs are never inputs, under whatever name."""

import os

import pytest

from gradmix.ssl.config import DataConfig
from gradmix.ssl.runs.outputs import check_output, folders_read


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


def test_folders_of_images(tmp_path):
    data = DataConfig(name="imagefolder", root=str(tmp_path))
    assert folders_read(data) == [tmp_path]
    (tmp_path / "train").mkdir()
    assert folders_read(data) == [tmp_path / "train"]
    assert folders_read(DataConfig(name="cifar10", root="x", unknown_root="far"))[0].name == "far"
