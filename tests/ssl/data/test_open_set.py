import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from gradmix.ssl.config import DataConfig
from gradmix.ssl.data import open_set
from gradmix.ssl.data.images import decode
from gradmix.ssl.data.open_set import known_classes, load_data
from gradmix.ssl.data.sources import SOURCES, folders_read
from gradmix.ssl.data.splits import CIFAR_PLUS, SPLITS

DIGITS = DataConfig(name="digits", image_size=8, split=0)


def picture(path, colour=(10, 20, 30), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


def folder(root, classes, count=8, **options):
    rng = np.random.default_rng(0)
    for name in classes:
        for i in range(count):
            picture(root / name / f"{i}.png", tuple(rng.integers(0, 256, 3).tolist()), **options)


def test_digits_are_scikit_learns_and_nobody_is_in_two_sets():
    data = load_data(DIGITS, seed=0)
    real = load_digits()
    assert (
        len(data.train) + len(data.held_out) + (data.test.labels >= 0).sum()
        == np.isin(real.target, SPLITS["digits"][0]).sum()
    )
    original = {image.tobytes() for image in (real.images * (255 / 16)).round().astype(np.uint8)}
    seen = []
    for part in (data.train, data.held_out, data.test):
        assert torch.equal(part.images[:, 0], part.images[:, 2])
        seen += [image[0].numpy().tobytes() for image in part.images]
    assert set(seen) <= original
    assert len(set(seen)) > len(seen) - 3  # scikit-learn's digits hold a few exact duplicates


@pytest.mark.parametrize("split", range(5))
def test_labels_are_positions_in_the_split_and_the_rest_of_the_test_set_is_unknown(split):
    data = load_data(replace(DIGITS, split=split), seed=0)
    real = load_digits()
    label_of = {
        image.tobytes(): int(t)
        for image, t in zip((real.images * (255 / 16)).round().astype(np.uint8), real.target, strict=True)
    }
    for part in (data.train, data.held_out, data.test):
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            digit = label_of[image[0].numpy().tobytes()]
            assert SPLITS["digits"][split][label] == digit if label >= 0 else digit not in SPLITS["digits"][split]
    assert data.classes == [str(i) for i in SPLITS["digits"][split]]
    assert not (data.train.labels < 0).any()


def test_the_held_out_share_is_drawn_per_class_by_the_seed():
    first, again, other = (load_data(DIGITS, seed=s) for s in (0, 0, 1))
    counts = first.held_out.labels.bincount()
    total = counts + first.train.labels.bincount()
    assert ((counts.double() / total - 0.1).abs() < 0.01).all()
    assert torch.equal(first.held_out.images, again.held_out.images)
    assert not torch.equal(first.held_out.images, other.held_out.images)
    assert torch.equal(first.test.images, other.test.images)
    assert len(load_data(replace(DIGITS, holdout=0.0), 0).held_out) == 0


def test_known_classes_by_name_and_by_index():
    by_name = load_data(replace(DIGITS, split=None, known=["7", "3"]), 0)
    by_index = load_data(replace(DIGITS, split=None, known=[7, 3]), 0)
    assert by_name.classes == by_index.classes == ["7", "3"]
    assert torch.equal(by_name.train.images, by_index.train.images)


def test_image_folders(tmp_path):
    folder(tmp_path / "a", ["cat", "dog"])
    plain = DataConfig(name="imagefolder", image_size=8, root=str(tmp_path / "a"))
    data = load_data(plain, 0)
    assert data.classes == ["cat", "dog"] and not data.unknown
    assert (len(data.train), len(data.held_out), len(data.test)) == (10, 2, 4)

    folder(tmp_path / "b/train", ["cat", "dog"])
    folder(tmp_path / "b/test", ["cat", "dog", "emu"], 3)
    data = load_data(replace(plain, root=str(tmp_path / "b")), 0)
    assert data.classes == ["cat", "dog"] and data.unknown == ["emu"]
    assert data.test.labels.tolist() == [0] * 3 + [1] * 3 + [-1] * 3

    (tmp_path / "a/none").mkdir()  # no images: neither known nor unknown
    data = load_data(plain, 0)
    assert (data.classes, data.unknown, data.empty) == (["cat", "dog"], [], ["none"])

    for i in range(8):
        picture(tmp_path / "flat" / f"{i}.png")
    data = load_data(replace(plain, root=str(tmp_path / "flat")), 0)
    assert data.classes == [] and (data.train.labels == -1).all()


def test_tinyimagenet_layout_with_missing_training_folders(tmp_path):
    names = [f"n{i:08d}" for i in range(200)]
    root = tmp_path / "tiny-imagenet-200"
    root.mkdir()
    (root / "wnids.txt").write_text("\n".join(reversed(names)))  # the file's own order does not count
    known = [names[i] for i in SPLITS["tinyimagenet"][0]]
    for i, name in enumerate(known):
        for j in range(4):
            picture(root / "train" / name / "images" / f"{name}_{j}.JPEG", (i, j, 0))
    rows = []
    for i, name in enumerate(names):
        picture(root / "val" / "images" / f"val_{i}.JPEG")
        rows.append(f"val_{i}.JPEG\t{name}\t0\t0\t63\t63")
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows))
    config = DataConfig(name="tinyimagenet", image_size=8, split=0, root=str(tmp_path))
    data = load_data(config, 0)
    assert data.classes == known and len(data.unknown) == 180
    assert (data.test.labels >= 0).sum() == 20
    for label, position in enumerate(SPLITS["tinyimagenet"][0]):
        assert data.test.labels[position] == label
    with pytest.raises(ValueError, match="no training images of the known classes"):
        load_data(replace(config, split=1), 0)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 and CIFAR-100 in torchvision's own layout, four images per class; each pixel says what it is of."""
    for kind, key, classes, mark in ((datasets.CIFAR10, "labels", 10, 0), (datasets.CIFAR100, "fine_labels", 100, 200)):
        folder = tmp_path / kind.base_folder
        folder.mkdir()
        for files, times in ((kind.train_list, 4), (kind.test_list, 2)):
            labels = np.tile(np.arange(classes), times)
            for (name, _), part in zip(files, np.array_split(labels, len(files)), strict=True):
                red, rest = np.repeat(part[:, None], 1024, 1), np.full((len(part), 2048), mark)
                data = np.hstack([red, rest]).astype(np.uint8)
                (folder / name).write_bytes(pickle.dumps({"data": data, key: part.tolist()}))
        names = [f"{kind.__name__} {i}" for i in range(classes)]
        (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)  # the checksums are the real files'
        monkeypatch.setitem(kind.meta, "md5", None)
    return tmp_path


