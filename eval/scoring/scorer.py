"""A detector's folder scores image files, with nothing but itself.

detector.json, detector.safetensors   the detector (gradmix.eval.detectors.store)
backbone.safetensors                  the weights, and in its header which encoder and image size
thumbnails.safetensors                training images that never were files, at most 32 x 32, for explanations
scorer.json                           class names, names of the training images, SHA-256 of all of these and of itself
"""

import glob
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from gradmix.eval import detectors
from gradmix.eval.detectors import DeepKNN
from gradmix.ssl.data.images import ImageSet, decode, list_images
from gradmix.ssl.data.names import UNKNOWN_NAME, check_class_names
from gradmix.ssl.machine import usable_cpus
from gradmix.ssl.networks.backbones import load_backbone
from gradmix.ssl.runs.documents import as_schema, read_document
from gradmix.ssl.runs.files import hash_file, hash_json, write_atomically, write_json, write_tensors
from gradmix.ssl.runs.tensors import opened_tensors

LARGEST_LIST = 2**30  # bytes of scorer.json, which names every training image
THUMBNAILS = "thumbnails.safetensors"
THUMBNAIL_SIZE = 32


@dataclass
class About:
    """``scorer.json``."""

    classes: list[str]
    train_files: list[str] | None
    files: dict[str, str]
    sha256: str


@dataclass(frozen=True)
class Score:
    """One scored image; the columns of ``scores.csv``, where text that a spreadsheet would run has a ' before it.

    Attributes:
        path: the file.
        score: higher is more unknown; None when the file could not be read.
        prediction: ``"unknown"`` above the threshold, else the class's name (``""`` where there are no classes).
        margin: score minus threshold; above 0 is unknown.
        nearest: the nearest training image: its path, or its row when it never was a file.
        error: why the file could not be read, else empty.
    """

    path: str
    score: float | None = None
    prediction: str = ""
    margin: float | None = None
    nearest: str = ""
    error: str = ""


