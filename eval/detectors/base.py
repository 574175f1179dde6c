"""The contract of every open-set detector."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from gradmix.eval.detectors import store
from gradmix.eval.detectors.saved import check_saved
from gradmix.eval.features.arrays import Array, blocks, check_features, check_labels, like
from gradmix.eval.features.search import Neighbours
from gradmix.eval.metrics import threshold_for
from gradmix.ssl.runs.documents import as_schema

UNKNOWN = -1


@dataclass
class Detector:
    """Says how unknown an image is, from its features.

    A detector is a dataclass whose fields are its parameters. It implements `_fit`, which sets the attributes
    named in `ARRAYS` (None for one that doesn't apply), and `_assess`. Features are numpy arrays or tensors
    `[N, F]`, and what is returned is the same kind; computation is on the CPU, input is read as float32. A
    wrong shape or width, an empty array or a non-finite value is a ValueError that names the argument and
    the value.

    After `fit`: `classes_`, the training labels that occur, sorted (None without labels); `threshold`, None
    until `calibrate` sets it.
    """

    NAME: ClassVar[str]  # in metrics.json: osr/<NAME>/auroc
    ARRAYS: ClassVar[Mapping[str, str]]  # name: kind and shape, see `gradmix.eval.detectors.saved`
    NEEDS_LABELS: ClassVar[bool] = True

    def fit(self, features: Array, labels: Array | None = None) -> "Detector":
        """Fit to known training features `[N, F]` and labels `[N]`, integers >= 0, gaps allowed.

        Only some detectors do without labels (`NEEDS_LABELS`); then they cannot `classify`.
        """
        features = check_features("features", features)
        if not isinstance(features, np.memmap):
            features = np.asarray(features, np.float32)
        self.classes_, positions = None, None
        if labels is not None:
            labels = check_labels("labels", labels, len(features))
            if labels.min() < 0:
                raise ValueError(f"labels: {labels.min()} in row {labels.argmin()}, known classes are >= 0")
            self.classes_, positions = np.unique(labels, return_inverse=True)
        elif self.NEEDS_LABELS:
            raise ValueError(f"labels: {type(self).__name__} needs them, got None")
        self.threshold, self.width_ = None, features.shape[1]
        self._fit(features, positions)
        return self

    def score(self, features: Array) -> Array:
        """How unknown each image is, `[N]` float32; higher is more unknown."""
        return like(self._assess_all(features)[0], features)

    def classify(self, features: Array) -> Array:
        """The closest known class of each image, `[N]` int64 training labels, however unknown it is."""
        if self.classes_ is None:
            raise ValueError(f"{type(self).__name__} was fitted without labels and cannot name a class")
        return like(self.classes_[self._assess_all(features)[1]], features)

    def predict(self, features: Array) -> Array:
        """The closest known class `[N]` int64 of each image, or -1 where its score is above the threshold."""
        return self.assess(features)[1]

    def assess(self, features: Array) -> tuple[Array, Array]:
        """`score` and `predict` from one pass. Raises ValueError before `calibrate`."""
        if self.threshold is None:
            raise ValueError("no threshold yet: call calibrate(held_out_known_features) first")
        if self.classes_ is None:
            raise ValueError(f"{type(self).__name__} was fitted without labels and cannot name a class")
        score, positions = self._assess_all(features)
        label = np.where(score > self.threshold, UNKNOWN, self.classes_[positions])
        return like(score, features), like(label, features)

    def calibrate(self, features: Array, accept: float = 0.95) -> "Detector":
        """Set `threshold` to the lowest score that accepts at least the share `accept` of these images.

        They should be known and not trained on: training images score too low. An image that scores exactly
        the threshold is accepted, so that with ties more than the share asked for may be.
        """
        if not 0 < accept <= 1:
            raise ValueError(f"accept: expected a share in (0, 1], got {accept}")
        self.threshold = float(threshold_for(self._assess_all(features)[0], accept))
        return self

    def save(self, folder: str | Path) -> None:
        """Write parameters, fitted arrays and threshold to a folder, see `gradmix.eval.detectors.store`."""
        self._check_fitted()
        manifest = {
            "detector": self.NAME,
            "parameters": dataclasses.asdict(self),
            "width": self.width_,
            "threshold": self.threshold,
        }
        names = [name for name in ("classes_", *self.ARRAYS) if getattr(self, name) is not None]
        arrays = {name: getattr(self, name) for name in names}
        if isinstance(arrays.get("bank_"), Neighbours):
            index, more = self.bank_.saved()
            manifest |= {} if index is None else {"index": dataclasses.asdict(index)}
            arrays |= more
        store.write(folder, manifest, arrays)

    @classmethod
    def load(cls, folder: str | Path, mmap: bool = False) -> "Detector":
        """The detector that `save` wrote; scores are the same bits.

        Args:
            mmap: leave arrays on disk and map them, for a bank that doesn't fit in memory.

        Raises:
            FileNotFoundError: no detector there.
            ValueError: damaged (a hash doesn't match, or a value makes no sense), or another kind of detector.
        """
        manifest, arrays = store.read(Path(folder), mmap)
        if manifest.detector != cls.NAME:
            raise ValueError(f"{folder}: holds a {manifest.detector} detector, not {cls.NAME}")
        detector: Detector = as_schema(manifest.parameters, cls, f"{Path(folder) / store.MANIFEST}: parameters")
        detector.width_, detector.threshold = manifest.width, manifest.threshold
        for name in ("classes_", *cls.ARRAYS):
            setattr(detector, name, arrays.get(name))
        try:
            check_saved(detector, arrays, manifest.index)
            if "bank_" in cls.ARRAYS:
                detector.bank_ = Neighbours.restore(detector.bank_, manifest.index, arrays)
        except ValueError as error:
            raise ValueError(f"{Path(folder) / store.TENSORS}: {error}") from error
        return detector

    def absent(self) -> set[str]:
        """Which of `ARRAYS` are None after fitting: here those that hold a class for every row, without labels."""
        labelled = {name for name, about in self.ARRAYS.items() if about.startswith("class ")}
        return labelled if self.classes_ is None else set()

    def _fit(self, features: np.ndarray, positions: np.ndarray | None) -> None:
        """Fit to checked numpy features `[N, F]` and positions in `classes_` `[N]`, None without labels."""
        raise NotImplementedError

    def _assess(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores `[N]` and positions in `classes_` `[N]` (or None) of a block of float32 features."""
        raise NotImplementedError

    def _check_fitted(self) -> None:
        if not hasattr(self, "width_"):
            raise ValueError(f"{type(self).__name__} is not fitted yet: call fit(features, labels) first")

    def _assess_all(self, features: Array) -> tuple[np.ndarray, np.ndarray | None]:
        self._check_fitted()
        features = check_features("features", features, width=self.width_)
        parts = [self._assess(np.asarray(features[rows], np.float32)) for rows in blocks(features.shape)]
        score = np.concatenate([score for score, _ in parts]).astype(np.float32)
        return score, None if self.classes_ is None else np.concatenate([position for _, position in parts])
