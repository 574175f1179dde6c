"""A detector's folder scores image files, with nothing but itself.

detector.json, detector.safetensors   the detector (gradmix.eval.detectors.store)
backbone.safetensors                  the weights, and in its header which encoder and image size
head.safetensors                      the projection head, for a detector that looks at projections
thumbnails.safetensors                training images that never were files, at most 32 x 32, for explanations
scorer.json                           class names, names of the training images, SHA-256 of all of these and of itself
fitted_to/                            the features that it was fitted to and calibrated on: to score takes none of them,
                                      gradmix-detector does
"""

import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from gradmix.eval import detectors
from gradmix.eval.detectors import DeepKNN, Detector
from gradmix.eval.features.extraction import Model, looked_at
from gradmix.ssl.data.images import decode
from gradmix.ssl.data.listing import list_images
from gradmix.ssl.data.names import UNKNOWN_NAME, check_class_names
from gradmix.ssl.keys import Key
from gradmix.ssl.networks.backbones import Backbone
from gradmix.ssl.runs.documents import as_schema, read_document
from gradmix.ssl.runs.files import hash_file, hash_json, write_atomically, write_json, write_tensors
from gradmix.ssl.runs.tensors import opened_tensors

if TYPE_CHECKING:  # it reads data sets, for which it imports scikit-learn: seconds, and scoring needs none
    from gradmix.ssl.data.open_set import OpenSetData

LARGEST_LIST = 2**30  # bytes of scorer.json, which names every training image
THUMBNAILS = "thumbnails.safetensors"
THUMBNAIL_SIZE = 32
FITTED_TO = ("train.safetensors", "held_out.safetensors")  # in fitted_to/, named as in a run's features/
Picture = str | Path | Image | np.ndarray  # a file; or an image, as Backbone.transform takes it


@dataclass
class About:
    """``scorer.json``."""

    classes: list[str]
    train_files: list[str] | None
    files: dict[str, str]
    sha256: str
    space: Annotated[str, Key(choices=("features", "projections"))] = "features"  # what the detector looks at
    fitted_to: dict[str, str] = field(default_factory=dict)  # SHA-256 of what is in that folder
    network: bool = True  # False: none, and the detector is given features


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


def save_scorer(
    folder: Path,
    detector: Detector,
    run_dir: Path | None,
    data: "OpenSetData",
    space: str = "features",
    features: Path | None = None,
) -> None:
    """Write the folder that :class:`Scorer` loads.

    Args:
        detector: fitted to the training images of ``data``.
        run_dir: the folder with the weights; None: there is no network, and it scores features.
        space: what it was fitted to, ``features`` or ``projections``.
        features: the folder with ``train.safetensors`` and, where images were held out, ``held_out.safetensors``, which
            are linked into ``fitted_to/``, or copied; None: the detector can't grow.
    """
    train, small = data.train, None
    files = None if train.files is None else list(train.files)
    if files is not None and run_dir is not None:  # without images these are just names
        files = list(map(os.path.abspath, files))
    if files is None and run_dir is not None and shows_images(detector, space):
        small = train.pixels if train.size <= THUMBNAIL_SIZE else shrunk(train.pixels)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "fitted_to", ignore_errors=True)
    for name in FITTED_TO:
        if features is not None and (features / name).is_file():
            (folder / "fitted_to").mkdir(exist_ok=True)
            try:
                os.link(features / name, folder / "fitted_to" / name)
            except OSError:  # another disk, or one without links
                write_atomically(folder / "fitted_to" / name, partial(shutil.copyfile, features / name))
    write_scorer(folder, detector, run_dir, list(data.classes), space, files, small)


def write_scorer(
    folder: Path,
    detector: Detector,
    weights: Path | None,
    classes: list[str],
    space: str,
    train_files: list[str] | None,
    thumbnails: Tensor | None,
) -> None:
    """Write all but ``fitted_to/``, whose files have to be there before.

    Args:
        weights: the folder with ``backbone.safetensors`` and ``head.safetensors``; None: it scores features.
        train_files, thumbnails: of the training images; only one that shows images has them.
    """
    names: list[str] = []
    if weights is not None:
        names = ["backbone.safetensors", *(["head.safetensors"] if space == "projections" else [])]
        for name in names:
            write_atomically(folder / name, partial(shutil.copyfile, weights / name))
    if thumbnails is not None:
        write_tensors(folder / THUMBNAILS, {"images": thumbnails})
    else:
        (folder / THUMBNAILS).unlink(missing_ok=True)
    detector.save(folder)
    names += ["detector.json", *([] if thumbnails is None else [THUMBNAILS])]
    about = {
        "classes": classes,
        **({} if weights is not None else {"network": False}),
        "space": space,
        "train_files": train_files if shows_images(detector, space) else None,
        "files": {name: hash_file(folder / name) for name in names},
        "fitted_to": {path.name: hash_file(path) for path in sorted(folder.glob("fitted_to/*"))},
    }
    write_json(folder / "scorer.json", about | {"sha256": hash_json(about)})


def shows_images(detector: Detector, space: str) -> bool:
    """Whether it can say which training image is nearest: deep_knn on features."""
    return isinstance(detector, DeepKNN) and space == "features"


def detector_in(folder: str | Path) -> Path:
    """A detector's folder; a run's has one in it."""
    folder = Path(folder).expanduser()
    inside = folder / "detector"
    return inside if (inside / "scorer.json").is_file() and not (folder / "scorer.json").is_file() else folder