def test_processes_that_start_at_once_download_once(tmp_path, monkeypatch):
    """As torchrun starts them. A set that is half written is no set, and two that write one folder spoil it."""
    downloads, there = [], tmp_path / "new/images"

    class Downloads:
        def __init__(self, root, train, download):
            if not there.exists():
                downloads.append(train)
                there.parent.mkdir(exist_ok=True)
                there.touch()
                sleep(0.3)
                there.write_text("whole")
            if there.read_text() != "whole":
                raise RuntimeError("Dataset not found or corrupted")
            self.data, self.targets, self.classes = np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1], ["cat", "dog"]

    monkeypatch.setattr(datasets, "CIFAR10", Downloads)
    config = DataConfig("cifar10", root=str(tmp_path / "new"), image_size=8)
    with ThreadPoolExecutor() as pool:  # locks hold between threads as they do between processes
        found = list(pool.map(lambda _: SOURCES["cifar10"](config, 0), range(4)))
    assert downloads == [True] and [len(source.train) for source in found] == [4] * 4

    (tmp_path / "file").touch()  # nothing can be written there: nobody waits, and torchvision says what is wrong
    monkeypatch.setattr(Downloads, "__init__", lambda *_, **__: (tmp_path / "file/x").touch())
    with pytest.raises(ValueError, match=r"file does not hold CIFAR10, and it can't be downloaded \(.*Not a directory"):
        SOURCES["cifar10"](replace(config, root=str(tmp_path / "file")), 0)


