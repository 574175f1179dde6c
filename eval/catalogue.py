"""Every number that a run reports: where it stands, what it is called, what it says, and which way is better.

The terminal, report.html, gradmix-compare, TensorBoard and docs/numbers.md read these tables. A new number of
predictions or of scores is one entry here: its ``compute`` is called wherever classes or unknown images are judged.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from gradmix.eval import metrics

FULL_SPECTRUM = "full_spectrum"  # after a detector's name: corrupted copies of the known images count as known too


@dataclass
class Answers:
    """What a classifier says of the known test images: class indices ``[N]``, beside the right ones."""

    predicted: Any
    labels: Any

    @cached_property
    def recalls(self) -> dict[int, float]:
        """By class, the share of its images whose class is right."""
        return metrics.class_recalls(self.predicted, self.labels)


class ScoredSets(NamedTuple):
    """What a detector says of the test images; higher scores are more unknown.

    Attributes:
        known: scores of the known images, ``[N]``.
        unknown: scores of the unknown images, ``[M]``; there may be none.
        correct: whether the closest class of each known image is the right one, ``[N]``.
        flagged: which known and which unknown images are called unknown, ``[N]`` and ``[M]``; None without a threshold.
    """

    known: Any
    unknown: Any
    correct: Any
    flagged: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Metric:
    """A number, or the same number of several classifiers or detectors.

    Attributes:
        key: of metrics.json; ``{classifier}``, ``{detector}`` or ``{kind}`` stand for what is measured. Of named sets
            of unknown images ``{detector}`` is ``deep_knn/NAME``; see also `FULL_SPECTRUM`.
        title: what it is called, in a few words.
        sentence: what it says, in one plain sentence.
        better: which way is better; "" where neither is.
        share: a number in [0, 1], which is shown in per cent.
        of: the method, or only the session that ran it: its machine, its length, its own loss. Sessions differ in these
            without one method being better, so they are never compared.
        terminal: whether a command prints it: in a table, or in a line of its own where it is in neither `KNOWN` nor
            `OPEN_SET`.
        compared: whether it is among the few of a classifier or detector that stand for a run: in gradmix-compare's
            table, and in the hyper-parameters tab of TensorBoard.
        known_only: of a detector's scores, whether it is of the known images alone: measured without unknown ones too.
        threshold: whether it is of decisions at the threshold: another ``accept`` or ``per_class`` changes it.
        compute: `Answers`, or `ScoredSets`, to the number, or to None where it can't be told; None for numbers that are
            measured elsewhere.
    """

    key: str
    title: str
    sentence: str
    better: Literal["higher", "lower", ""] = "higher"
    share: bool = True
    of: Literal["method", "session"] = "method"
    terminal: bool = False
    compared: bool = False
    known_only: bool = False
    threshold: bool = False
    compute: Callable[..., float | None] | None = None

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def scale(self) -> int:
        """What the number is multiplied by before it is shown."""
        return 100 if self.share else 1

    @property
    def arrow(self) -> str:
        """Which way is better: ↑, ↓, or nothing."""
        return {"higher": "↑", "lower": "↓", "": ""}[self.better]

    def at(self, subject: str) -> str:
        """The key of one classifier's or detector's number."""
        return re.sub(r"\{\w+\}", lambda _: subject, self.key)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """The keys, with what is measured as the group."""
        parts = re.split(r"(\{\w+\})", self.key)
        detector = f"([^/]+(?:/{FULL_SPECTRUM})?(?:/[^/]+)?)"
        inside = {"{classifier}": "(.+)", "{detector}": detector, "{kind}": "(.+)"}
        return re.compile("".join(inside.get(part) or re.escape(part) for part in parts))


OPEN_SET = (
    Metric(
        "osr/{detector}/auroc",
        "AUROC",
        "Probability that an unknown image scores above a known one; 50 % is chance.",
        terminal=True,
        compared=True,
        compute=lambda s: metrics.auroc(s.known, s.unknown),
    ),
    Metric(
        "osr/{detector}/aupr",
        "AUPR",
        "Average precision of finding the unknown images; chance is their share of the test set.",
        terminal=True,
        compute=lambda s: metrics.aupr(s.known, s.unknown),
    ),
    Metric(
        "osr/{detector}/aupr_known",
        "AUPR known",
        "Average precision of finding the known images.",
        compute=lambda s: metrics.aupr(s.known, s.unknown, positive="known"),
    ),
    Metric(
        "osr/{detector}/fpr95",
        "FPR95",
        "Share of known images flagged when 95 % of the unknown ones are caught.",
        better="lower",
        terminal=True,
        compute=lambda s: metrics.fpr_at_tpr(s.known, s.unknown),
    ),
    Metric(
        "osr/{detector}/fpr95_known",
        "FPR95 known",
        "Share of unknown images accepted when 95 % of the known ones are.",
        better="lower",
        terminal=True,
        compared=True,
        compute=lambda s: metrics.fpr_at_tpr(s.known, s.unknown, positive="known"),
    ),
    Metric(
        "osr/{detector}/oscr",
        "OSCR",
        "Area under the share of known images that are accepted and rightly classified, against the share of unknown "
        "images accepted.",
        terminal=True,
        compared=True,
        compute=lambda s: metrics.oscr(s.known, s.unknown, s.correct),
    ),
    Metric(
        "osr/{detector}/closed_set_accuracy",
        "Closed set",
        "Share of known images whose closest class, to this detector, is their own.",
        terminal=True,
        compared=True,
        known_only=True,
        compute=lambda s: float(np.asarray(s.correct).mean()),
    ),
    Metric(
        "osr/{detector}/balanced_accuracy",
        "Balanced decisions",
        "Mean of the shares of known images accepted and of unknown ones rejected, at the calibrated threshold.",
        threshold=True,
        compute=lambda s: None if s.flagged is None else metrics.balanced_accuracy(s.flagged[0], s.flagged[1], 0.5),
    ),
    Metric(
        "osr/{detector}/false_alarms",
        "False alarms",
        "Share of known test images called unknown at the calibrated threshold, which promises 1 - accept (5 % unless "
        "set).",
        better="lower",
        terminal=True,
        known_only=True,
        threshold=True,
        compute=lambda s: None if s.flagged is None else float(np.asarray(s.flagged[0]).mean()),
    ),
)

KNOWN = (
    Metric(
        "{classifier}/top1",
        "Accuracy",
        "Share of the known test images whose class is right.",
        terminal=True,
        compared=True,
        compute=lambda a: metrics.closed_set_accuracy(a.predicted, a.labels),
    ),
    Metric(
        "{classifier}/balanced_accuracy",
        "Balanced accuracy",
        "Mean of the classes' recalls: every class counts the same, however many test images it has.",
        terminal=True,
        compared=True,
        compute=lambda a: metrics.mean_recall(a.recalls),
    ),
    Metric(
        "{classifier}/lowest_recall",
        "Lowest recall",
        "Recall of the class that is recognised least.",
        terminal=True,
        compute=lambda a: min(a.recalls.values()),
    ),
    Metric(
        "{classifier}/recall",
        "Recall by class",
        "By the class's name, the share of its test images whose class is right; without the classes that have no "
        "test image.",
    ),
)

QUALITY = (
    Metric(
        "quality/alignment",
        "Alignment",
        "Mean squared distance of the features of two augmented views of an image; lower is closer.",
        better="",
        share=False,
    ),
    Metric(
        "quality/uniformity",
        "Uniformity",
        "How evenly the features cover the sphere; lower is more spread out.",
        better="",
        share=False,
    ),
    Metric(
        "quality/effective_rank",
        "Effective rank",
        "How many directions the features use, from 1 to their width.",
        better="",
        share=False,
    ),
    Metric(
        "quality/class_spread",
        "Class spread (NC1)",
        "Spread within classes over the spread between them; lower is tighter, 0 when every class is one point.",
        better="",
        share=False,
    ),
)

CORRUPTED = (
    Metric(
        "corruptions/mean_error/{classifier}",
        "Mean error",
        "Share of corrupted test images whose class is wrong, mean over kinds and severities.",
        better="lower",
    ),
    Metric(
        "corruptions/mce/{classifier}",
        "mCE",
        "Error relative to kNN on raw pixels, mean over the kinds of corruption; 100 % is as good as raw pixels.",
        better="lower",
    ),
    Metric(
        "corruptions/{kind}/ce/{classifier}",
        "CE",
        "Error relative to kNN on raw pixels on one kind of corruption, over its severities.",
        better="lower",
    ),
    Metric(
        "corruptions/{kind}",
        "On corrupted images",
        "Accuracy on one kind of corruption, mean over severities or of one severity.",
    ),
)

SESSION = tuple(
    Metric(key, title, sentence, better="", share=share, of="session")
    for key, title, sentence, share in (
        (
            "knn/held_out",
            "kNN accuracy on held-out images",
            "Share of the known images kept aside whose class is right, watched while training; not in metrics.json.",
            True,
        ),
        (
            "train/images_per_s",
            "Training images per second",
            "On this machine, with what else ran there.",
            False,
        ),
        ("train/seconds", "Seconds of training", "Of the last session only, where a run was resumed.", False),
        ("train/steps", "Training steps", "Batches that were trained on.", False),
        ("train/resumed_from_step", "Resumed from step", "Where the last session began; 0 is a run in one go.", False),
        ("train/skipped_steps", "Skipped steps", "Left out, since the loss or a gradient was not finite.", False),
        ("train/lr", "Learning rate", "The highest one, derived from `base_lr` and the batch size.", False),
        ("train/loss", "Training loss", "What is minimised; methods with other terms have other scales.", False),
        ("train/supervised", "Supervised loss", "SupCon's term of the loss.", False),
        ("train/selfsup", "Self-supervised loss", "NT-Xent's term of the loss.", False),
        ("train/targets", "Loss of class targets", "The term that draws classes to fixed targets.", False),
        ("train/prototypes", "Loss of prototypes", "The term that draws classes to moving prototypes.", False),
        ("train/mixed", "Mixed loss", "The term of the mixed images.", False),
        ("train/distill", "Distance from the teacher", "The term of distillation, on raw views.", False),
        ("train/distill_mixed", "The same, mixed", "The term of distillation on mixed images.", False),
        ("train/outliers", "Loss of outliers", "How much images of no class are like those of one.", False),
        ("train/kept", "Kept share of the image", "Share of an image's own pixels after mixing, mean.", True),
        ("data/bad_images", "Unreadable files", "Image files that could not be decoded and were left out.", False),
        ("data/test_known", "Known test images", "Test images of known classes.", False),
        ("data/test_unknown", "Unknown test images", "Test images of no known class.", False),
        ("data/copies", "Copies", "Image files that are exact copies of another one.", False),
        (
            "data/test_copies",
            "Copies in the test set",
            "Test images that are exact copies of training images, but for unknown ones.",
            False,
        ),
        (
            "data/unknown_copies",
            "Copies among the unknown",
            "Unknown images that are exact copies of training images, which are of known classes.",
            False,
        ),
        (
            "data/class_copies",
            "Copies in two classes",
            "Image files that are exact copies of another class's, but for unknown ones of training images.",
            False,
        ),
        ("splits", "Splits", "How many splits a mean is over.", False),
    )
)

METRICS = (*OPEN_SET, *SESSION, *QUALITY, *CORRUPTED, *KNOWN)

# Who is measured, in the order of the tables: a short name, and how it comes to its answers.
CLASSIFIERS = {
    "knn": ("kNN", "A vote of the nearest training images; nothing is trained on top of the features."),
    "linear": ("linear probe", "A linear classifier trained on the frozen features."),
    "linear_augmented": ("linear, augmented", "The same, trained on augmented images."),
    "finetune": ("fine-tuned", "The whole network trained further with a linear layer on top."),
    "few_labels": ("linear, few labels", "A linear classifier trained on so many labels; mean over draws."),
    "knn_pixels": ("kNN on raw pixels", "The same vote on the images themselves, without learning."),
    "majority": ("always the largest class", "Saying the largest class of the training images every time."),
}
START = "_start"  # after a detector's name: on the network that training began with
BASELINES = ("pixels", "knn_pixels", "majority")  # what no method has a part in

ENDS = re.compile(r"(_low|_high|_std|/std)$")  # of an interval, or a deviation: of the number before it


def match(key: str) -> tuple[Metric, str] | None:
    """The metric whose key this is, and the classifier or detector in it; None for keys of no metric."""
    for metric in METRICS:
        found = metric.pattern.fullmatch(ENDS.sub("", key))
        if found:
            return metric, "/".join(found.groups())
    return None


def metric_of(key: str) -> Metric:
    """The metric whose key this is.

    Raises:
        KeyError: it is no metric's.
    """
    found = match(key)
    if found is None:
        raise KeyError(key)
    return found[0]


def title(key: str) -> str:
    """What a key is called beside others, ``AUROC of deep_knn``; the key itself where it is no metric's."""
    found = match(key)
    if found is None:
        return key
    metric, subject = found
    return f"{metric.title} of {name_of(subject)}" if subject else metric.title


