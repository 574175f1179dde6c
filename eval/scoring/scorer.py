"""A detector's folder scores image files, with nothing but itself.

detector.json, detector.safetensors   the detector (gradmix.eval.detectors.store)
backbone.safetensors                  the weights, and in its header which encoder and image size
head.safetensors                      the projection head, for a detector that looks at projections
thumbnails.safetensors                training images that never were files, at most 32 x 32, for explanations
scorer.json                           class names, names of the training images, SHA-256 of all of these and of itself
"""

import glob
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from tqdm.auto import tqdm

from gradmix.eval import detectors
from gradmix.eval.detectors import DeepKNN, Detector
from gradmix.eval.features.extraction import Model
from gradmix.ssl.data.images import decode
from gradmix.ssl.data.listing import list_images
from gradmix.ssl.data.names import UNKNOWN_NAME, check_class_names
from gradmix.ssl.keys import Key
from gradmix.ssl.machine import usable_cpus
from gradmix.ssl.runs.documents import as_schema, read_document
from gradmix.ssl.runs.files import hash_file, hash_json, write_atomically, write_json, write_tensors
from gradmix.ssl.runs.tensors import opened_tensors

if TYPE_CHECKING:  # it reads data sets, for which it imports scikit-learn: seconds, and scoring needs none
    from gradmix.ssl.data.open_set import OpenSetData

LARGEST_LIST = 2**30  # bytes of scorer.json, which names every training image
THUMBNAILS = "thumbnails.safetensors"
THUMBNAIL_SIZE = 32
Picture = str | Path | Image | np.ndarray  # a file; or an image, as Backbone.transform takes it
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class About:
    """``scorer.json``."""

    classes: list[str]
    train_files: list[str] | None
    files: dict[str, str]
    sha256: str
    space: Annotated[str, Key(choices=("features", "projections"))] = "features"  # what the detector looks at


@dataclass(frozen=True)
class Score:
    """One scored image; the columns of ``scores.csv``, where text that a spreadsheet would run has a ' before it.

    Attributes:
        path: the file; of an image that is none, ``image`` and its number.
        score: higher is more unknown; None when the file could not be read.
        prediction: ``"unknown"`` above the threshold, else the class's name (``""`` where there are no classes).
        margin: score minus threshold; above 0 is unknown.
        p_value: the chance that an image like the held-out ones scores as high or higher; None for a detector without.
        nearest: the nearest training image: its path, or its row when it never was a file; empty for detectors other
            than deep_knn on features.
        error: why the file could not be read, else empty.
    """

    path: str
    score: float | None = None
    prediction: str = ""
    margin: float | None = None
    p_value: float | None = None
    nearest: str = ""
    error: str = ""