def save_scorer(folder: Path, detector: DeepKNN, backbone: Path, classes: Sequence[str], train: ImageSet) -> None:
    """Write the folder that :class:`Scorer` loads.

    Args:
        detector: fitted to the features of ``train``.
        backbone: the weights file to copy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "backbone.safetensors", lambda temporary: shutil.copyfile(backbone, temporary))
    if train.files is None:
        small = train.size <= THUMBNAIL_SIZE
        images = train.images if small else torch.cat([_shrink(part) for part in train.images.split(1024)])
        write_tensors(folder / THUMBNAILS, {"images": images})
    else:
        (folder / THUMBNAILS).unlink(missing_ok=True)
    detector.save(folder)
    names = ["backbone.safetensors", "detector.json", *([THUMBNAILS] if train.files is None else [])]
    about = {
        "classes": list(classes),
        "train_files": None if train.files is None else list(train.files),
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
            hint = f"; did you mean {folder / 'detector'}?" if (folder / "detector/scorer.json").is_file() else ""
            raise ValueError(f"detector: {folder} is not a detector's folder, scorer.json is missing{hint}")
        about = read_about(folder / "scorer.json")
        for name, expected in about.files.items():
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: missing")
            if hash_file(folder / name) != expected:
                raise ValueError(f"{folder / name}: damaged, it does not match scorer.json's hash")
        self.classes, self.train_files = about.classes, about.train_files
        self.detector = detectors.load(folder)
        self.backbone = load_backbone(folder).to(device)
        self.device = device
        self.folder = folder
        self.sha256 = about.sha256
        self._check()

    def _check(self) -> None:
        """See that the files belong together: one class name and one training image for every one of the detector's."""
        detector, where = self.detector, self.folder / "scorer.json"
        if not isinstance(detector, DeepKNN):
            raise ValueError(f"{self.folder / 'detector.json'}: detector: expected {DeepKNN.NAME}, got {detector.NAME}")
        if detector.width_ != self.backbone.num_features:
            wide = f"features {self.backbone.num_features} wide, the detector's are {detector.width_}"
            raise ValueError(f"{self.folder / 'backbone.safetensors'}: {wide}")
        if detector.classes_ is not None and detector.classes_[-1] >= len(self.classes):
            last = f"the detector's last is number {detector.classes_[-1]}"
            raise ValueError(f"{where}: classes: {len(self.classes)} names, {last}")
        rows = len(detector.bank_)
        if self.train_files is not None and len(self.train_files) != rows:
            raise ValueError(f"{where}: train_files: {len(self.train_files)} names, the detector has {rows} images")
        if self.train_files is None:
            path = self.folder / THUMBNAILS
            with opened_tensors(path) as file:
                part = file.get_slice("images") if "images" in file.keys() else None
                kind, shape = (None, []) if part is None else (part.get_dtype(), part.get_shape())
            side = shape[-1] if shape else 0
            if kind != "U8" or shape != [rows, 3, side, side] or not 1 <= side <= THUMBNAIL_SIZE:
                raise ValueError(f"{path}: images: expected [{rows}, 3, S, S] bytes, S at most {THUMBNAIL_SIZE}")

    def score(self, paths: Sequence[str], batch_size: int = 256, progress: bool = False) -> Iterator[Score]:
        """Score image files one batch at a time, in order. Unreadable files get a row with the error."""
        hidden = None if progress else True  # None: where the output is no terminal
        with (
            ThreadPoolExecutor(usable_cpus()) as pool,
            tqdm(total=len(paths), unit="image", disable=hidden) as bar,
        ):
            for first in range(0, len(paths), batch_size):
                batch = list(paths[first : first + batch_size])
                decoded = list(pool.map(self._decode, batch))
                readable = [image for image in decoded if isinstance(image, torch.Tensor)]
                scored = iter(self._score(torch.stack(readable)) if readable else ())
                for path, image in zip(batch, decoded, strict=True):
                    yield next(scored)(path) if isinstance(image, torch.Tensor) else Score(path, error=image)
                bar.update(len(batch))

    @torch.inference_mode()
    def neighbours(self, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances ``[N, k]`` to the nearest training images of ``[N, 3, S, S]`` uint8, and their rows ``[N, k]``."""
        similarity, rows = self.detector.neighbours(self.backbone(images.to(self.device)).cpu(), k)
        return (2 - 2 * similarity).clamp(min=0).sqrt(), rows

    def training_image(self, row: int) -> Tensor:
        """A training image ``[3, s, s]`` uint8: the file, where it still is one, else the stored thumbnail.

        Raises:
            ValueError: the file is gone or unreadable.
        """
        if self.train_files is not None:
            if not Path(self.train_files[row]).is_file():
                raise ValueError(f"{self.train_files[row]}: not a readable image (no such file)")
            return decode(self.train_files[row], self.backbone.image_size)
        with opened_tensors(self.folder / THUMBNAILS) as file:
            return file.get_slice("images")[row]

    def training_name(self, row: int) -> str:
        return f"training image {row}" if self.train_files is None else self.train_files[row]

    def training_class(self, row: int) -> str:
        positions = self.detector.positions_
        return "" if positions is None else self.classes[int(self.detector.classes_[positions[row]])]

    def _decode(self, path: str) -> torch.Tensor | str:
        try:
            return self.backbone.transform(path)
        except ValueError as error:
            return str(error)

    @torch.inference_mode()
    def _score(self, images: torch.Tensor) -> Iterator[Callable[[str], Score]]:
        features = self.backbone(images.to(self.device)).cpu()
        detector = self.detector
        scores, nearest = detector.score(features), detector.neighbours(features, 1)[1][:, 0]
        threshold = detector.threshold
        labels = detector.classify(features) if detector.classes_ is not None else [None] * len(features)
        for score, label, row in zip(scores.tolist(), labels, nearest.tolist(), strict=True):
            prediction = "" if label is None else self.classes[int(label)]
            if threshold is not None and score > threshold:
                prediction = UNKNOWN_NAME
            margin = None if threshold is None else score - threshold
            near = self.training_name(row)
            yield lambda path, s=score, p=prediction, m=margin, n=near: Score(path, s, p, m, n)


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
    names = {"backbone.safetensors", "detector.json", *([THUMBNAILS] if about.train_files is None else [])}
    if set(about.files) != names:
        raise ValueError(f"{path}: files: expected {', '.join(sorted(names))}, got {sorted(about.files)!a:.80}")
    check_class_names(about.classes, f"{path}: classes")
    return about
