"""What is measured on a run: each measure says what it needs, and yields names and values.

To add one, write a class here and put it into ``MEASURES``; another package declares its own as an entry point of the
group ``gradmix.measures``, and ``gradmix-eval measures=[NAME]`` asks for it.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from gradmix.eval import metrics, quality
from gradmix.eval.catalogue import Scores, of_predictions, of_scores
from gradmix.eval.classifiers.few_labels import few_labels, subset
from gradmix.eval.classifiers.finetune import ImageProbe
from gradmix.eval.classifiers.knn import KNNClassifier
from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.config import EvalConfig
from gradmix.eval.detectors import PRIMARY, Detector
from gradmix.eval.detectors.options import build_detector, parse_detector
from gradmix.eval.features.arrays import Array
from gradmix.eval.protocols.subject import Subject
from gradmix.eval.runs.foreign import ELSEWHERE
from gradmix.registry import Registry
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.networks.backbones import Backbone

# classes: of the images, with test images among the known ones. All have features.
NEEDS = ("features", "projections", "classes", "images", "pixels", "start", "unknown images")
GROUPS = ("near", "far")  # of named sets of unknown images
One = TypeVar("One", bound="Measure")


class Skipped(NamedTuple):
    """Instead of a value: why there is none."""

    why: str


class Measure:
    """One thing to measure.

    A measure implements ``measure``, which is called once all its ``needs`` are met.
    """

    KIND: ClassVar[str]  # what the list of things that were not measured calls it
    needs: tuple[str, ...] = ("features",)  # some of NEEDS

    @classmethod
    def asked_for(cls, config: Config, asked: EvalConfig) -> "list[Measure]":
        """The measures of this class that a run's config and gradmix-eval's ask for.

        Raises:
            ValueError: settings that make no sense.
        """
        return [cls()]

    def check(self, config: Config, asked: EvalConfig, data: OpenSetData) -> None:
        """
        Raises:
            ValueError: settings that these images don't allow; said before anything is computed.
        """

    def measure(self, subject: Subject) -> Iterator[tuple[str, Any]]:
        """Names of ``metrics.json`` with numbers or texts, or with :class:`Skipped`."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """``KIND``, or longer where there are several of a kind."""
        return self.KIND


class KNN(Measure):
    """``knn/top1`` with the run's own k and temperature, ``knn/k=K,t=T/top1`` with those asked for; one search."""

    KIND = "knn"
    SPACE: ClassVar[str] = "features"
    needs = ("features", "classes")

    def check(self, config: Config, asked: EvalConfig, data: OpenSetData) -> None:
        for k in [*asked.knn_k, *([config.knn_k] if data.classes else [])]:
            check_neighbours("knn_k", k, data)

    def fit(self, subject: Subject) -> KNNClassifier:
        knn = KNNClassifier(subject.config.knn_k, subject.config.knn_temperature)
        return knn.fit(subject.space(self.SPACE)["train"], subject.data.train.labels)

    def measure(self, subject: Subject) -> Iterator[tuple[str, float]]:
        knn, asked, (features, labels) = self.fit(subject), subject.asked, subject.known_test("features")
        ks, temperatures = asked.knn_k or [knn.k], asked.knn_temperature or [knn.temperature]
        neighbours = knn.neighbours(features, max(knn.k, *ks))
        settings = {"knn": (knn.k, knn.temperature)}
        if asked.knn_k or asked.knn_temperature:
            settings |= {f"knn/k={k},t={t:g}": (k, t) for k in ks for t in temperatures}
        for name, (k, temperature) in settings.items():
            chosen = knn.vote(*neighbours, k=k, temperature=temperature).argmax(axis=1)
            classes = subject.data.classes if name == "knn" else ()
            yield from of_predictions(name, knn.classes_[chosen], labels, classes).items()


class KNNOnPixels(KNN):
    """``knn_pixels/top1``: what a network has to be better than."""

    SPACE = "pixels"
    needs = ("classes", "pixels")

    def measure(self, subject: Subject) -> Iterator[tuple[str, float]]:
        pixels, labels = subject.known_test("pixels")
        yield from of_predictions("knn_pixels", self.fit(subject).predict(pixels), labels).items()


class Majority(Measure):
    """``majority/...``: what always saying the largest training class gets; and which classes have no test image."""

    KIND = "knn"  # skipped together with it
    needs = ("classes",)

    def measure(self, subject: Subject) -> Iterator[tuple[str, Any]]:
        train, labels = subject.data.train.labels, subject.data.test.labels[subject.known]
        yield from of_predictions("majority", train.mode().values.expand_as(labels), labels).items()
        if absent := [name for label, name in enumerate(subject.data.classes) if not (labels == label).any()]:
            yield f"recall of {', '.join(absent)}", Skipped("the test set has no such images")


