"""Who is known: training, held-out and test images of one open-set split of a data set."""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from unicodedata import normalize

import torch
from torch import Tensor

from gradmix.ssl.checks import check_values
from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.copies import count_copies, first_copies
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.kept import kept_file
from gradmix.ssl.data.scan import Scan
from gradmix.ssl.data.sizes import sample_sizes, usual_image_size
from gradmix.ssl.data.sources import SOURCES, Source, existing_root, images_below, join, stratified
from gradmix.ssl.data.splits import SPLITS
from gradmix.ssl.machine import free_memory


@dataclass(frozen=True)
class OpenSetData:
    """One split.

    Attributes:
        train: images of known classes; the bank of every detector.
        held_out: a share of the known training images kept aside, for thresholds and for watching training.
        test: known classes labelled 0..K-1, unknown ones -1.
        classes: names of the K known classes; empty when the images have none.
        unknown: names of the unknown classes; of the folder, with ``data.unknown_root``; of the folders' names, with
            ``data.unknown_roots``.
        known: indices of the known classes among all of the data set's, in the data set's own order.
        empty: names of classes without any image.
        bad: with ``on_bad_image="skip"``, the files that were left out, each with the reason.
        notes: what people should know of the data, a line each.
        looked_at: no file is left that can't be read; else their turn has not come yet.
        unknown_sets: with ``data.unknown_roots``, which test images ``[N]`` are of which, by name.
        copies: how many files are copies of another one, as ``metrics.json`` has it; empty without files.
        drawn: fingerprint of ``train`` before files that can't be read were left out of it.
    """

    train: ImageSet
    held_out: ImageSet
    test: ImageSet
    classes: list[str]
    unknown: list[str]
    known: list[int]
    empty: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    looked_at: bool = True
    unknown_sets: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    drawn: str = ""

    def sets(self) -> dict[str, ImageSet]:
        """``train``, ``held_out`` and ``test`` by name, as far as there are images in them."""
        sets = {"train": self.train, "held_out": self.held_out, "test": self.test}
        return {name: images for name, images in sets.items() if len(images)}


def load_data(config: DataConfig, seed: int, look: bool = False, pixels: bool = True) -> OpenSetData:
    """Read a data set and split it into known and unknown.

    Images that lie in memory are decoded here, and files that can't be read never belonged to the data set. Where
    files are decoded when their turn comes, none is looked at here, unless ``look`` or ``data.scan`` says so: then the
    bad ones are taken out of the sets that were split.

    Args:
        config: the ``data`` part of the run's config.
        seed: draws the held-out images (and the test images of a folder that has no ``test/``).
        look: decode every file, unless it is known from before whether that works.
        pixels: False keeps none in memory: the same sets, for whoever wants a few images.

    Raises:
        ValueError: missing or empty folders, unreadable images, unknown splits or classes, values that make no sense;
            one line each.
    """
    check_values(config, "data.")
    folders = unknown_folders(config)
    if config.pseudo_unknown:
        folders = {}  # known classes play the unknown ones, and no other image is looked at
    source = SOURCES.pick("data.name", config.name)(config, seed)
    source, photographs, notes = of_its_size(source, config)
    known: list[int] = []
    unknown: Sequence[int] = []
    empty: list[str] = []
    if not source.classes:
        for key in ("known", "split", "pseudo_unknown", "unknown_root", "unknown_roots"):
            if getattr(config, key) != getattr(DataConfig(), key):
                raise ValueError(f"data.{key}: the images in data.root have no classes, so that none is known")
        train, test = source.train, source.test
    else:
        known = known_classes(config, source)
        unknown = range(len(source.classes)) if source.unknown is None else source.unknown
        if config.pseudo_unknown:
            known, unknown = play_unknown(known, config.pseudo_unknown)
        counts = torch.cat([source.train.labels, source.test.labels]).bincount(minlength=len(source.classes))
        empty = [name for name, count in zip(source.classes, counts, strict=True) if not count]
        taken = set(known)
        unknown = [] if folders else [i for i in unknown if i not in taken and counts[i]]
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
    scan = Scan(kept_file("scans", config.root or next(iter(folders.values()), None)))
    for number, (key, folder) in enumerate(folders.items(), start=1):
        root = existing_root(folder, key)
        far = replace(images_below(key, root, test.size, -number), fit=config.fit)
        test = join(test, far if test.images is None else scan.read(far, sys.maxsize))
        names += [str(root) if key == "data.unknown_root" else key.rpartition(".")[2]]
    room = -1 if photographs else room_for_images(config)
    train, room = read_if_it_fits(train, room, scan, pixels)
    test, room = read_if_it_fits(test, room, scan, pixels)
    if config.on_bad_image == "error":
        scan.refuse_bad()
    check_present(train, classes, config)  # now of what can be read
    first = first_copies(train, test)
    kept, aside = stratified(train.labels, config.holdout, seed, None if first is None else first[: len(train)])
    sets = [train.select(kept), train.select(aside), test]
    drawn = sets[0].fingerprint()
    looked_at = look or config.scan or all(part.images is not None for part in sets)
    if look or config.scan:
        sets = [part if part.images is not None else scan.read(part, -1) for part in sets]
        if config.on_bad_image == "error":
            scan.refuse_bad()
        check_present(sets[0], classes, config)
    elif config.on_bad_image == "skip":
        sets = [replace(part, lenient=True) for part in sets]
    copies, lines = count_copies(first, train, test, scan.bad)
    of_set = named_sets(config.unknown_roots if folders else {}, sets[2].labels)
    test = replace(sets[2], labels=sets[2].labels.clamp(min=-1))
    notes = [*source.notes, *notes, *lines]
    split = sets[0], sets[1], test, classes, names, known
    return OpenSetData(*split, empty, scan.bad, notes, looked_at, of_set, copies, drawn)


