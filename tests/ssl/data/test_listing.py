"""Lists of image files: links, hidden folders, strange names, and what a million of them take."""

import os
import pickle
import tracemalloc
from dataclasses import replace

import pytest
import torch
from PIL import Image

from gradmix.eval.scoring.scorer import find_images
from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.listing import Files, list_images
from gradmix.ssl.data.open_set import load_data


def picture(path, colour=(10, 20, 30), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def root(tmp_path):
    """Class folders, one of them a link, beside what systems leave behind."""
    for i in range(8):
        picture(tmp_path / "images/cat" / f"{i}.png")
        picture(tmp_path / "elsewhere" / f"{i}.PNG")
        picture(tmp_path / "images/__MACOSX/cat" / f"{i}.png")
        picture(tmp_path / "images/.thumbnails" / f"{i}.png")
    (tmp_path / "images/cat/._0.png").write_bytes(b"\0\5\26\7")
    os.symlink(tmp_path / "elsewhere", tmp_path / "images/dog", target_is_directory=True)
    os.symlink(tmp_path / "images", tmp_path / "images/cat/round", target_is_directory=True)  # and round, and round
    for name in ("$RECYCLE.BIN", "System Volume Information", "#recycle"):
        picture(tmp_path / "images" / name / "old.png")
    return tmp_path / "images"


def test_links_are_followed_alike_in_training_and_scoring(root):
    data = load_data(DataConfig("imagefolder", str(root), image_size=8, holdout=0), 0)
    assert data.classes == ["cat", "dog"] and not data.empty and not data.unknown
    listed = {str(root / "cat" / f"{i}.png") for i in range(8)} | {str(root / "dog" / f"{i}.PNG") for i in range(8)}
    assert {*data.train.files, *data.test.files} >= listed
    assert {path for path in find_images(str(root)) if "/round/" not in path} == listed


def test_links_that_lead_nowhere_are_named(root):
    for name, to in (("lost.png", "/nowhere/lost.png"), ("itself.png", "itself.png"), ("itself", "itself")):
        os.symlink(to, root / "cat" / name)
    os.symlink("/nowhere", root / "fox")
    config = DataConfig("imagefolder", str(root), image_size=8)
    with pytest.raises(
        ValueError, match=r"2 image files can't be read.*itself\.png: Too many.*lost\.png: No such file"
    ):
        load_data(config, 0)
    data = load_data(replace(config, on_bad_image="skip"), 0)
    assert set(data.bad) == {str(root / "cat/lost.png"), str(root / "cat/itself.png")}
    assert f"left out: {root / 'fox'}, a link that leads nowhere" in data.notes


def test_lists_are_sorted_and_the_same_every_time(tmp_path):
    paths = [tmp_path / name for name in ("b/2.png", "a/1.png", "a 1.png", "c.jpg", "B.png")]
    for path in paths:
        picture(path)
    assert list_images(tmp_path) == sorted(map(str, paths))


@pytest.mark.parametrize("names", [("val",), ("valid",), ("validation",), ("test",), ("val", "test")])
def test_the_test_set_by_any_of_its_names(tmp_path, names):
    for part in ("train", *names):
        for kind in ("a", "b"):
            for i in range(3):
                picture(tmp_path / part / kind / f"{part}{i}.png")
    data = load_data(DataConfig("imagefolder", str(tmp_path), image_size=8, holdout=0), 0)
    assert all(f"/{names[-1]}/" in path for path in data.test.files) and len(data.test) == 6
    told = [note for note in data.notes if "is left out" in note]
    assert told == ([f"{tmp_path / 'val'} is left out, test/ is the test set"] if len(names) > 1 else [])


def test_empty_folders_beside_loose_images_are_no_classes(tmp_path):
    (tmp_path / "empty").mkdir()
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    assert load_data(DataConfig("imagefolder", str(tmp_path), image_size=8), 0).classes == []
    with pytest.raises(ValueError, match="no images in"):
        load_data(DataConfig("imagefolder", str(tmp_path / "empty"), image_size=8), 0)


def test_photographs_of_a_kind_that_is_not_read_are_named(tmp_path):
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png"):
        picture(tmp_path / name)
    (tmp_path / "a/IMG_0042.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    (tmp_path / "a/notes.txt").write_text("no image")
    config = DataConfig("imagefolder", str(tmp_path), image_size=8, holdout=0, views="squares")
    with pytest.raises(ValueError, match=r"1 image files can't be read.*IMG_0042\.HEIC.*save it as JPEG or PNG"):
        load_data(config, 0)
    data = load_data(replace(config, on_bad_image="skip"), 0)
    assert len(data.train) + len(data.test) == 6


def test_files_are_a_list_of_strings():
    names = ["/a/b c.png", "/a/\udcff.png", "/日本/é.jpg", "/a/two\nlines.png"]
    files = Files(names)
    assert list(files) == names == list(pickle.loads(pickle.dumps(files))) and files == Files(names)
    assert files[-1] == names[-1] and names[2] in files and len(files) == 4
    assert list(files.select(torch.tensor([2, 0]))) == [names[2], names[0]]
    assert list(files + Files(["/x.png"])) == [*names, "/x.png"] and list(Files()) == []


def test_each_of_many_files_takes_half_a_kibibyte_at_most():
    """A million take less than a gibibyte: tests/stress/test_listing.py."""
    assert_small(100_000)


def assert_small(count):
    tracemalloc.start()
    names = [f"/data/imagenet/train/n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG" for i in range(count)]
    files = Files(names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count * 2**29 / 1e6 and files.array.nbytes < count * 2**27 / 1e6 and files[count - 1] == names[-1]
