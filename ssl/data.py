"""Where images come from, and who is known: training, held-out and test sets of one open-set split."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradmix.registry import Registry
from gradmix.ssl.config import DataConfig
from gradmix.ssl.images import EXTENSIONS, ImageSet, from_array, list_images
from gradmix.ssl.scan import Scan
from gradmix.ssl.splits import CIFAR_PLUS, SPLITS

ON_BAD_IMAGE = ("error", "skip")


@dataclass(frozen=True)
class OpenSetData:
    """One split.

    Attributes:
        train: images of known classes; the bank of every detector.
        held_out: a share of the known training images kept aside, for thresholds and for watching training.
        test: known classes labelled 0..K-1, unknown ones -1.
        classes: names of the K known classes; empty when the images have none.
        unknown: names of the unknown classes; of the folder, with ``data.unknown_root``.
        known: indices of the known classes among all of the data set's, in the data set's own order.
        empty: names of classes without any image.
        bad: with ``on_bad_image="skip"``, the files that were left out, each with the reason.
    """

    train: ImageSet
    held_out: ImageSet
    test: ImageSet
    classes: list[str]
    unknown: list[str]
    known: list[int]
    empty: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)

    def sets(self) -> dict[str, ImageSet]:
        """``train``, ``held_out`` and ``test`` by name, as far as there are images in them."""
        sets = {"train": self.train, "held_out": self.held_out, "test": self.test}
        return {name: images for name, images in sets.items() if len(images)}


@dataclass(frozen=True)
class Source:
    """A data set before the split: labels index ``classes``; -1 where an image has no class.

    ``unknown``: the classes that are, where it is not all that are not known; the rest is left out of the test set.
    """

    train: ImageSet
    test: ImageSet
    classes: list[str]
    unknown: list[int] | None = None


def load_data(config: DataConfig, seed: int, scan_file: Path | None = None) -> OpenSetData:
    """Read a data set and split it into known and unknown.

    Args:
        config: the ``data`` part of the run's config.
        seed: draws the held-out images (and the test images of a folder that has no ``test/``).
        scan_file: where to keep which files can be read, so that they are not all decoded again.

    Raises:
        ValueError: missing or empty folders, unreadable images, unknown splits or classes; one line each.
    """
    if config.on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"data.on_bad_image: expected {' or '.join(ON_BAD_IMAGE)}, got {config.on_bad_image!r}")
    source = SOURCES.pick("data.name", config.name)(config, seed)
    limit = int(config.memory_gib * 2**30)
    if not source.classes:
        for key in ("known", "unknown_root"):
            if getattr(config, key) is not None:
                raise ValueError(f"data.{key}: the images in data.root have no classes, so that none is known")
        train, test, known, unknown, empty = source.train, source.test, [], [], []
    else:
        known = known_classes(config, source)
        unknown = range(len(source.classes)) if source.unknown is None else source.unknown
        if config.pseudo_unknown:
            known, unknown = _pseudo(known, config.pseudo_unknown)
        counts = torch.cat([source.train.labels, source.test.labels]).bincount(minlength=len(source.classes))
        empty = [name for name, count in zip(source.classes, counts, strict=True) if not count]
        unknown = [i for i in unknown if i not in set(known) and counts[i]]
        unknown = [] if config.unknown_root is not None else unknown
        of_class = torch.full((len(source.classes) + 1,), -1)
        of_class[known] = torch.arange(len(known))
        train_labels, test_labels = of_class[source.train.labels], of_class[source.test.labels]
        train = replace(source.train, labels=train_labels).select((train_labels >= 0).nonzero()[:, 0])
        in_test = torch.isin(source.test.labels, torch.tensor([*known, *unknown]))
        test = replace(source.test, labels=test_labels).select(in_test.nonzero()[:, 0])
        if len(known) < 2:
            raise ValueError(
                f"data: one known class only ({source.classes[known[0]]}); give at least two, "
                "or a flat folder without classes and method=simclr"
            )
    classes, names = [source.classes[i] for i in known], [source.classes[i] for i in unknown]
    check_present(train, classes, config)
    scan = Scan(scan_file)
    if config.unknown_root is not None:
        root = _existing_root(config.unknown_root, "data.unknown_root")
        far = _images("data.unknown_root", root, config.image_size)
        test, names = join(test, far if test.images is None else scan.read(far, sys.maxsize)), [str(root)]
    train, test = scan.read(train, limit), scan.read(test, limit)
    if config.on_bad_image == "error":
        scan.refuse_bad()
    check_present(train, classes, config)  # now of what can be read
    kept, aside = _stratified(train.labels, config.holdout, seed)
    return OpenSetData(train.select(kept), train.select(aside), test, classes, names, known, empty, scan.bad)


def check_present(train: ImageSet, classes: list[str], config: DataConfig) -> None:
    """
    Raises:
        ValueError: a class has no images to train on.
    """
    counts = train.labels[train.labels >= 0].bincount(minlength=len(classes)).tolist()
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if missing:
        raise ValueError(f"data.root: {config.root}: no training images of the known classes {', '.join(missing)}")


def join(first: ImageSet, second: ImageSet) -> ImageSet:
    """The images of both, which are all files or all in memory."""
    labels = torch.cat([first.labels, second.labels])
    if first.images is None:
        return ImageSet(labels, first.size, files=[*first.files, *second.files])
    return ImageSet(labels, first.size, torch.cat([first.images, second.images]))


def known_classes(config: DataConfig, source: Source) -> list[int]:
    """Indices of the known classes: ``data.known``, else the data set's split, else all that have training images."""
    if config.known is not None:
        by_name = {name: index for index, name in enumerate(source.classes)}
        known = []
        for entry in config.known:
            index = by_name.get(str(entry), entry)
            if not isinstance(index, int) or not 0 <= index < len(source.classes):
                raise ValueError(
                    f"data.known: {entry!r} is no class of data={config.name}; classes are "
                    f"{', '.join(source.classes[:20])}{', ...' if len(source.classes) > 20 else ''}"
                )
            known.append(index)
        if len(set(known)) < len(known):
            raise ValueError(f"data.known: a class is named twice in {list(config.known)}")
        return known
    if config.split is None:
        return source.train.labels.unique().tolist()
    splits = splits_of(config)
    if not isinstance(config.split, int) or not 0 <= config.split < len(splits):
        raise ValueError(f"data.split: {config.split!r} does not exist; choose 0-{len(splits) - 1}, or all")
    return splits[config.split]


