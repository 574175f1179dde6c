"""Where images come from: data sets by name, as training and test images with all their classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets

from gradmix.registry import Registry
from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.copies import first_copies
from gradmix.ssl.data.doubts import doubts_of
from gradmix.ssl.data.images import ImageSet, from_array
from gradmix.ssl.data.listing import list_folders, list_images
from gradmix.ssl.data.reading import EXTENSIONS
from gradmix.ssl.data.shards import list_shards, read_shards
from gradmix.ssl.data.splits import CIFAR_PLUS
from gradmix.ssl.runs.lock import in_turn

UNKNOWN_SIZE = 0  # of images that are still files, until gradmix.ssl.data.open_set chooses one by them
# In any case; of the test folders the first that is there is the test set.
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
TINY_IMAGENET = "tiny-imagenet-200"  # the folder that its archive makes


@dataclass(frozen=True)
class Source:
    """A data set before the split: labels index ``classes``; -1 where an image has no class.

    Attributes:
        unknown: the classes that are, where it is not all that are not known; the rest is left out of the test set.
        notes: what people should know of the data, a line each.
    """

    train: ImageSet
    test: ImageSet
    classes: list[str]
    unknown: list[int] | None = None
    notes: Sequence[str] = ()


def digits(config: DataConfig, seed: int) -> Source:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8; a fixed third of each class is the test set."""
    data = load_digits()
    images = from_array((data.images * (255 / 16)).round().astype(np.uint8), config.image_size)
    everything = ImageSet(torch.from_numpy(data.target).long(), images.shape[-1], images)
    train, test = stratified(everything.labels, 1 / 3, seed=0)  # fixed: the same test set for every seed
    return Source(everything.select(train), everything.select(test), [str(i) for i in range(10)])


def imagefolder(config: DataConfig, seed: int) -> Source:
    """``root/train/<class>/`` and ``root/test/<class>/``; or ``root/<class>/``; or ``root/`` with images alone.

    Instead of class folders there may be tar shards, ``root/train/*.tar`` or ``root/*.tar``.

    Raises:
        ValueError: a folder is missing, or has no images or one class only.
    """
    root, size = _root_of(config), config.image_size or UNKNOWN_SIZE
    halves = _halves(root)
    if halves:
        half, other, notes = halves
        (train, ours, doubts), (test, theirs, more) = (_by_class(folder, size) for folder in (half, other))
        for folder, own in ((half, ours), (other, theirs)):
            if not own and (ours or theirs):
                raise ValueError(f"data.root: no images in {folder}/<class>/, though the other set has classes")
        _check_spelling(half, ours, theirs)
        classes = ours if ours == theirs else sorted({*ours, *theirs})
        train, test = _of_classes(train, ours, classes), _of_classes(test, theirs, classes)
        return Source(train, test, classes, notes=[*notes, *doubts, *more])
    everything, classes, notes = _by_class(root, size)
    filled = everything.labels.unique().tolist()
    if classes and len(filled) == 1:
        raise _only_one(root, classes[filled[0]])
    kept, aside = stratified(everything.labels, config.test_fraction, seed, first_copies(everything))
    return Source(everything.select(kept), everything.select(aside), classes, notes=notes)


def _halves(root: Path) -> tuple[Path, Path, list[str]] | None:
    """The folders of the training and of the test set, if ``root`` has them, and what to say of the others.

    Raises:
        ValueError: a folder ``train`` with classes in it, and no test set.
    """
    folders = {name.lower(): root / name for name in list_folders(root)}  # of Train and train, train: it comes later
    tests = [folders[name] for name in TEST_FOLDERS if name in folders]
    trains = [folders[name] for name in TRAIN_FOLDERS if name in folders]
    if not trains:
        return None
    half = trains[0]
    if not tests:  # a class of that name has its images right in it
        if half.name.lower() == "train" and (list_folders(half) or list_shards(half)):
            raise ValueError(f"data.root: {root} has {half.name}/ but none of {', '.join(TEST_FOLDERS)} beside it")
        return None
    notes = [f"{folder} is left out, {tests[0].name}/ is the test set" for folder in tests[1:]]
    others = [name for name in list_folders(root) if root / name not in (half, *tests)]
    if others:
        notes.append(f"beside {half.name}/ and {tests[0].name}/, left out: {', '.join(others)}")
    return half, tests[0], notes


def _check_spelling(half: Path, ours: list[str], theirs: list[str]) -> None:
    """
    Raises:
        ValueError: a class of the test set would be unknown for its upper and lower case alone.
    """
    trained = {name.casefold(): name for name in ours if name not in theirs}
    for name in theirs:
        if name not in ours and name.casefold() in trained:
            raise ValueError(
                f"data.root: the class {trained[name.casefold()]} in {half} is called {name} in the test set; "
                "give both folders one name"
            )


