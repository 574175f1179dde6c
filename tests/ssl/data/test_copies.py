"""Files that are the same byte for byte, against a hash of every file; what a draw does with them, and what is said."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from gradmix.eval.report.summary import describe
from gradmix.ssl.config import Config, DataConfig
from gradmix.ssl.data.copies import PIECE, first_copies
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.data.reading import content
from gradmix.ssl.data.shards import read_shards
from gradmix.ssl.data.sources import stratified


def picture(path, number):
    """An image of its own for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def copy(path, other):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(other.read_bytes())
    return path


def classes(root, count=12, parts=("",)):
    """Two classes in each part; no two images are the same."""
    number = 0
    for part in parts:
        for kind in ("cat", "dog"):
            for i in range(count):
                picture(root / part / kind / f"{i:02}.png", number)
                number += 1
    return root


def config(root, **options):
    return DataConfig("imagefolder", str(root), image_size=8, **options)


def slowly(files):
    seen = {}
    return [seen.setdefault(hashlib.sha256(content(file)).digest(), row) for row, file in enumerate(files)]


def as_set(files):
    return ImageSet(torch.zeros(len(files), dtype=torch.long), 8, files=[str(file) for file in files])


def test_copies_are_those_of_a_hash_of_every_file(tmp_path):
    rng, files = np.random.default_rng(0), []
    for size in (1, 5, PIECE, PIECE + 1, 10 * PIECE):
        whole = rng.bytes(size)
        for place in (None, 0, size // 2, size - 1, None, 0):  # differ at the begin, in the middle, at the end, nowhere
            changed = bytearray(whole)
            if place is not None:
                changed[place] ^= 1
            files.append(tmp_path / f"{len(files)}.jpg")
            files[-1].write_bytes(changed)
    for _ in range(300):
        files.append(tmp_path / f"{len(files)}.jpg")
        files[-1].write_bytes(bytes(rng.integers(1, 3, rng.integers(1, 6)).astype(np.uint8)))
    expected = slowly(map(str, files))
    assert 50 < len(set(expected)) < len(files)
    assert first_copies(as_set(files)).tolist() == expected
    assert first_copies(as_set(files[:200]), as_set(files[200:])).tolist() == expected


def test_what_is_empty_missing_or_no_file_is_nobodys_copy(tmp_path):
    names = [tmp_path / f"{i}.jpg" for i in range(6)]
    names[0].write_bytes(b"")
    names[1].write_bytes(b"")
    names[2].mkdir()
    names[3].mkdir()
    assert first_copies(as_set(names)).tolist() == [0, 1, 2, 3, 4, 5]
    assert first_copies(as_set([])).tolist() == []
    assert first_copies(ImageSet(torch.zeros(2), 8, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))) is None


