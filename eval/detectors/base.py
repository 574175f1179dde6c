"""The contract of every open-set detector."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, cast

import numpy as np

from gradmix.eval.counted import counted
from gradmix.eval.detectors import store
from gradmix.eval.detectors.calibration import Calibration, needed
from gradmix.eval.detectors.saved import check_saved
from gradmix.eval.features.arrays import Array, blocks, check_features, check_labels, like
from gradmix.eval.features.search import Neighbours
from gradmix.ssl.runs.documents import as_schema

UNKNOWN = -1
HELD_OUT = ("held_out_scores", "held_out_positions")  # of a saved detector's arrays, beside its own
BANK = "bank_"  # of its own, the one that is searched
Head = tuple[Array, Array]  # weight [K, F] and bias [K] of a linear classifier


class Verdict(NamedTuple):
    """What a detector makes of each image, numpy `[N]`.

    Attributes:
        score: higher is more unknown, float32.
        closest: the closest known class; None where the detector was fitted without labels.
        threshold: above it, the score says unknown; None before `calibrate`.
        p_value: see `gradmix.eval.detectors.calibration`; None without held-out scores.
        nearest: the row of the nearest training feature; None where the detector looks for none.
    """

    score: np.ndarray
    closest: np.ndarray | None
    threshold: np.ndarray | None
    p_value: np.ndarray | None
    nearest: np.ndarray | None

    @property
    def label(self) -> np.ndarray | None:
        """The closest known class, -1 where the score is above the threshold; None without classes."""
        if self.closest is None or self.threshold is None:
            return self.closest
        return np.where(self.score > self.threshold, UNKNOWN, self.closest)


class Assessed(NamedTuple):
    """Of a block of features, numpy `[N]`: scores, positions in `classes_`, and rows of the nearest training features.

    What a detector does not know is None.
    """

    score: np.ndarray
    position: np.ndarray | None
    nearest: np.ndarray | None = None


@dataclass
class Detector:
    """Says how unknown an image is, from its features.

    A detector is a dataclass whose fields are its parameters. It implements `_fit`, which sets the attributes
    named in `ARRAYS` (None for one that doesn't apply), and `_assess`. Features are numpy arrays or tensors
    `[N, F]`, and what is returned is the same kind; computation is on the CPU, input is read as float32. A
    wrong shape or width, an empty array or a non-finite value is a ValueError that names the argument and
    the value.

    After `fit`: `classes_`, the training labels that occur, sorted (None without labels); `threshold` and
    `calibration_`, None until `calibrate` sets them.
    """

    NAME: ClassVar[str]  # in metrics.json: osr/<NAME>/auroc
    ARRAYS: ClassVar[Mapping[str, str]]  # name: kind and shape, see `gradmix.eval.detectors.saved`
    NEEDS_LABELS: ClassVar[bool] = True
    TAKES_HEAD: ClassVar[bool] = False

    def fit(self, features: Array, labels: Array | None = None, head: Head | None = None) -> "Detector":
        """Fit to known training features `[N, F]` and labels `[N]`, integers >= 0, gaps allowed.

        Only some detectors do without labels (`NEEDS_LABELS`); then they cannot `classify`.

        Args:
            head: `(weight [K, F], bias [K])` of a linear classifier on these features, classes in the order of the
                sorted labels; for detectors that look at its logits (`TAKES_HEAD`). Without one, most of these fit a
                `LinearProbe`.

        Raises:
            ValueError: bad arrays, no labels where they are needed, or a head where none is taken.
        """
        if head is not None and not self.TAKES_HEAD:
            raise ValueError(f"head: {type(self).__name__} takes none")
        features = check_features("features", features)
        if not isinstance(features, np.memmap):
            features = np.asarray(features, np.float32)
        positions: np.ndarray | None = None
        self.classes_: np.ndarray | None = None
        if labels is not None:
            labels = check_labels("labels", labels, len(features))
            if labels.min() < 0:
                raise ValueError(f"labels: {labels.min()} in row {labels.argmin()}, known classes are >= 0")
            self.classes_, positions = np.unique(labels, return_inverse=True)
        elif self.NEEDS_LABELS:
            raise ValueError(f"labels: {type(self).__name__} needs them, got None")
        elif head is not None:
            raise ValueError("labels: with a head they are needed, got None")
        self._given_head = head
        self.threshold: float | None = None
        self.calibration_: Calibration | None = None
        self.width_: int = features.shape[1]
        self._fit(features, cast(np.ndarray, positions))  # None only where labels are not needed
        return self

    def score(self, features: Array) -> Array:
        """How unknown each image is, `[N]` float32; higher is more unknown."""
        return like(self._assess_all(features).score, features)

    def classify(self, features: Array) -> Array:
        """The closest known class of each image, `[N]` int64 training labels, however unknown it is.

        Raises:
            ValueError: bad features, or the detector was fitted without labels.
        """
        if self.classes_ is None:
            raise ValueError(f"{type(self).__name__} was fitted without labels and cannot name a class")
        return like(self.classes_[self._assess_all(features).position], features)

    def predict(self, features: Array) -> Array:
        """The closest known class `[N]` int64 of each image, or -1 where its score is above the threshold."""
        return self.assess(features)[1]

    def assess(self, features: Array) -> tuple[Array, Array]:
        """`score` and `predict` from one pass. Raises ValueError before `calibrate`."""
        if self.threshold is None:
            raise ValueError("no threshold yet: call calibrate(held_out_known_features) first")
        if self.classes_ is None:
            raise ValueError(f"{type(self).__name__} was fitted without labels and cannot name a class")
        verdict = self.judge(features)
        assert verdict.label is not None  # there are classes
        return like(verdict.score, features), like(verdict.label, features)

    def judge(self, features: Array) -> Verdict:
        """All that can be said of each image, from one pass."""
        score, positions, nearest = self._assess_all(features)
        closest = None if self.classes_ is None else self.classes_[positions]
        threshold = None if self.threshold is None else np.full(len(score), self.threshold)
        if self.calibration_ is None:
            return Verdict(score, closest, threshold, None, nearest)
        if self.calibration_.per_class:
            threshold = self.calibration_.thresholds(positions, len(score))
        return Verdict(score, closest, threshold, self.calibration_.p_values(score, positions), nearest)

    def calibrate(self, features: Array, accept: float = 0.95, per_class: bool = False) -> "Detector":
        """Set `threshold` so that a known image is accepted with a chance of at least `accept`.

        That is the ceil((n + 1) * accept)-th lowest score of these n images; the largest, where they are fewer than
        `gradmix.eval.detectors.calibration.needed(accept)`, which is too few to promise so much. They should be known
        and not trained on: training images score too low. An image that scores exactly the threshold is accepted, so
        that with ties more than the share asked for may be.

        Args:
            per_class: thresholds of their own for the classes with enough images, see `Calibration`.
        """
        scores, positions, _ = self._assess_all(features)
        self.calibration_ = Calibration(scores, positions, self.class_count or 1, accept, per_class)
        self.threshold = self.calibration_.threshold
        return self

    def accept(self, share: float | None = None, per_class: bool | None = None) -> "Detector":
        """Calibrate again, on the held-out scores that it was calibrated with; what is None stays.

        Raises:
            ValueError: it keeps no held-out scores, or too few to promise this share.
        """
        if self.calibration_ is None:
            raise ValueError(
                "accept: the detector keeps no scores of held-out images (none were held out, or it was saved by an "
                "earlier version); gradmix-eval run=... calibrates and saves it anew"
            )
        old = self.calibration_
        share = old.accept if share is None else share
        per_class = old.per_class if per_class is None else per_class
        calibration = dataclasses.replace(old, accept=share, per_class=per_class)
        if not calibration.enough:
            count, least = len(calibration.scores), needed(calibration.accept)
            enough = "no number is enough" if least == math.inf else f"it takes {least}"
            raise ValueError(
                f"accept: {calibration.accept:g} can't be promised with {counted(count, 'held-out image')}, {enough}; "
                f"at most {math.floor(1e4 * count / (count + 1)) / 1e4:g} can"
            )
        self.calibration_, self.threshold = calibration, calibration.threshold
        return self

    def save(self, folder: str | Path) -> None:
        """Write parameters, fitted arrays and threshold to a folder, see `gradmix.eval.detectors.store`."""
        self._check_fitted()
        said = dataclasses.asdict(self).items()
        manifest = {
            "detector": self.NAME,
            "parameters": {key: value.item() if isinstance(value, np.generic) else value for key, value in said},
            "width": self.width_,
            "threshold": self.threshold,
        }
        held_out: dict[str, np.ndarray] = {}
        if self.calibration_ is not None:
            manifest |= {"accept": self.calibration_.accept, "per_class": self.calibration_.per_class}
            kept = zip(HELD_OUT, (self.calibration_.scores, self.calibration_.positions), strict=True)
            held_out = {name: array for name, array in kept if array is not None}
        names = [name for name in ("classes_", *self.ARRAYS) if getattr(self, name) is not None]
        arrays = {name: getattr(self, name) for name in names}
        if isinstance(bank := arrays.get(BANK), Neighbours):
            index, more = bank.saved()
            manifest |= {} if index is None else {"index": dataclasses.asdict(index)}
            arrays |= more
        store.write(folder, manifest, arrays | held_out)

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
        scores, positions = (arrays.pop(name, None) for name in HELD_OUT)
        try:
            check_saved(detector, arrays, manifest.index)
            if BANK in cls.ARRAYS:
                setattr(detector, BANK, Neighbours.restore(arrays[BANK], manifest.index, arrays))
        except ValueError as error:
            raise ValueError(f"{Path(folder) / store.TENSORS}: {error}") from error
        detector.calibration_ = None
        if scores is not None:  # since accept= is a key
            asked = manifest.accept, manifest.per_class
            try:
                detector.calibration_ = Calibration.read(scores, positions, detector.class_count or 1, *asked)
            except ValueError as error:
                raise ValueError(f"{Path(folder) / store.TENSORS}: {error}") from error
        return detector

    @property
    def class_count(self) -> int:
        """K, the known classes; 0 without labels."""
        return 0 if self.classes_ is None else len(self.classes_)

    def absent(self) -> set[str]:
        """Which of `ARRAYS` are None after fitting: here those that hold a class for every row, without labels."""
        labelled = {name for name, about in self.ARRAYS.items() if about.startswith("class ")}
        return labelled if self.classes_ is None else set()

    def _fit(self, features: np.ndarray, positions: np.ndarray) -> None:
        """Fit to checked numpy features `[N, F]` and positions in `classes_` `[N]`, None without labels.

        Only a detector that does without labels need take None.
        """
        raise NotImplementedError

    def _assess(self, features: np.ndarray) -> Assessed | tuple[np.ndarray, np.ndarray | None]:
        """Scores `[N]` and positions in `classes_` `[N]` (or None) of a block of float32 features."""
        raise NotImplementedError

    def _check_fitted(self) -> None:
        if not hasattr(self, "width_"):
            raise ValueError(f"{type(self).__name__} is not fitted yet: call fit(features, labels) first")

    def _assess_all(self, features: Array) -> Assessed:
        self._check_fitted()
        features = check_features("features", features, width=self.width_)
        wide = (len(features), max(features.shape[1], self.class_count or 1))  # many detectors look at all classes
        parts = [Assessed(*self._assess(np.asarray(features[rows], np.float32))) for rows in blocks(wide)]
        score = np.concatenate([part.score for part in parts]).astype(np.float32)
        positions = [part.position for part in parts if part.position is not None]
        nearest = [part.nearest for part in parts if part.nearest is not None]
        return Assessed(
            score,
            None if self.classes_ is None else np.concatenate(positions),
            np.concatenate(nearest) if nearest else None,
        )