class Linear(Measure):
    """``linear/top1`` of the probe on cached features."""

    KIND = "linear"
    SPACE: ClassVar[str] = "features"
    needs = ("features", "classes")

    def fit(self, subject: Subject) -> LinearProbe:
        return subject.linear_probe

    def measure(self, subject: Subject) -> Iterator[tuple[str, Any]]:
        features, labels = subject.known_test("features")
        predicted = subject.linear_probe.predict(features)
        yield from of_predictions("linear", predicted, labels, subject.data.classes).items()
        yield "protocol/linear", str(subject.linear_probe)


class TrainedProbe(Measure):
    """``linear_augmented/top1`` or ``finetune/top1``: a probe that is trained on augmented images."""

    KIND = "linear"
    needs = ("classes", "images")

    def __init__(self, protocol: str, probe: ImageProbe):
        self.metric, self.probe = "finetune" if protocol == "finetune" else f"linear_{protocol}", probe

    @classmethod
    def asked_for(cls, config: Config, asked: EvalConfig) -> list[Measure]:
        protocols = [protocol for protocol in asked.protocols if protocol != "cached"]
        return [cls(p, ImageProbe(p, asked.probe, config.data.augment, config.seed)) for p in protocols]

    @property
    def name(self) -> str:
        return self.metric

    def measure(self, subject: Subject) -> Iterator[tuple[str, Any]]:
        data, workers = subject.data, subject.config.data.workers
        assert subject.encoder is not None
        test = data.test.select(subject.known.nonzero()[:, 0])
        self.probe.fit(Backbone(subject.encoder, data.train.size), data.train, len(data.classes), workers)
        predicted = self.probe.predict(test, workers)
        yield from of_predictions(self.metric, predicted, test.labels, data.classes).items()
        yield f"protocol/{self.metric}", str(self.probe)


class FewLabels(Measure):
    """``few_labels/AMOUNT/top1`` and ``top1_std`` of cached probes on a few labelled images."""

    KIND = "linear"
    needs = ("features", "classes")

    def __init__(self, amount: str | int):
        self.amount = amount

    @classmethod
    def asked_for(cls, config: Config, asked: EvalConfig) -> list[Measure]:
        return [cls(amount) for amount in asked.few_labels]

    def check(self, config: Config, asked: EvalConfig, data: OpenSetData) -> None:
        if data.classes:
            subset(data.train.labels, self.amount, 0)

    def measure(self, subject: Subject) -> Iterator[tuple[str, float]]:
        train = subject.space("features")["train"], subject.data.train.labels.numpy()
        accuracies = few_labels(*train, *subject.known_test("features"), self.amount, device=subject.device)
        yield f"few_labels/{self.amount}/top1", float(accuracies.mean())
        yield f"few_labels/{self.amount}/top1_std", float(accuracies.std(ddof=1))