def save_scorer(folder: Path, detector: Detector, run_dir: Path, data: "OpenSetData", space: str = "features") -> None:
    """Write the folder that :class:`Scorer` loads.

    Args:
        detector: fitted to the training images of ``data``.
        run_dir: the folder with the weights.
        space: what it was fitted to, ``features`` or ``projections``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ["backbone.safetensors", *(["head.safetensors"] if space == "projections" else [])]
    for name in names:
        write_atomically(folder / name, partial(shutil.copyfile, run_dir / name))
    train, shows = data.train, isinstance(detector, DeepKNN) and space == "features"
    if shows and train.files is None:
        small = train.size <= THUMBNAIL_SIZE
        images = train.pixels if small else torch.cat([_shrink(part) for part in train.pixels.split(1024)])
        write_tensors(folder / THUMBNAILS, {"images": images})
    else:
        (folder / THUMBNAILS).unlink(missing_ok=True)
    detector.save(folder)
    names += ["detector.json", *([THUMBNAILS] if shows and train.files is None else [])]
    about = {
        "classes": list(data.classes),
        "space": space,
        "train_files": list(train.files) if shows and train.files is not None else None,
        "files": {name: hash_file(folder / name) for name in names},
    }
    write_json(folder / "scorer.json", about | {"sha256": hash_json(about)})


class Scorer:
    """A saved detector, ready for image files.

    Attributes:
        sha256: of every file and name in the folder; other detectors have another.

    Raises:
        ValueError: the folder is no detector's, or a file in it is damaged.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        folder = Path(folder).expanduser()
        if not (folder / "scorer.json").is_file():
            run = folder.parent.parent if folder.parent.name == "detectors" else folder
            there = [*run.glob("detector/scorer.json"), *sorted(run.glob("detectors/*/scorer.json"))]
            hint = f"; did you mean {' or '.join(str(path.parent) for path in there)}?" if there else ""
            raise ValueError(f"detector: {folder} is not a detector's folder, scorer.json is missing{hint}")
        about = read_about(folder / "scorer.json")
        for name, expected in about.files.items():
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: missing")
            if hash_file(folder / name) != expected:
                raise ValueError(f"{folder / name}: damaged, it does not match scorer.json's hash")
        self.classes, self.train_files, self.files = about.classes, about.train_files, about.files
        self.detector = detectors.load(folder)
        self.model = Model(folder, device)
        self.backbone, self.device = self.model.backbone, device
        self.space = about.space
        if self.space == "projections" and self.model.head is None:
            raise ValueError(f"{folder / 'head.safetensors'}: missing, the detector looks at projections")
        self.folder = folder
        self.sha256 = about.sha256
        self._check()

    def _check(self) -> None:
        """See that the files belong together: one class name and one training image for every one of the detector's."""
        detector, where = self.detector, self.folder / "scorer.json"
        width = self.model.widths[self.space]
        if detector.width_ != width:
            wide = f"{self.space} {width} wide, the detector's are {detector.width_}"
            raise ValueError(f"{self.folder / 'backbone.safetensors'}: {wide}")
        if detector.classes_ is not None and detector.classes_[-1] >= len(self.classes):
            last = f"the detector's last is number {detector.classes_[-1]}"
            raise ValueError(f"{where}: classes: {len(self.classes)} names, {last}")
        if self.knn is None:
            return
        rows = len(self.knn.bank_)
        if self.train_files is not None and len(self.train_files) != rows:
            raise ValueError(f"{where}: train_files: {len(self.train_files)} names, the detector has {rows} images")
        if self.train_files is None:
            path = self.folder / THUMBNAILS
            if THUMBNAILS not in self.files:
                raise ValueError(f"{where}: files: {THUMBNAILS} is missing")
            with opened_tensors(path) as file:
                part = file.get_slice("images") if "images" in file.keys() else None
                kind, shape = (None, []) if part is None else (part.get_dtype(), part.get_shape())
            side = shape[-1] if shape else 0
            if kind != "U8" or shape != [rows, 3, side, side] or not 1 <= side <= THUMBNAIL_SIZE:
                raise ValueError(f"{path}: images: expected [{rows}, 3, S, S] bytes, S at most {THUMBNAIL_SIZE}")

    def score(self, images: Sequence[Picture], batch_size: int = 256, progress: bool = False) -> Iterator[Score]:
        """Score images one batch at a time, in order. Unreadable files get a row with the error.

        While the detector looks at a batch, the network is at the next one, and the files of up to three more are
        decoded. How far they get changes no bit of a score.
        """
        hidden = None if progress else True  # None: where the output is no terminal
        decoders, network = ThreadPoolExecutor(usable_cpus()), ThreadPoolExecutor(1)
        try:
            decoded = ahead(decoders, self._decode, images, 2 * batch_size)
            batches = iter(lambda: list(islice(decoded, batch_size)), [])
            names = (str(x) if isinstance(x, str | Path) else f"image {number}" for number, x in enumerate(images))
            with tqdm(total=len(images), unit="image", disable=hidden) as bar:
                for batch, features in ahead(network, self._look_at, batches, 1):
                    scored = iter(() if features is None else self._score(features))
                    for path, image in zip(islice(names, len(batch)), batch, strict=True):
                        yield Score(path, error=image) if isinstance(image, str) else replace(next(scored), path=path)
                    bar.update(len(batch))
        finally:
            for pool in (network, decoders):
                pool.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def neighbours(self, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances ``[N, k]`` to the nearest training images of ``[N, 3, S, S]`` uint8, and their rows ``[N, k]``.

        Raises:
            ValueError: the detector knows no training images.
        """
        similarity, rows = map(torch.as_tensor, self.check_neighbours().neighbours(self.look(images), k))
        return (2 - 2 * similarity).clamp(min=0).sqrt(), rows

    @property
    def knn(self) -> DeepKNN | None:
        """The detector, where it can say which training image is nearest: deep_knn on features."""
        return self.detector if isinstance(self.detector, DeepKNN) and self.space == "features" else None

    def check_neighbours(self) -> DeepKNN:
        """The detector, which knows the nearest training images.

        Raises:
            ValueError: the detector knows no training images.
        """
        if self.knn is None:
            raise ValueError(
                f"explain: {self.detector.NAME} knows no training images to show; deep_knn on features does"
            )
        return self.knn

    @torch.inference_mode()
    def look(self, images: Tensor) -> Tensor:
        """What the detector looks at, of ``[N, 3, S, S]`` uint8: features or projections, on the CPU."""
        features = self.backbone(images.to(self.device))
        if self.space == "projections" and self.model.head is not None:
            features = F.normalize(self.model.head(features), dim=1)
        return features.cpu()

    def training_image(self, row: int) -> Tensor:
        """A training image ``[3, s, s]`` uint8: the file, where it still is one, else the stored thumbnail.

        Raises:
            ValueError: the file is gone or unreadable.
        """
        if self.train_files is not None:
            if not Path(self.train_files[row]).is_file():
                raise ValueError(f"{self.train_files[row]}: not a readable image (no such file)")
            return decode(self.train_files[row], self.backbone.image_size, self.backbone.fit)
        with opened_tensors(self.folder / THUMBNAILS) as file:
            return file.get_slice("images")[row]

    def training_name(self, row: int) -> str:
        """A training image's file, or its row where it never was one."""
        return f"training image {row}" if self.train_files is None else self.train_files[row]

    def training_class(self, row: int) -> str:
        """The class of a training image, by row; empty where there are no classes.

        Raises:
            ValueError: the detector knows no training images.
        """
        knn = self.check_neighbours()
        if knn.classes_ is None or knn.positions_ is None:
            return ""
        return self.classes[int(knn.classes_[knn.positions_[row]])]

    def _decode(self, image: Picture) -> Tensor | str:
        try:
            return self.backbone.transform(image)
        except ValueError as error:
            return str(error)

    def _look_at(self, batch: list[Tensor | str]) -> tuple[list[Tensor | str], Tensor | None]:
        """The batch, and the features of those that could be read."""
        readable = [image for image in batch if isinstance(image, Tensor)]
        return batch, self.look(torch.stack(readable)) if readable else None

    def _score(self, features: Tensor) -> Iterator[Score]:
        """Of each image, without its path."""
        verdict, missing, nearest = self.detector.judge(features), [None] * len(features), [""] * len(features)
        if self.knn is not None:
            nearest = [self.training_name(row) for row in self.knn.neighbours(features, 1)[1][:, 0].tolist()]
        columns = (missing if column is None else column.tolist() for column in verdict)
        for score, label, threshold, p_value, near in zip(*columns, nearest, strict=True):
            prediction = "" if label is None else self.classes[int(label)]
            if threshold is not None and score > threshold:
                prediction = UNKNOWN_NAME
            margin = None if threshold is None else score - threshold
            yield Score("", score, prediction, margin, p_value, near)


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """``map(function, items)`` in a pool, up to ``count`` results ahead of whoever asks for them."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def find_images(where: str) -> list[str]:
    """Files named by a path, a folder (searched to the bottom) or a glob pattern, sorted.

    Raises:
        ValueError: nothing there.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        names = list_images(path)
    else:
        names = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not names:
        raise ValueError(f"images: {where} names no image file (a file, a folder or a pattern such as 'photos/*.jpg')")
    return names


def _shrink(images: Tensor) -> Tensor:
    small = F.interpolate(images.float(), size=(THUMBNAIL_SIZE, THUMBNAIL_SIZE), mode="area")
    return small.round().byte()


def read_about(path: Path) -> About:
    """
    Raises:
        ValueError: damaged, of another version, or a value makes no sense.
    """
    said = read_document(path, dict[str, Any], LARGEST_LIST)
    try:
        about = as_schema(said, About, str(path))
    except ValueError as error:
        raise ValueError(f"{error}; gradmix-eval run=... writes the folder anew") from error
    del said["sha256"]
    if about.sha256 != hash_json(said):
        raise ValueError(f"{path}: damaged, its content does not match its hash")
    names = {"backbone.safetensors", "detector.json", *(["head.safetensors"] if about.space == "projections" else [])}
    if not names <= set(about.files) <= names | {THUMBNAILS}:
        raise ValueError(f"{path}: files: expected {', '.join(sorted(names))}, got {sorted(about.files)!a:.80}")
    check_class_names(about.classes, f"{path}: classes")
    return about