@pytest.mark.parametrize("name", ["cifar_plus10", "cifar_plus50"])
@pytest.mark.parametrize("split", range(5))
def test_cifar_plus_is_cifar10_against_chosen_classes_of_cifar100(cifar, name, split):
    data = load_data(DataConfig(name=name, split=split, root=str(cifar)), 0)
    known, unknown = SPLITS[name][split], CIFAR_PLUS[name][split]
    assert data.classes == [f"CIFAR10 {i}" for i in known] and data.known == known
    assert data.unknown == [f"CIFAR100 {i}" for i in unknown]
    for part in (data.train, data.held_out, data.test):
        red, green = part.images[:, 0, 0, 0].tolist(), part.images[:, 1, 0, 0].tolist()
        for label, value, mark in zip(part.labels.tolist(), red, green, strict=True):
            assert (mark == 0 and known[label] == value) if label >= 0 else (mark == 200 and value in unknown)
    assert len(data.train) + len(data.held_out) == 4 * 4
    assert data.test.labels[data.test.labels >= 0].bincount().tolist() == [2] * 4
    assert (data.test.labels < 0).sum() == 2 * len(unknown)


def test_cifar_plus_lists():
    for ten, fifty in zip(CIFAR_PLUS["cifar_plus10"], CIFAR_PLUS["cifar_plus50"], strict=True):
        assert len(set(ten)) == 10 and len(set(fifty)) == 50 and set(fifty) <= set(range(100))
        assert fifty[-10:] == ten  # as in the publication
    for known in SPLITS["cifar_plus10"]:
        assert len(set(known)) == 4 and set(known) <= set(range(10))


