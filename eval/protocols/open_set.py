"""What a detector is worth: known against unknown test images, and what can be said of the known ones alone."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmix.eval import metrics
from gradmix.eval.catalogue import ScoredSets, of_scores
from gradmix.eval.config import EvalConfig
from gradmix.eval.detectors import PRIMARY
from gradmix.eval.detectors.options import build_detector, parse_detector
from gradmix.eval.features.arrays import Array
from gradmix.eval.protocols.measure import Measure, Skipped, check_neighbours
from gradmix.eval.protocols.subject import Subject
from gradmix.eval.runs.foreign import ELSEWHERE
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData

GROUPS = ("near", "far")  # of named sets of unknown images
FINDING = "how well unknown images are found"  # what is skipped where there are none


class Judged(NamedTuple):
    """What a detector says of some images.

    Attributes:
        score: higher is more unknown, ``[N]``.
        correct: whether the image is known and its closest class the right one, ``[N]``.
        flagged: whether it is called unknown, ``[N]``; None without a threshold.
    """

    score: Tensor
    correct: Tensor
    flagged: Tensor | None

    def of(self, rows: Tensor) -> "Judged":
        """Of some of the images."""
        return Judged(self.score[rows], self.correct[rows], None if self.flagged is None else self.flagged[rows])


def together(parts: Sequence[Judged]) -> Judged:
    """Of all images of some parts, in order."""
    flagged = [part.flagged for part in parts if part.flagged is not None]
    score, correct = torch.cat([part.score for part in parts]), torch.cat([part.correct for part in parts])
    return Judged(score, correct, torch.cat(flagged) if flagged else None)


def open_set_numbers(known: Judged, unknown: Judged, sets: Mapping[str, Tensor]) -> dict[str, float]:
    """Every number of known against unknown images; and of named sets of unknown ones, ``NAME/METRIC``, with the means
    over those of a group.

    Args:
        unknown: there may be none; what takes some is then left out.
        sets: which unknown images are in each, by name, ``[M]``.
    """

    def against(some: Judged) -> dict[str, float]:
        flagged = None if known.flagged is None else (known.flagged, some.flagged)
        return of_scores(ScoredSets(known.score, some.score, known.correct, flagged))

    values = against(unknown)
    for name, rows in sets.items():
        values |= {f"{name}/{metric}": value for metric, value in against(unknown.of(rows)).items()}
    return values | group_means(values, sets)


class OpenSet(Measure):
    """``osr/KEY/...``: what one detector is worth. ``subject.scores`` gets its score of every test image, and whether
    the image is known and its closest class the right one.

    Args:
        key: its name in ``metrics.json``.
        detector: its kind, by name.
        space: what it looks at: ``features``, ``projections`` or ``pixels``.
        interval: whether the AUROC gets a confidence interval, which takes a thousand more of them.
    """

    KIND = "osr"

    def __init__(self, key: str, detector: str, space: str, interval: bool = False):
        self.key, self.detector, self.space, self.interval = key, detector, space, interval
        self.needs = (space, "classes")

    @property
    def name(self) -> str:
        return f"osr/{self.key}"

    @classmethod
    def asked_for(cls, config: Config, asked: EvalConfig) -> list[Measure]:
        options = dict(config.detector_options)
        for name in options:
            build_detector(name, options)  # also those that are not measured must make sense
        entries = [parse_detector(entry) for entry in config.detectors]
        parse_detector(config.primary, "primary")
        sets = config.data.unknown_roots
        for group in (group for group in GROUPS if group in sets and any(s.startswith(f"{group}_") for s in sets)):
            raise ValueError(f"data.unknown_roots.{group}: is the mean over {group}_...; call this one {group}_NAME")
        chosen = [cls(key, kind.NAME, space, interval=key == PRIMARY) for key, kind, space in entries]
        return [*chosen, cls("pixels", PRIMARY, "pixels")]

    def check(self, config: Config, asked: EvalConfig, data: OpenSetData) -> None:
        name = self.detector
        if data.classes or name == PRIMARY:  # which is saved, whatever is measured
            k = getattr(build_detector(name, config.detector_options), "k", 1)
            check_neighbours(f"detector_options.{name}.k", k, data)
        kind = parse_detector(config.primary, "primary")[1]
        if kind.NEEDS_LABELS and not data.classes:
            raise ValueError(f"primary: {kind.NAME} needs classes, and the images have none")

    def measure(self, subject: Subject) -> Iterator[tuple[str, Any]]:
        known, unknown, sets = self.judge_test(subject)
        values = open_set_numbers(known, unknown, sets)
        if why := subject.lacks("unknown images"):
            yield FINDING, Skipped(why)
        elif self.interval:
            interval = metrics.bootstrap(metrics.auroc, known.score, unknown.score)
            values |= {"auroc_low": interval.low, "auroc_high": interval.high}
        yield from ((f"{self.name}/{name}", value) for name, value in values.items())

    def judge(self, subject: Subject, images: Array, labels: Tensor) -> Judged:
        """
        Args:
            images: in the detector's space, ``[N, D]``.
            labels: of their classes, negative for unknown ones, ``[N]``.
        """
        verdict = subject.detector(self.detector, self.space).judge(images)
        correct = torch.from_numpy(verdict.closest) == labels
        flagged = None if verdict.threshold is None else torch.from_numpy(verdict.score > verdict.threshold)
        return Judged(torch.from_numpy(verdict.score), correct, flagged)

    def judge_test(self, subject: Subject) -> tuple[Judged, Judged, dict[str, Tensor]]:
        """The known test images, the unknown ones, and which of these are in which named set."""
        known = subject.known
        judged = self.judge(subject, subject.space(self.space)["test"], subject.data.test.labels)
        subject.scores |= {f"{self.key}/score": judged.score, f"{self.key}/correct": judged.correct}
        sets = {name: rows[~known] for name, rows in subject.data.unknown_sets.items()}
        return judged.of(known), judged.of(~known), sets


def group_means(values: Mapping[str, float], names: Collection[str]) -> dict[str, float]:
    """``near/METRIC`` and ``far/METRIC``: OpenOOD's means over the sets ``near_...`` and ``far_...``."""
    means = {}
    for group in GROUPS:
        members = [name for name in names if name.startswith(f"{group}_")]
        for metric in dict.fromkeys(key.partition("/")[2] for key in values if key.partition("/")[0] in members):
            means[f"{group}/{metric}"] = sum(values[f"{name}/{metric}"] for name in members) / len(members)
    return means


class AtTheStart(OpenSet):
    """``osr/KEY_start/...``: the same detector on the network that training began with, ``encoder.init``."""

    @classmethod
    def asked_for(cls, config: Config, asked: EvalConfig) -> list[Measure]:
        if config.encoder.init is None or config.method.name == ELSEWHERE:
            return []
        entries = [parse_detector(entry) for entry in config.detectors]
        return [cls(f"{key}_start", kind.NAME, "start") for key, kind, space in entries if space == "features"]