class Quality(Measure):
    """``quality/...`` of the training images' features; see :mod:`gradmix.eval.quality`."""

    KIND = "quality"

    def measure(self, subject: Subject) -> Iterator[tuple[str, Any]]:
        features = subject.space("features")["train"]
        yield "quality/uniformity", quality.uniformity(features)
        yield "quality/effective_rank", quality.effective_rank(features)
        if subject.data.classes:
            spread = quality.class_spread(features, subject.data.train.labels)
            infinite = Skipped("the class means coincide, which makes it infinite")  # JSON can't say that
            yield "quality/class_spread", spread if math.isfinite(spread) else infinite
        why = subject.lacks("images")
        yield "quality/alignment", quality.alignment(*subject.two_views()) if why is None else Skipped(why)


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
        sets: which unknown images are in each, by name, ``[M]``.
    """

    def against(some: Judged) -> dict[str, float]:
        flagged = None if known.flagged is None else (known.flagged, some.flagged)
        return of_scores(Scores(known.score, some.score, known.correct, flagged))

    values = against(unknown)
    for name, rows in sets.items():
        values |= {f"{name}/{metric}": value for metric, value in against(unknown.of(rows)).items()}
    return values | group_means(values, sets)


class OpenSet(Measure):
    """``osr/KEY/...``: what one detector is worth. ``subject.scores`` gets its score of every test image, and whether
    the image is known and its closest class the right one.

    Args:
        key: its name in ``metrics.json``.
        space: what it looks at: ``features``, ``projections`` or ``pixels``.
        interval: whether the AUROC gets a confidence interval, which takes a thousand more of them.
    """

    KIND = "osr"

    def __init__(self, key: str, detector: Detector, space: str, interval: bool = False):
        self.key, self.detector, self.space, self.interval = key, detector, space, interval
        self.needs = (space, "classes", "unknown images")

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
        baseline = cls("pixels", build_detector(PRIMARY, options), "pixels")
        chosen = [cls(key, build_detector(kind.NAME, options), space, key == PRIMARY) for key, kind, space in entries]
        return [*chosen, baseline]

    def check(self, config: Config, asked: EvalConfig, data: OpenSetData) -> None:
        name = self.detector.NAME
        if data.classes or name == PRIMARY:  # which is saved, whatever is measured
            check_neighbours(f"detector_options.{name}.k", getattr(self.detector, "k", 1), data)
        kind = parse_detector(config.primary, "primary")[1]
        if kind.NEEDS_LABELS and not data.classes:
            raise ValueError(f"primary: {kind.NAME} needs classes, and the images have none")

    def measure(self, subject: Subject) -> Iterator[tuple[str, float]]:
        known, unknown, sets = self.judge_test(subject)
        values = open_set_numbers(known, unknown, sets)
        if self.interval:
            interval = metrics.bootstrap(metrics.auroc, known.score, unknown.score)
            values |= {"auroc_low": interval.low, "auroc_high": interval.high}
        yield from ((f"{self.name}/{name}", value) for name, value in values.items())

    def judge(self, subject: Subject, images: Array, labels: Tensor) -> Judged:
        """
        Args:
            images: in the detector's space, ``[N, D]``.
            labels: of their classes, negative for unknown ones, ``[N]``.
        """
        verdict = subject.detector(self.detector.NAME, self.space).judge(images)
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
        build = partial(build_detector, options=dict(config.detector_options))
        return [cls(f"{key}_start", build(kind.NAME), "start") for key, kind, space in entries if space == "features"]


# In the order that metrics.json has them.
MEASURES: Registry[type[Measure]] = Registry(
    "gradmix.measures",
    {
        "knn": KNN,
        "linear": Linear,
        "trained_probe": TrainedProbe,
        "few_labels": FewLabels,
        "knn_pixels": KNNOnPixels,
        "majority": Majority,
        "quality": Quality,
        "open_set": OpenSet,
        "start": AtTheStart,
    },
)


def choose_measures(config: Config, asked: EvalConfig | None = None, data: OpenSetData | None = None) -> list[Measure]:
    """All of our own measures, and those of other packages that ``measures`` names.

    Args:
        data: the images, once they are there: settings that they don't allow are then errors too.

    Raises:
        ValueError: unknown measures or detectors, or settings that make no sense.
    """
    asked = EvalConfig() if asked is None else asked
    kinds = [MEASURES.pick("measures", name) for name in dict.fromkeys([*MEASURES.own, *asked.measures])]
    measures = [measure for kind in kinds for measure in kind.asked_for(config, asked)]
    for measure in measures:
        if wrong := set(measure.needs) - set(NEEDS):
            raise ValueError(f"measures: {measure.name} needs {wrong.pop()!r}; expected some of {', '.join(NEEDS)}")
        if data is not None:
            measure.check(config, asked, data)
    return measures


def check_neighbours(key: str, k: int, data: OpenSetData) -> None:
    """
    Raises:
        ValueError: a number of neighbours that the training set does not have.
    """
    if not 1 <= k <= len(data.train):
        raise ValueError(f"{key}: expected 1 to {len(data.train)}, the size of the training set, got {k}")


def can_be_measured(measures: Sequence[One], subject: Subject) -> tuple[list[One], dict[str, str]]:
    """The measures that lack nothing; and the names of the others with the reason, once for all that lack the same."""
    measures, skipped = list(measures), dict[str, str]()
    for need in NEEDS:
        why = subject.lacks(need)
        stopped = [m for m in measures if need in m.needs]
        if why is None or not stopped:
            continue
        measures = [m for m in measures if m not in stopped]
        kinds = ", ".join(dict.fromkeys(m.KIND for m in stopped))
        named = {
            "projections": [m.name for m in stopped],
            "images": [m.name for m in stopped],
            "pixels": ["raw pixels"],
            "start": ["the network at the start"],
        }
        names = named.get(need, [kinds])
        skipped |= dict.fromkeys(names, why)
    return measures, skipped


def measure_all(measures: list[Measure], subject: Subject) -> tuple[dict[str, Any], dict[str, str]]:
    """Every number by its name; and what could not be measured, with the reason."""
    measures, skipped = can_be_measured(measures, subject)
    result: dict[str, Any] = {}
    for measure in measures:
        for name, value in measure.measure(subject):
            if isinstance(value, Skipped):
                skipped[name] = value.why
            else:
                result[name] = value
    return result, skipped
