"""What features are worth without unknown images: classifiers, what these have to be better than, and quality."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

from gradmix.eval import quality
from gradmix.eval.catalogue import of_predictions
from gradmix.eval.classifiers.few_labels import few_labels, subset
from gradmix.eval.classifiers.finetune import ImageProbe
from gradmix.eval.classifiers.knn import KNNClassifier
from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.config import EvalConfig
from gradmix.eval.protocols.measure import Measure, Skipped, check_neighbours
from gradmix.eval.protocols.subject import Subject
from gradmix.eval.runs.foreign import ELSEWHERE
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.networks.backbones import Backbone


def own_k(config: Config, data: OpenSetData) -> int:
    """A run's own number of neighbours. What was trained elsewhere chose none: it has no more than training images."""
    return min(config.knn_k, len(data.train)) if config.method.name == ELSEWHERE else config.knn_k


class KNN(Measure):
    """``knn/top1`` with the run's own k and temperature, ``knn/k=K,t=T/top1`` with those asked for; one search."""

    KIND = "knn"
    SPACE: ClassVar[str] = "features"
    needs = ("features", "classes")

    def check(self, config: Config, asked: EvalConfig, data: OpenSetData) -> None:
        for k in [*asked.knn_k, *([own_k(config, data)] if data.classes else [])]:
            check_neighbours("knn_k", k, data)

    def fit(self, subject: Subject) -> KNNClassifier:
        knn = KNNClassifier(own_k(subject.config, subject.data), subject.config.knn_temperature)
        return knn.fit(subject.space(self.SPACE)["train"], subject.data.train.labels)

    def measure(self, subject: Subject) -> Iterator[tuple[str, float]]:
        knn, asked, (features, labels) = self.fit(subject), subject.asked, subject.known_test("features")
        ks, temperatures = asked.knn_k or [knn.k], asked.knn_temperature or [knn.temperature]
        neighbours = knn.neighbours(features, max(knn.k, *ks))
        settings = {"knn": (knn.k, knn.temperature)}
        if asked.knn_k or asked.knn_temperature:
            settings |= {f"knn/k={k},t={t:g}": (k, t) for k in ks for t in temperatures}
        for name, (k, temperature) in settings.items():
            chosen = knn.winners(*neighbours, k=k, temperature=temperature)
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
        return subject.linear_probe()

    def measure(self, subject: Subject) -> Iterator[tuple[str, Any]]:
        features, labels = subject.known_test("features")
        predicted = subject.linear_probe().predict(features)
        yield from of_predictions("linear", predicted, labels, subject.data.classes).items()
        yield "protocol/linear", str(subject.linear_probe())


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