def _pseudo(known: list[int], count: int) -> tuple[list[int], list[int]]:
    if not 0 < count <= len(known) - 2:
        raise ValueError(f"data.pseudo_unknown: expected 0 to {len(known) - 2} of {len(known)} known, got {count}")
    return known[:-count], known[-count:]


def splits_of(config: DataConfig) -> list[list[int]]:
    """The data set's open-set splits.

    Raises:
        ValueError: no such data set, or it has none.
    """
    SOURCES.pick("data.name", config.name)  # one from outside puts its splits into SPLITS when it is imported
    if config.name not in SPLITS:
        raise ValueError(f"data.split: data={config.name} has no splits; name the known classes with data.known=[...]")
    return SPLITS[config.name]


def _stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices kept and set aside: ``share`` of each class (at least one image of a class that has two), seeded."""
    rng = np.random.default_rng([seed, 0x5EED])
    aside = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0].numpy()
        count = min(max(round(share * len(members)), 1), len(members) - 1) if share > 0 else 0
        aside[torch.from_numpy(rng.permutation(members)[:count])] = True
    return (~aside).nonzero()[:, 0], aside.nonzero()[:, 0]


def digits(config: DataConfig, seed: int) -> Source:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8; a fixed third of each class is the test set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = from_array((data.images * (255 / 16)).round().astype(np.uint8), config.image_size)
    everything = ImageSet(torch.from_numpy(data.target).long(), config.image_size, images)
    train, test = _stratified(everything.labels, 1 / 3, seed=0)  # fixed: the same test set for every seed
    return Source(everything.select(train), everything.select(test), [str(i) for i in range(10)])


def imagefolder(config: DataConfig, seed: int) -> Source:
    """``root/train/<class>/`` and ``root/test/<class>/``; or ``root/<class>/``; or ``root/`` with images alone."""
    root = _root_of(config)
    if (root / "train").is_dir():
        test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
        if test_root is None:
            raise ValueError(f"data.root: {root} has train/ but neither test/ nor val/")
        names = sorted({*_class_names(root / "train"), *_class_names(test_root)})
        return Source(
            _folder(root / "train", names, config.image_size), _folder(test_root, names, config.image_size), names
        )
    names = _class_names(root)
    if len(names) == 1:
        raise ValueError(f"data.root: {root} has one class folder only ({names[0]}){_other_root(root, names[0])}")
    everything = _folder(root, names, config.image_size)
    train, test = _stratified(everything.labels, config.test_fraction, seed)
    return Source(everything.select(train), everything.select(test), names)


def tinyimagenet(config: DataConfig, seed: int) -> Source:
    """TinyImageNet in its own layout; the validation images are the test set. Training folders may be missing."""
    root = _root_of(config)
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    for needed in ("wnids.txt", "train", "val/val_annotations.txt"):
        if not (root / needed).exists():
            raise ValueError(f"data.root: {root} is not TinyImageNet's folder, {needed} is missing")
    names = sorted((root / "wnids.txt").read_text().split())
    index = {name: i for i, name in enumerate(names)}
    rows = [line.split("\t")[:2] for line in (root / "val/val_annotations.txt").read_text().splitlines()]
    test = ImageSet(
        torch.tensor([index[wnid] for _, wnid in rows]),
        config.image_size,
        files=[str(root / "val/images" / file) for file, _ in rows],
    )
    present = [name for name in names if (root / "train" / name).is_dir()]
    return Source(_folder(root / "train", names, config.image_size, present), test, names)


def _torchvision(name: str) -> Callable[[DataConfig, int], Source]:
    def load(config: DataConfig, seed: int) -> Source:
        from torchvision import datasets

        if config.root is not None and (Path(config.root).expanduser() / "train").is_dir():
            return imagefolder(config, seed)  # the same classes as folders of image files, in the same order
        kind = getattr(datasets, name)
        parts = []
        for train in (True, False):
            which = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
            try:
                parts.append(kind(config.root or "data", download=True, **which))
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"data.root: {config.root or 'data'} does not hold {name}, and it can't be downloaded ({error})"
                ) from error
        sets = []
        for part in parts:
            array = np.asarray(part.data)
            array = array.transpose(0, 2, 3, 1) if name == "SVHN" else array
            labels = torch.as_tensor(np.asarray(part.labels if name == "SVHN" else part.targets)).long()
            sets.append(ImageSet(labels, config.image_size, from_array(array, config.image_size)))
        classes = [str(c) for c in range(10)] if name in ("SVHN", "MNIST") else list(parts[0].classes)
        return Source(*sets, classes)

    return load


def _cifar_plus(name: str) -> Callable[[DataConfig, int], Source]:
    """CIFAR-10 to train on, and a test set of CIFAR-10's known and CIFAR-100's unknown classes."""

    def load(config: DataConfig, seed: int) -> Source:
        near, far = SOURCES["cifar10"](config, seed), SOURCES["cifar100"](config, seed)
        offset = len(near.classes)
        # An index that does not exist is known_classes' to report.
        split = config.split if config.split in range(len(CIFAR_PLUS[name])) else None
        chosen = range(len(far.classes)) if split is None else CIFAR_PLUS[name][split]
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
    return _existing_root(config.root, "data.root")


def _existing_root(root: str, key: str) -> Path:
    path = Path(root).expanduser()
    if not path.is_dir():
        where = "" if path.is_absolute() else f" here, in {Path.cwd()}"
        raise ValueError(f"{key}: {path} is not a folder{where}")
    return path


def _class_names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _folder(root: Path, names: list[str], size: int, present: list[str] | None = None) -> ImageSet:
    """Images of ``root/<class>/``; of ``root`` itself, labelled -1, when there are no class folders."""
    files, labels = [], []
    for index, name in enumerate(names):
        if present is None or name in present:
            found = list_images(root / name) if (root / name).is_dir() else []
            files += found
            labels += [index] * len(found)
    if not names:
        return _images("data.root", root, size)
    if not files:
        raise ValueError(f"data.root: no images in {root}; expected {root}/<class>/*.jpg (or .png, ...)")
    return ImageSet(torch.tensor(labels), size, files=files)


def _other_root(root: Path, only: str) -> str:
    """A hint for a root with one class folder: it may be one level too high, or too low."""
    if len(_class_names(root / only)) > 1:
        return f"; did you mean data.root={root / only}?"
    loose = any(path.is_file() and path.suffix.lower() in EXTENSIONS for path in root.iterdir())
    return f"; did you mean data.root={root.parent}?" if loose else "; give at least two"


def _images(key: str, root: Path, size: int) -> ImageSet:
    """Images of ``root`` and below, labelled -1."""
    files = list_images(root)
    if not files:
        raise ValueError(f"{key}: no images in {root}; expected .jpg, .png, ... files there")
    return ImageSet(torch.full((len(files),), -1), size, files=files)