def _by_class(root: Path, size: int) -> tuple[ImageSet, list[str], list[str]]:
    """The images of ``root``, the names that their labels count, and what looks wrong about the folders."""
    if list_shards(root):
        if images := list_images(root):
            raise ValueError(
                f"data.root: {root} has tar files and images ({images[0]}); move one or the other elsewhere"
            )
        return *read_shards(root, size), []
    found: dict[str, list[str]] = {}
    for name in list_folders(root):
        # A Mac writes é as two characters, and a folder that was copied from one is no other class.
        found.setdefault(normalize("NFC", name), []).extend(list_images(root / name))
    found = dict(sorted(found.items()))
    names = list(found)
    if not any(found.values()):  # empty folders are no classes
        if len(names) == 1 and not list_images(root):
            raise _only_one(root, names[0])
        return images_below("data.root", root, size), [], []
    return _labelled(found, size), names, doubts_of(root, found)


def _of_classes(images: ImageSet, own: list[str], classes: list[str]) -> ImageSet:
    """Labels that count ``own`` names, as labels that count ``classes``."""
    if own == classes:
        return images
    place = {name: index for index, name in enumerate(classes)}
    return replace(images, labels=torch.tensor([place[name] for name in own])[images.labels])


def tinyimagenet(config: DataConfig, seed: int) -> Source:
    """TinyImageNet in its own layout; the validation images are the test set. Training folders may be missing.

    Raises:
        ValueError: the folder is not TinyImageNet's.
    """
    root, size = _root_of(config), config.image_size or UNKNOWN_SIZE
    root = root / TINY_IMAGENET if (root / TINY_IMAGENET).is_dir() else root
    for needed in ("wnids.txt", "train", "val/val_annotations.txt"):
        if not (root / needed).exists():
            raise ValueError(f"data.root: {root} is not TinyImageNet's folder, {needed} is missing")
    names = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
    index = {name: i for i, name in enumerate(names)}
    rows = [
        line.split("\t")[:2] for line in (root / "val/val_annotations.txt").read_text(encoding="utf-8").splitlines()
    ]
    test = ImageSet(
        torch.tensor([index[wnid] for _, wnid in rows]),
        size,
        files=[str(root / "val/images" / file) for file, _ in rows],
    )
    present = [name for name in names if (root / "train" / name).is_dir()]
    found = {name: list_images(root / "train" / name) if name in present else [] for name in names}
    return Source(_labelled(found, size), test, names)


def _torchvision(name: str) -> Callable[[DataConfig, int], Source]:
    def load(config: DataConfig, seed: int) -> Source:
        if config.root is not None and (Path(config.root).expanduser() / "train").is_dir():
            return imagefolder(config, seed)  # the same classes as folders of image files, in the same order
        kind, root = getattr(datasets, name), Path(config.root or "data").expanduser()
        halves = ({"split": "train"}, {"split": "test"}) if name == "SVHN" else ({"train": True}, {"train": False})
        try:
            with in_turn(root):  # the processes of a job start at once: the first downloads, for the others it is there
                parts = [kind(root, download=True, **half) for half in halves]
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"data.root: {config.root or 'data'} does not hold {name}, and it can't be downloaded ({error})"
            ) from error
        sets = []
        for part in parts:
            array = np.asarray(part.data)
            array = array.transpose(0, 2, 3, 1) if name == "SVHN" else array
            labels = torch.as_tensor(np.asarray(part.labels if name == "SVHN" else part.targets)).long()
            images = from_array(array, config.image_size)
            sets.append(ImageSet(labels, images.shape[-1], images))
        classes = [str(c) for c in range(10)] if name in ("SVHN", "MNIST") else list(parts[0].classes)
        return Source(sets[0], sets[1], classes)

    return load


def _cifar_plus(name: str) -> Callable[[DataConfig, int], Source]:
    """CIFAR-10 to train on, and a test set of CIFAR-10's known and CIFAR-100's unknown classes."""

    def load(config: DataConfig, seed: int) -> Source:
        near, far = SOURCES["cifar10"](config, seed), SOURCES["cifar100"](config, seed)
        if (len(near.classes), len(far.classes)) != (10, 100):  # folders of images would be taken for both
            raise ValueError(f"data.root: data={name} needs CIFAR-10 and CIFAR-100 as torchvision downloads them")
        offset = len(near.classes)
        # An index that does not exist is known_classes' to report.
        chosen: Sequence[int] = range(len(far.classes))
        if isinstance(config.split, int) and config.split in range(len(CIFAR_PLUS[name])):
            chosen = CIFAR_PLUS[name][config.split]
        test = join(near.test, replace(far.test, labels=far.test.labels + offset))
        return Source(near.train, test, near.classes + far.classes, [offset + i for i in chosen])

    return load