def name_of(subject: str) -> str:
    """What a classifier or detector is called: ``knn/k=20,t=0.1`` is ``kNN, k=20,t=0.1``."""
    if subject.endswith(START):
        return f"{name_of(subject.removesuffix(START))}, network at the start"
    first, _, rest = subject.partition("/")
    name = "raw pixels" if first == "pixels" else CLASSIFIERS[first][0] if first in CLASSIFIERS else first
    return f"{name}, {rest}" if rest else name


def is_of_the_method(key: str) -> bool:
    """Whether a difference in this number can be one between methods."""
    found = match(key)
    if found is None:
        return not key.startswith(("train/", "data/"))
    if found[0].of != "method" or found[1].endswith(START):
        return False
    return found[1].split("/")[0] not in BASELINES


def subjects(numbers: Iterable[str], table: Sequence[Metric]) -> list[str]:
    """The classifiers or detectors with a metric of this table among some keys: classifiers in the order of
    `CLASSIFIERS`.
    """
    found = [found[1] for key in numbers if not ENDS.search(key) and (found := match(key)) and found[0] in table]
    order = {name: place for place, name in enumerate(CLASSIFIERS)}
    return sorted(dict.fromkeys(found), key=lambda name: order.get(name.split("/")[0], len(order)))


def detectors_title(shown: Iterable[Metric]) -> str:
    """What a table of these numbers of detectors is called."""
    return "Detectors on known images" if all(m.known_only for m in shown) else "Unknown against known classes"


def compared(subjects: Sequence[str]) -> Iterator[str]:
    """The keys that stand for a run, of these classifiers and detectors."""
    for subject in subjects:
        table = KNOWN if subject in CLASSIFIERS else OPEN_SET
        yield from (metric.at(subject) for metric in table if metric.compared)


def of_predictions(subject: str, predicted: Any, labels: Any, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Every number of a classifier's answers, by key.

    Args:
        predicted, labels: class indices of known test images, ``[N]``.
        classes: names of the classes; with them the recall of each is there too.
    """
    answers = Answers(predicted, labels)
    numbers: dict[str, Any] = {m.at(subject): m.compute(answers) for m in KNOWN if m.compute}
    if classes:
        numbers[f"{subject}/recall"] = {classes[label]: recall for label, recall in answers.recalls.items()}
    return numbers


def of_scores(scores: ScoredSets) -> dict[str, float]:
    """Every number of a detector's scores, by the last part of its key; of known images alone, those that need no
    unknown ones.
    """
    told = [metric for metric in OPEN_SET if metric.known_only or len(scores.unknown)]
    numbers = {metric.name: metric.compute(scores) for metric in told if metric.compute}
    return {name: value for name, value in numbers.items() if value is not None}
