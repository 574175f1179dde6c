"""Tar shards in WebDataset's layout, against the same images as files."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from gradmix.ssl.config import DataConfig
from gradmix.ssl.data import shards
from gradmix.ssl.data.images import decode
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.data.views import Crops


def write(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def image(i, size=(40, 30)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three shards to train on and one to test; classes 2 and 10; and the training images as files, in ``files/``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    number = 0
    for part, count in (("train", 3), ("test", 1)):
        for shard in range(count):
            members = []
            for _ in range(6):
                key = f"{number:06}"
                members += [(f"{key}.seg.jpg.txt", b"not an image"), (f"{key}.jpg", image(number))]
                members += [(f"{key}.cls", b"2\n" if number % 2 else b"10"), (f"._{key}.jpg", b"")]
                (tmp_path / "files" / f"{key}.jpg").write_bytes(image(number))
                number += 1
            write(tmp_path / "images" / part / f"{shard:04}.tar", members)
    return tmp_path / "images"


def test_members_are_the_files_and_classes_are_numbers_in_their_order(root, tmp_path):
    data = load_data(DataConfig("imagefolder", str(root), image_size=16, holdout=0), 0)
    assert data.classes == ["2", "10"] and len(data.train) == 18 and len(data.test) == 6
    for i in range(18):
        number = int(data.train.files[i].rpartition("#")[2][:6])
        assert torch.equal(data.train[i][0], decode(tmp_path / "files" / f"{number:06}.jpg", 16))
        assert data.classes[data.train.labels[i]] == ("2" if number % 2 else "10")


def test_the_order_is_that_of_the_seed_and_any_worker_reads_any_member(root):
    data = load_data(DataConfig("imagefolder", str(root), image_size=16, holdout=0), 0)
    crops = Crops(2, (0.2, 1.0), (0.75, 4 / 3))
    loaders = [TrainLoader(data.train, 6, 0, 2, start, workers=n, crops=crops) for start, n in ((0, 0), (0, 2), (4, 2))]
    first, again, later = map(list, loaders)
    assert len({i for batch in first[:3] for i in batch.index.tolist()}) == 18
    for one, other in (*zip(first, again, strict=True), *zip(first[4:], later, strict=True)):
        assert torch.equal(one.index, other.index) and torch.equal(one.images, other.images)


def test_the_index_is_made_once_for_each_shard(root, monkeypatch):
    indexed, real = [], shards._members
    monkeypatch.setattr(shards, "_members", lambda shard: indexed.append(shard) or real(shard))
    config = DataConfig("imagefolder", str(root), image_size=16)
    load_data(config, 0)
    assert len(indexed) == 4
    load_data(config, 0)
    assert len(indexed) == 4
    write(root / "train/0001.tar", [("a.jpg", image(99)), ("a.cls", b"2")])
    assert len(load_data(config, 0).train.files) < 18 and len(indexed) == 5


def test_folders_inside_a_shard_are_classes(tmp_path):
    write(tmp_path / "a.tar", [(f"set/{kind}/{i}.jpg", image(i)) for kind in ("cat", "dog") for i in range(4)])
    data = load_data(DataConfig("imagefolder", str(tmp_path), image_size=16), 0)
    assert data.classes == ["cat", "dog"] and len(data.train) + len(data.held_out) + len(data.test) == 8
    write(tmp_path / "b.tar", [("plain.jpg", image(1))])
    with pytest.raises(ValueError, match=r"plain\.jpg has no class"):
        load_data(DataConfig("imagefolder", str(tmp_path), image_size=16), 0)


def test_a_damaged_shard_is_named(root):
    (root / "train/0002.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match=r"0002\.tar: not a readable tar file"):
        load_data(DataConfig("imagefolder", str(root), image_size=16), 0)
    whole = (root / "train/0001.tar").read_bytes()
    (root / "train/0002.tar").unlink()
    load_data(DataConfig("imagefolder", str(root), image_size=16), 0)
    (root / "train/0001.tar").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"0001\.tar: not a readable tar file"):
        load_data(DataConfig("imagefolder", str(root), image_size=16), 0)