def test_members_of_shards_and_files_are_compared_alike(tmp_path):
    one, other = picture(tmp_path / "one.png", 1), picture(tmp_path / "other.png", 2)
    for number, sources in enumerate(((one, other), (other, one, one))):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for i, source in enumerate(sources):
                member = tarfile.TarInfo(f"cat/{number}{i}.png")
                member.size = source.stat().st_size
                tar.addfile(member, io.BytesIO(source.read_bytes()))
    members, _ = read_shards(tmp_path, 8)
    assert first_copies(members, as_set([other])).tolist() == [0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_parts_no_copies(tmp_path, seed):
    classes(tmp_path)
    for i in range(4):
        copy(tmp_path / "cat" / f"again {i}.png", tmp_path / "cat" / f"{i:02}.png")
        copy(tmp_path / "dog" / f"{i:02}.png", tmp_path / "cat" / f"{i + 4:02}.png")
    data = load_data(config(tmp_path, holdout=0.25), seed)
    held = [{content(path) for path in part.files} for part in (data.train, data.held_out, data.test)]
    assert sum(map(len, held)) == len(set.union(*held)) == 20  # 24 pictures, of which four dogs became cats
    assert data.copies == {"data/copies": 8, "data/test_copies": 0, "data/unknown_copies": 0, "data/class_copies": 4}
    notes = [note for note in data.notes if "exact copies" in note]
    assert len(notes) == 2 and "a split that is drawn keeps copies together" in notes[0]
    assert notes[1].startswith("exact copies of an image in another class: 4, such as ")
    assert set(notes) < set(describe(Config(data=config(tmp_path)), data).splitlines())


def test_a_draw_without_copies_is_what_it_was(tmp_path):
    classes(tmp_path)
    files = np.array(sorted(str(path) for path in tmp_path.glob("*/*")))
    train, test = stratified(torch.arange(2).repeat_interleave(12), 0.25, 3)
    data = load_data(config(tmp_path), 3)
    assert list(data.test.files) == list(files[test])
    kept, aside = stratified(torch.tensor([0] * 9 + [1] * 9), 0.1, 3)
    assert list(data.train.files) == list(files[train][kept])
    assert list(data.held_out.files) == list(files[train][aside])
    assert data.copies == {"data/copies": 0, "data/test_copies": 0, "data/unknown_copies": 0, "data/class_copies": 0}
    assert not any("copies" in note for note in data.notes)


def test_a_class_of_copies_alone_is_trained_on(tmp_path):
    """The draw would put all of a class aside with the one image that it repeats."""
    labels, first = torch.tensor([0] * 4 + [1] * 8), torch.tensor([0, 1, 2, 3] + [0] * 8)
    for seed in range(20):
        plain, (kept, aside) = stratified(labels, 0.5, seed), stratified(labels, 0.5, seed, first)
        assert sorted([*kept.tolist(), *aside.tolist()]) == list(range(12))
        assert set(labels[kept].tolist()) == {0, 1} and not {*first[kept].tolist()} & {*first[aside].tolist()}
        for row in (1, 2, 3):  # which are copies of nothing
            assert (row in kept) == (row in plain[0])


def test_a_split_that_was_brought_stays_as_it_is(tmp_path):
    classes(tmp_path, 6, ("train", "test"))
    copy(tmp_path / "test/cat/same.png", tmp_path / "train/cat/00.png")
    copy(tmp_path / "test/dog/a\nb.png", tmp_path / "train/cat/01.png")
    data = load_data(config(tmp_path), 0)
    assert len(data.test) == 14 and len(data.train) + len(data.held_out) == 12
    counts = {"data/copies": 2, "data/test_copies": 2, "data/unknown_copies": 0, "data/class_copies": 1}
    assert data.copies == counts
    first, second = (note for note in data.notes if "exact copies" in note)
    named = f"such as {tmp_path / 'test/cat/same.png'} of {tmp_path / 'train/cat/00.png'}; "
    assert first == (
        f"exact copies of training images among 14 test images: 2, {named}"
        "the numbers will look better than they are; remove them from one of the two"
    )
    assert "a\\nb.png" in second and "exact copies of an image in another class: 1" in second


def test_unknown_images_that_were_trained_on_are_said(tmp_path):
    classes(tmp_path / "photos")
    picture(tmp_path / "far/1.png", 1000)
    copy(tmp_path / "near/2.png", tmp_path / "far/1.png")
    copy(tmp_path / "far/3.png", tmp_path / "photos/dog/11.png")
    folders = {"far": str(tmp_path / "far"), "near": str(tmp_path / "near")}
    drawn = [load_data(config(tmp_path / "photos", unknown_roots=folders), seed) for seed in range(8)]
    trained_on = [data.copies["data/unknown_copies"] for data in drawn]
    assert {*trained_on} == {0, 1}  # by which half the dog was drawn into
    for data, count in zip(drawn, trained_on, strict=True):
        counts = {"data/copies": 2, "data/test_copies": 0, "data/unknown_copies": count}
        assert data.copies == counts | {"data/class_copies": 1 - count}
        said = [note for note in data.notes if note.startswith("exact copies of training images")]
        assert len(said) == count and all("among 3 unknown images: 1, such as " in note for note in said)