def test_cifar_plus_with_classes_of_ones_own_or_no_split(cifar):
    config = DataConfig(name="cifar_plus10", root=str(cifar))
    assert len(load_data(config, 0).unknown) == 100
    own = load_data(replace(config, split=1, known=["CIFAR10 3", "CIFAR10 5"]), 0)
    assert own.known == [3, 5] and own.unknown == [f"CIFAR100 {i}" for i in CIFAR_PLUS["cifar_plus10"][1]]
    (cifar / "folders" / "train").mkdir(parents=True)
    for part, name in itertools.product(("train", "test"), ("cat", "dog")):
        (cifar / "folders" / part / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(cifar / "folders" / part / name / "1.png")
    with pytest.raises(ValueError, match=r"data\.root: data=cifar_plus10 needs CIFAR-10 and CIFAR-100 as torchvision"):
        load_data(replace(config, root=str(cifar / "folders")), 0)
    with pytest.raises(ValueError, match="5 does not exist; choose 0-4"):
        load_data(replace(config, split=5), 0)


def test_every_data_config_names_a_source():
    files = sorted((Path(__file__).parents[3] / "configs/data").glob("*.yaml"))
    for file in files:
        config = OmegaConf.load(file)
        assert config.get("data", config).name == file.stem
    assert {file.stem for file in files} == set(SOURCES)


def test_a_folder_of_unknown_images(tmp_path):
    folder(tmp_path / "far" / "deep" / "deeper", ["a", "b"], 3, size=(30, 20))
    picture(tmp_path / "far" / "top.png", (1, 2, 3))
    plain, far = load_data(DIGITS, 0), load_data(replace(DIGITS, unknown_root=str(tmp_path / "far")), 0)
    assert (far.test.labels < 0).sum() == 7 and far.unknown == [str(tmp_path / "far")]
    assert torch.equal(far.test.images[:-7], plain.test.images[plain.test.labels >= 0])
    assert torch.equal(far.test.labels[:-7], plain.test.labels[plain.test.labels >= 0])
    assert (far.test.images[-1, :, 0, 0] == torch.tensor([1, 2, 3])).all()  # sorted: top.png is the last
    assert torch.equal(far.train.images, plain.train.images)

    folder(tmp_path / "near", ["cat", "dog", "emu"], 4)
    config = DataConfig(name="imagefolder", image_size=8, root=str(tmp_path / "near"), known=["cat", "dog"])
    config.unknown_root = str(tmp_path / "far")
    for memory in (4.0, 0.0):  # decoded at once, or streamed
        data = load_data(replace(config, memory_gib=memory), 0)
        assert data.test.labels.tolist() == [0, 1, *[-1] * 7]
        assert data.test[8][0][:, 0, 0].tolist() == [1, 2, 3]
        assert len(data.test.files) == 9

    with pytest.raises(ValueError, match=r"data\.unknown_root: .*nowhere is not a folder"):
        load_data(replace(config, unknown_root=str(tmp_path / "nowhere")), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.unknown_root: no images in"):
        load_data(replace(config, unknown_root=str(tmp_path / "empty")), 0)
    for i in range(4):
        picture(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(ValueError, match=r"data\.unknown_root: .*have no classes"):
        load_data(replace(config, root=str(tmp_path / "flat"), known=None), 0)


def test_decoded_images_share_their_memory(tmp_path, monkeypatch):
    """9 training and 3 test images of 192 bytes each; while they are split, training images are there twice."""
    folder(tmp_path / "photos", ["cat", "dog", "emu"], 4)
    config = DataConfig(name="imagefolder", image_size=8, root=str(tmp_path / "photos"), holdout=0.0)

    def decoded(memory: float, free: int | None = None) -> list[bool]:
        monkeypatch.setattr(open_set, "free_memory", lambda: free)
        data = load_data(replace(config, memory_gib=memory / 2**30), 0)
        assert (len(data.train), len(data.test)) == (9, 3)
        return [part.images is not None for part in (data.train, data.test)]

    assert decoded(12 * 192) == decoded(12 * 192, 24 * 192) == [True, True]
    assert decoded(12 * 192 - 1) == decoded(12 * 192, 24 * 192 - 2) == [True, False]
    assert decoded(9 * 192 - 1) == decoded(4e9, 18 * 192 - 2) == [False, True]
    assert decoded(3 * 192 - 1) == [False, False]


def test_several_named_folders_of_unknown_images(tmp_path):
    folder(tmp_path / "a", ["x"], 3, size=(30, 20))
    folder(tmp_path / "b" / "deep", ["y"], 2)
    folder(tmp_path / "near", ["cat", "dog", "emu"], 4)
    both = {"near": str(tmp_path / "a"), "far": str(tmp_path / "b")}
    plain, data = load_data(DIGITS, 0), load_data(replace(DIGITS, unknown_roots=both), 0)
    known = plain.test.images[plain.test.labels >= 0]
    assert torch.equal(data.test.images[:-5], known) and data.unknown == ["near", "far"]
    for memory in (4.0, 0.0):  # decoded at once, or streamed
        for bad in ("error", "skip"):
            config = DataConfig("imagefolder", image_size=8, root=str(tmp_path / "near"), known=["cat", "dog"])
            config = replace(config, unknown_roots=both, memory_gib=memory, on_bad_image=bad)
            if bad == "skip":
                next((tmp_path / "a").rglob("*.*")).write_text("<html>")  # the sets stay aligned
            data = load_data(config, 0, look=True)
            assert data.test.labels.tolist() == [0, 1, *[-1] * (5 - (bad == "skip"))]
            sizes = {name: int(rows.sum()) for name, rows in data.unknown_sets.items()}
            assert sizes == {"near": 3 - (bad == "skip"), "far": 2}
            names = {name: [data.test.files[i] for i in rows.nonzero()] for name, rows in data.unknown_sets.items()}
            assert all(path.startswith(both[name]) for name, paths in names.items() for path in paths)
        for path in (tmp_path / "b").rglob("*.*"):
            path.write_text("<html>")
        with pytest.raises(ValueError, match=r"data\.unknown_roots\.far: no image in .*b can be read"):
            load_data(config, 0, look=True)
        folder(tmp_path / "a", ["x"], 3)
        folder(tmp_path / "b" / "deep", ["y"], 2)

    for wrong, message in (
        ({"unknown_root": "x"}, "data.unknown_root is given too"),
        ({"unknown_roots": {"a/b": "x"}}, "'a/b' is no name"),
        ({"unknown_roots": {"far": 3}}, "data.unknown_roots.far: expected a folder, got 3"),
        ({"unknown_roots": {"far": "nowhere"}}, "data.unknown_roots.far: nowhere is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(replace(config, **wrong), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": 7}, "does not exist; choose 0-4"),
        ({"split": None, "known": ["11"]}, "'11' is no class"),
        ({"split": None, "known": ["1"]}, "one known class only"),
        ({"split": None, "known": ["1", 1]}, "named twice"),
        ({"name": "imagefolder", "split": None}, "needs the folder"),
        ({"name": "imagefolder", "split": None, "root": "/nowhere"}, "/nowhere is not a folder"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_data(replace(DIGITS, **change), 0)


def test_empty_folders_and_files_that_are_no_images_are_named(tmp_path):
    config = DataConfig(name="imagefolder", image_size=8, root=str(tmp_path))
    with pytest.raises(ValueError, match="no images in"):
        load_data(config, 0)
    folder(tmp_path, ["cat", "dog"])
    (tmp_path / "cat" / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "dog" / "empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image files can't be read.*(page|empty)\.jpg"):
        load_data(replace(config, holdout=0, test_fraction=0.01), 0)


def test_every_mode_becomes_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "1", "LA"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        image = decode(picture(path, (255, 255, 255), mode=mode), 8)
        assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
        assert image.float().mean() > 250
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(deep)
    assert (decode(deep, 8).int() - 127).abs().max() <= 1


def test_wide_images_keep_their_middle_and_exif_turns_them(tmp_path):
    image = Image.new("RGB", (30, 10))
    image.paste((255, 0, 0), (10, 0, 20, 10))
    image.save(tmp_path / "wide.png")
    assert (decode(tmp_path / "wide.png", 10)[0] > 200).all()
    upright = Image.new("RGB", (10, 10))
    upright.paste((255, 255, 255), (0, 0, 10, 5))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    upright.save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", 10)
    assert turned[:, :5].max() == 0 and turned[:, 5:].min() == 255


def test_pseudo_unknown_classes_are_known_ones_and_the_unknown_are_left_out():
    whole = load_data(DIGITS, 0)
    pseudo = load_data(replace(DIGITS, pseudo_unknown=2), 0)
    assert pseudo.classes == whole.classes[:4] and pseudo.unknown == whole.classes[4:]
    known = whole.test.labels
    assert (pseudo.test.labels >= 0).sum() == ((known >= 0) & (known < 4)).sum()
    assert (pseudo.test.labels < 0).sum() == (known >= 4).sum()
    assert len(load_data(replace(DIGITS, pseudo_unknown=4), 0).classes) == 2
    with pytest.raises(ValueError, match=r"data.pseudo_unknown: expected 0 to 4 of 6 known, got 5"):
        load_data(replace(DIGITS, pseudo_unknown=5), 0)


@pytest.mark.parametrize("key", ["unknown_root", "unknown_roots"])
def test_pseudo_unknown_leaves_folders_of_unknown_images_out_too(key, tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    Image.new("RGB", (8, 8)).save(far / "0.png")
    given = str(far) if key == "unknown_root" else {"far": str(far)}
    alone = load_data(replace(DIGITS, pseudo_unknown=2), 0)
    beside = load_data(replace(DIGITS, pseudo_unknown=2, **{key: given}), 0)
    assert torch.equal(beside.test.labels, alone.test.labels)
    assert beside.unknown == alone.unknown and not beside.unknown_sets


@pytest.mark.parametrize("given", [{"known": ["a", "b"]}, {"split": 0}, {"pseudo_unknown": 2}])
def test_images_without_classes_have_none_that_are_known(given, tmp_path):
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (key,) = given
    with pytest.raises(ValueError, match=rf"data\.{key}: .*have no classes"):
        load_data(DataConfig(name="imagefolder", root=str(tmp_path), **given), 0)


def test_cifar10_as_folders_has_its_own_splits(tmp_path):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for part in ("train", "test"):
        folder(tmp_path / part, names, count=3)
    data = load_data(DataConfig("cifar10", root=str(tmp_path), image_size=8, split=0, holdout=0), 0)
    assert data.classes == [names[i] for i in SPLITS["cifar10"][0]]
    assert len(data.train) == 18 and len(data.test) == 30


@pytest.mark.parametrize(
    ("side", "usual"), [(8, 32), (40, 32), (64, 64), (100, 64), (150, 128), (300, 224), (2000, 224)]
)
def test_an_image_size_follows_the_images(tmp_path, side, usual):
    folder(tmp_path, ["a", "b"], size=(side + 10, side))
    data = load_data(DataConfig("imagefolder", str(tmp_path), image_size=None), 0)
    assert {part.size for part in data.sets().values()} == {usual}
    with pytest.raises(ValueError, match=r"data\.image_size: null, chosen by the images, is for image files"):
        load_data(replace(DIGITS, image_size=None), 0)


def test_whether_views_are_cut_from_the_files(tmp_path):
    folder(tmp_path, ["a", "b"], size=(24, 24))
    plain = DataConfig("imagefolder", str(tmp_path))
    for size, views, photographs in (
        *((24, "auto", False), (32, "auto", False), (23, "auto", True)),
        *((24, "files", True), (23, "squares", False)),
    ):
        data = load_data(replace(plain, image_size=size, views=views), 0)
        for part in data.sets().values():
            assert part.photographs == photographs and (part.images is None) == photographs
        assert len(data.notes) == 1 and data.looked_at != photographs
        assert ("cut from the files" in data.notes[0]) == photographs
    picture(tmp_path / "a" / "0.png", size=(25, 24))  # one that is wider is enough
    assert load_data(replace(plain, image_size=24), 0).train.photographs
    assert load_data(DIGITS, 0).notes == []


def test_a_number_is_no_index_where_classes_have_numbers_for_names():
    source = SimpleNamespace(classes=["0", "1", "3", "7"])
    assert known_classes(DataConfig("imagefolder", known=[0, 3]), source) == [0, 2]
    with pytest.raises(ValueError, match=r"data\.known: 2 is no class of data=imagefolder; classes are 0, 1, 3, 7"):
        known_classes(DataConfig("imagefolder", known=[0, 2]), source)
    assert known_classes(DataConfig("imagefolder", known=[1]), SimpleNamespace(classes=["cat", "dog"])) == [1]
    assert known_classes(DataConfig("imagefolder", known=[True]), SimpleNamespace(classes=["no", "maybe", "true"])) == [
        2
    ]
    with pytest.raises(ValueError, match=r"data\.known: True is no class"):
        known_classes(DataConfig("imagefolder", known=[True]), SimpleNamespace(classes=["cat", "dog"]))


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path):
    for half, form in (("train", "NFC"), ("test", "NFD")):
        for name in ("café", "tea"):
            folder = tmp_path / half / normalize(form, name)
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    data = load_data(DataConfig("imagefolder", image_size=8, root=str(tmp_path), holdout=0.0), 0)
    assert data.classes == ["café", "tea"] and data.test.labels.tolist() == [0] * 4 + [1] * 4


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        for number in range(8):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    assert load_data(DataConfig("imagefolder", image_size=8, root=str(tmp_path)), 0).classes == ["bus", "train"]


def test_folders_that_are_read(tmp_path):
    """So that nothing is written where it would be taken for an image or a class the next time."""
    data = DataConfig(name="imagefolder", root=str(tmp_path))
    assert folders_read(data) == [tmp_path]
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        assert folders_read(data)[-1] == tmp_path / name
    assert folders_read(replace(data, name="cifar10")) == [tmp_path / "train", tmp_path / "val"]
    inner = tmp_path / "tiny-imagenet-200/train"
    inner.mkdir(parents=True)
    assert folders_read(replace(data, name="tinyimagenet")) == [inner]
    assert folders_read(DataConfig(name="cifar10", root="x", unknown_root="far")) == [Path("far")]