def room_for_images(config: DataConfig) -> int:
    """Bytes that decoded images may take in all. While they are split, training images are there twice."""
    free = free_memory()
    return int(min(config.memory_gib * 2**30, math.inf if free is None else free / 2))


def read_if_it_fits(images: ImageSet, room: int, scan: Scan, pixels: bool) -> tuple[ImageSet, int]:
    """The images that can be read, decoded if ``pixels``; unread if the room is too small. And what room is left."""
    return (images, room) if images.bytes > room else (scan.read(images, room if pixels else -1), room - images.bytes)


def unknown_folders(config: DataConfig) -> dict[str, str]:
    """The folders of unknown images that the config names, by their key.

    Raises:
        ValueError: both keys are given, or a name or a path is none.
    """
    if config.unknown_root is not None and config.unknown_roots:
        raise ValueError("data.unknown_roots: data.unknown_root is given too; name that folder here as well")
    for name, folder in config.unknown_roots.items():
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise ValueError(f"data.unknown_roots: {name!a:.40} is no name; expected letters, digits, _ . -")
        if not isinstance(folder, str) or not folder:
            raise ValueError(f"data.unknown_roots.{name}: expected a folder, got {folder!r}")
    several = {f"data.unknown_roots.{name}": folder for name, folder in config.unknown_roots.items()}
    return several if config.unknown_root is None else {"data.unknown_root": config.unknown_root}


def named_sets(folders: dict[str, str], labels: Tensor) -> dict[str, Tensor]:
    """Which test images are of which folder, by name: those with -1 as label are of the first one, and so on.

    Raises:
        ValueError: none is left of a folder.
    """
    sets = {name: labels == -number for number, name in enumerate(folders, start=1)}
    for name, rows in sets.items():
        if not rows.any():
            raise ValueError(f"data.unknown_roots.{name}: no image in {folders[name]} can be read")
    return sets


def of_its_size(source: Source, config: DataConfig) -> tuple[Source, bool, list[str]]:
    """The source with its images' final size and fit; whether training views are cut from its files; and why, in words.

    They are where an image of a sample is larger than the square that it would become. Headers are read, no pixels.
    """
    if source.train.files is None:
        return source, False, []
    sizes = sample_sizes(source.train.files)
    size = config.image_size or usual_image_size(sizes)
    larger = (sizes > size).any(axis=1).mean() if len(sizes) else 0.0
    photographs = config.views == "files" or (config.views == "auto" and larger > 0)
    train, test = (
        replace(part, size=size, fit=config.fit, photographs=photographs) for part in (source.train, source.test)
    )
    source = replace(source, train=train, test=test)
    how = "the files" if photographs else "squares"
    why = f"of {len(sizes)} looked at, {100 * larger:.0f} % are larger than {size} x {size}"
    return source, photographs, [f"training views are cut from {how}: {why} (data.views={config.views})"]


def check_present(train: ImageSet, classes: list[str], config: DataConfig) -> None:
    """
    Raises:
        ValueError: a class has no images to train on.
    """
    counts = train.labels[train.labels >= 0].bincount(minlength=len(classes)).tolist()
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if missing:
        raise ValueError(f"data.root: {config.root}: no training images of the known classes {', '.join(missing)}")


def known_classes(config: DataConfig, source: Source) -> list[int]:
    """Indices of the known classes: ``data.known``, else the data set's split, else all that have training images.

    Raises:
        ValueError: no such class or split, or a class is named twice.
    """
    if config.known is not None:
        by_name = {normalize("NFC", name): index for index, name in enumerate(source.classes)}
        numbers = all(name.isdecimal() for name in source.classes)  # then a number is a name, never an index
        known = []
        for entry in config.known:
            name = str(entry).lower() if isinstance(entry, bool) else normalize("NFC", str(entry))  # true is a name
            index = by_name.get(name, None if numbers else entry)
            if type(index) is not int or not 0 <= index < len(source.classes):
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


def play_unknown(known: list[int], count: int) -> tuple[list[int], list[int]]:
    """The known classes without the last ``count``, and these, which play the unknown ones.

    Raises:
        ValueError: fewer than two would be left.
    """
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