class Scorer:
    """A saved detector, ready for image files.

    Attributes:
        sha256: of every file and name in the folder; other detectors have another.

    Raises:
        ValueError: the folder is no detector's, or a file in it is damaged.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        folder = detector_in(folder)
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
        self.fitted_to = about.fitted_to
        self.detector = detectors.load(folder)
        self.network = Model(folder, device) if about.network else None
        self.device = device
        self.space = about.space
        if self.network is not None and self.space == "projections" and self.network.head is None:
            raise ValueError(f"{folder / 'head.safetensors'}: missing, the detector looks at projections")
        self.folder = folder
        self.sha256 = about.sha256
        self._check()

    def _check(self) -> None:
        """See that the files belong together: one class name and one training image for every one of the detector's."""
        detector, where = self.detector, self.folder / "scorer.json"
        width = detector.width_ if self.network is None else self.network.widths[self.space]
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
        if self.train_files is None and self.network is not None:
            path = self.folder / THUMBNAILS
            if THUMBNAILS not in self.files:
                raise ValueError(f"{where}: files: {THUMBNAILS} is missing")
            with opened_tensors(path) as file:
                part = file.get_slice("images") if "images" in file.keys() else None
                kind, shape = (None, []) if part is None else (part.get_dtype(), part.get_shape())
            side = shape[-1] if shape else 0
            if kind != "U8" or shape != [rows, 3, side, side] or not 1 <= side <= THUMBNAIL_SIZE:
                raise ValueError(f"{path}: images: expected [{rows}, 3, S, S] bytes, S at most {THUMBNAIL_SIZE}")

    @property
    def model(self) -> Model:
        """
        Raises:
            ValueError: there is no network, the detector was fitted to features.
        """
        if self.network is None:
            raise ValueError(
                f"images: {self.folder} was fitted to features and has no network; features=FILE scores some"
            )
        return self.network

    @property
    def backbone(self) -> Backbone:
        """The network's; see :attr:`model`."""
        return self.model.backbone

    def score_features(self, features: np.ndarray, names: Sequence[str], batch_size: int = 256) -> Iterator[Score]:
        """Score features ``[N, F]`` (or projections, where the detector looks at those), one batch at a time, in order.

        Args:
            names: of the images, ``[N]``.
        """
        for first in range(0, len(features), batch_size):
            batch = torch.from_numpy(np.array(features[first : first + batch_size], np.float32))
            for row, score in enumerate(self._score(batch), first):
                yield replace(score, path=names[row])

    def score(self, images: Sequence[Picture], batch_size: int = 256, progress: bool = False) -> Iterator[Score]:
        """Score images one batch at a time, in order. Unreadable files get a row with the error.

        Decoding, network and detector overlap, see :func:`gradmix.eval.features.extraction.looked_at`.
        """
        names = (str(x) if isinstance(x, str | Path) else f"image {number}" for number, x in enumerate(images))
        for batch, features in self.looks(images, batch_size, progress):
            scored = iter(() if features is None else self._score(features))
            for path, image in zip(islice(names, len(batch)), batch, strict=True):
                yield Score(path, error=image) if isinstance(image, str) else replace(next(scored), path=path)

    def looks(
        self, images: Sequence[Picture], batch_size: int = 256, progress: bool = False
    ) -> Iterator[tuple[list[Tensor | str], Tensor | None]]:
        """Batch after batch: images ``[3, S, S]`` uint8, or why one can't be read; and what the detector looks at,
        ``[n, F]``, of those that can.
        """
        _ = self.model  # without one, said once and not for each image
        return looked_at(images, self._decode, self.look, batch_size, progress)

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
        if self.knn is None or self.network is None:
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
        """A training image ``[3, s, s]`` uint8: the file, or the stored thumbnail of one that never was a file.

        Raises:
            ValueError: the file is gone or unreadable.
        """
        if self.train_files is not None:
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

    def _score(self, features: Tensor) -> Iterator[Score]:
        """Of each image, without its path."""
        verdict, missing = self.detector.judge(features), [None] * len(features)
        columns = (missing if column is None else column.tolist() for column in verdict)
        for score, label, threshold, p_value, row in zip(*columns, strict=True):
            prediction = "" if label is None else self.classes[int(label)]
            if threshold is not None and score > threshold:
                prediction = UNKNOWN_NAME
            margin = None if threshold is None else score - threshold
            near = "" if self.knn is None or row is None else self.training_name(row)
            yield Score("", score, prediction, margin, p_value, near)


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


def shrunk(images: Tensor, size: int = THUMBNAIL_SIZE) -> Tensor:
    """Thumbnails ``[N, 3, size, size]`` of images ``[N, 3, S, S]``, both uint8."""
    parts = [F.interpolate(part.float(), size=(size, size), mode="area") for part in images.split(1024)]
    return torch.cat([part.round().byte() for part in parts])


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
    names = {"detector.json"}
    if about.network:
        names |= {"backbone.safetensors", *(["head.safetensors"] if about.space == "projections" else [])}
    if not names <= set(about.files) <= names | {THUMBNAILS}:
        raise ValueError(f"{path}: files: expected {', '.join(sorted(names))}, got {sorted(about.files)!a:.80}")
    if not set(about.fitted_to) <= set(FITTED_TO):
        raise ValueError(f"{path}: fitted_to: expected {', '.join(FITTED_TO)}, got {sorted(about.fitted_to)!a:.80}")
    check_class_names(about.classes, f"{path}: classes")
    return about