SOURCES: Registry[Callable[[DataConfig, int], Source]] = Registry(
    "gradmix.data",
    {
        "digits": digits,
        "imagefolder": imagefolder,
        "tinyimagenet": tinyimagenet,
        "cifar10": _torchvision("CIFAR10"),
        "cifar100": _torchvision("CIFAR100"),
        "cifar_plus10": _cifar_plus("cifar_plus10"),
        "cifar_plus50": _cifar_plus("cifar_plus50"),
        "svhn": _torchvision("SVHN"),
        "mnist": _torchvision("MNIST"),
    },
)


def _root_of(config: DataConfig) -> Path:
    if config.root is None:
        raise ValueError(f"data.root: data={config.name} needs the folder of its images, data.root=PATH")
    return existing_root(config.root, "data.root")


def existing_root(root: str, key: str) -> Path:
    """The folder that the key ``key`` names.

    Raises:
        ValueError: it is none.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        where = "" if path.is_absolute() else f" here, in {Path.cwd()}"
        raise ValueError(f"{key}: {path} is not a folder{where}")
    return path


def folders_read(config: DataConfig) -> list[Path]:
    """The folders that a config names in which every file is taken for an image, or every folder for a class."""
    named = [config.unknown_root, *config.unknown_roots.values()]
    folders = [Path(one).expanduser() for one in named if isinstance(one, str)]
    if config.root is None:
        return folders
    root = Path(config.root).expanduser()
    root = root / TINY_IMAGENET if config.name == "tinyimagenet" and (root / TINY_IMAGENET).is_dir() else root
    names = list_folders(root) if root.is_dir() else []
    parts = [root / name for name in names if name.lower() in (*TRAIN_FOLDERS, *TEST_FOLDERS)]
    return folders + (parts or ([root] if config.name == "imagefolder" else []))


def _labelled(found: dict[str, list[str]], size: int) -> ImageSet:
    """Files by class name, labelled with the name's place."""
    labels = torch.arange(len(found)).repeat_interleave(torch.tensor([len(files) for files in found.values()]))
    return ImageSet(labels, size, files=[file for files in found.values() for file in files])


def _only_one(root: Path, only: str) -> ValueError:
    """One class folder: the root may be one level too high, or too low."""
    hint = "give at least two"
    if (root / only).is_dir() and len(list_folders(root / only)) > 1:
        hint = f"did you mean data.root={root / only}?"
    elif any(path.is_file() and path.suffix.lower() in EXTENSIONS for path in root.iterdir()):
        hint = f"did you mean data.root={root.parent}?"
    return ValueError(f"data.root: {root} has one class folder only ({only}); {hint}")


def images_below(key: str, root: Path, size: int, label: int = -1) -> ImageSet:
    """Images of ``root`` and below, all with this label.

    Raises:
        ValueError: none there.
    """
    files = list_images(root)
    if not files:
        raise ValueError(f"{key}: no images in {root}; expected .jpg, .png, ... files there")
    return ImageSet(torch.full((len(files),), label), size, files=files)


def join(first: ImageSet, second: ImageSet) -> ImageSet:
    """The images of both, which are all files or all in memory."""
    labels = torch.cat([first.labels, second.labels])
    if first.images is None:
        return replace(first, labels=labels, files=first.paths + second.paths)
    return ImageSet(labels, first.size, torch.cat([first.images, second.pixels]))


def stratified(labels: Tensor, share: float, seed: int, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices kept and set aside: ``share`` of each class (at least one image of a class that has two), seeded.

    Args:
        first: of images that are the same one, the index of the first, see :func:`.copies.first_copies`. They stay
            together: all go where that one is drawn, or are kept, if else nothing of a class were.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    aside = torch.zeros(len(labels), dtype=torch.bool)
    order = labels.argsort(stable=True)
    for members in order.split(labels.unique(return_counts=True)[1].tolist()):
        count = min(max(round(share * len(members)), 1), len(members) - 1) if share > 0 else 0
        aside[torch.from_numpy(rng.permutation(members.numpy())[:count])] = True
    if first is not None:
        aside = aside[first]
        lost = ~torch.isin(labels, labels[~aside])
        aside &= ~torch.isin(first, first[lost])
    return (~aside).nonzero()[:, 0], aside.nonzero()[:, 0]
