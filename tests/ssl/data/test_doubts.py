"""Class folders as people have them: what is taken for what, what is refused, and what is said."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.data.sources import folders_read


def folders(root, *names, count=4):
    """Images that are all different, in each of the folders."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng([*name.encode(), i]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def load(root, **options):
    return load_data(DataConfig("imagefolder", str(root), image_size=8, holdout=0, **options), 0)


def said(data):
    return [note for note in data.notes if "training views" not in note]


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize("test", ["Test", "testing", "VAL"])
def test_the_two_sets_by_any_spelling(tmp_path, train, test):
    data = load(folders(tmp_path, *(f"{part}/{kind}" for part in (train, test) for kind in ("cat", "dog"))))
    assert data.classes == ["cat", "dog"] and len(data.train) == len(data.test) == 8 and said(data) == []
    assert all(f"/{test}/" in path for path in data.test.files)
    assert set(folders_read(DataConfig("imagefolder", str(tmp_path)))) == {tmp_path / train, tmp_path / test}


def test_training_alone_is_a_class_and_train_alone_is_half_a_split(tmp_path):
    assert load(folders(tmp_path / "a", "training/day", "race")).classes == ["race", "training"]
    with pytest.raises(ValueError, match="has Train/ but none of test, "):
        load(folders(tmp_path / "b", "Train/cat", "Train/dog", "dev/cat"))


def test_folders_beside_the_two_sets_are_named(tmp_path):
    data = load(folders(tmp_path, "train/cat", "train/dog", "test/cat", "val/cat", "more", "raw/x"))
    left_out = [
        f"{tmp_path / 'val'} is left out, test/ is the test set",
        "beside train/ and test/, left out: more, raw",
    ]
    assert said(data) == left_out


def test_a_class_in_another_case_is_not_unknown(tmp_path):
    folders(tmp_path, "train/cat", "train/dog", "test/Cat", "test/dog")
    with pytest.raises(ValueError, match=r"the class cat in .*/train is called Cat in the test set; give both"):
        load(tmp_path)
    data = load(folders(tmp_path, "test/cat"))  # beside Cat: like letters, whose case counts
    assert data.classes == ["cat", "dog"] and data.unknown == ["Cat"]
    data = load(folders(tmp_path / "one", "Cat", "cat", "dog"))
    assert said(data) == ["Cat and cat are two classes; if they are one, give their folders one name"]


def test_images_in_no_class_folder_are_said(tmp_path):
    folders(tmp_path / "one", "", "cat", "dog", count=7)
    (tmp_path / "one/notes.txt").write_text("no image")
    names = "0.png, 1.png, 2.png, 3.png, 4.png, ..."
    assert said(load(tmp_path / "one")) == [
        f"left out: 7 images right in {tmp_path / 'one'} ({names}), in no class folder"
    ]
    folders(tmp_path / "two", "train/cat", "train/dog", "test", "test/cat", count=1)
    assert said(load(tmp_path / "two")) == [
        f"left out: 1 images right in {tmp_path / 'two/test'} (0.png), in no class folder"
    ]


def test_classes_that_hold_the_same_folders_are_said(tmp_path):
    data = load(folders(tmp_path / "years", "2023/cat", "2023/dog", "2024/cat", "2024/dog"))
    assert data.classes == ["2023", "2024"]
    (line,) = said(data)
    assert line.startswith(
        "all class folders hold the same folders (cat, dog); the classes are the outer ones, 2023, 2024."
    )
    assert said(load(folders(tmp_path / "nested", "cat/images", "dog/images"))) == []
    assert said(load(folders(tmp_path / "days", "cat/monday", "cat/friday", "dog/monday", "dog/sunday"))) == []


def test_one_class_beside_empty_folders_is_one(tmp_path):
    folders(tmp_path, "images/cat", "images/dog")
    (tmp_path / "annotations").mkdir()
    with pytest.raises(ValueError, match=r"one class folder only \(images\); did you mean data.root=.*/images\?"):
        load(tmp_path)


def test_tar_files_beside_images_are_refused(tmp_path):
    folders(tmp_path, "cat", "dog")
    with tarfile.open(tmp_path / "dog.tar", "w") as tar:
        tar.add(tmp_path / "dog", "dog")
    with pytest.raises(ValueError, match=r"has tar files and images \(.*/cat/0.png\); move one or the other elsewhere"):
        load(tmp_path)
