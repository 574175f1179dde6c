"""The curves: training, and unknown against known."""

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from gradmix.eval.catalogue import QUALITY, SESSION, metric_of, name_of, title
from gradmix.eval.detectors import PRIMARY
from gradmix.eval.report.charts import COLOURS, INK, Line, Points, histogram, line_chart, smooth, thin
from gradmix.eval.report.page import Chart, Section, percent, section
from gradmix.eval.runs.folder import Run

PARTS = ("loss", "supervised", "selfsup", "targets", "prototypes", "mixed", "distill", "distill_mixed", "outliers")
LOSSES = tuple(f"train/{part}" for part in PARTS)  # of one chart
WATCHED = tuple(metric.key for metric in (*SESSION, *QUALITY) if metric.key not in LOSSES)  # one chart each


def training(run: Run) -> Section:
    """What was logged while training, against the step."""
    charts, why = [], ""
    if not run.scalars:
        why = "There are no TensorBoard events in this folder."
    elif "knn/held_out" not in run.scalars:
        why = "kNN was not watched while training (knn_every=0, no classes, or no held-out images)."
    losses = [Line(*smooth(*run.scalars[tag]), title(tag)) for tag in LOSSES if tag in run.scalars]
    if losses:
        charts.append(Chart(line_chart("Loss", losses, "step", "loss")))
    for tag in (tag for tag in run.scalars if tag == "lr" or tag.startswith("lr-")):
        charts.append(Chart(line_chart("Learning rate", [Line(*smooth(*run.scalars[tag]))], "step", "")))
    for tag in (tag for tag in WATCHED if tag in run.scalars):
        metric = metric_of(tag)
        steps, values = smooth(*run.scalars[tag])
        drawing = line_chart(metric.title, [Line(steps, metric.scale * values)], "step", "%" * metric.share)
        charts.append(Chart(drawing, metric.sentence))
    return section("training", "Training", charts=charts, why=why)


def open_set(run: Run) -> Section:
    """How far scores tell unknown from known test images: ROC, OSCR, precision and recall, a histogram."""
    known = run.features["test"]["labels"] >= 0 if "test" in run.features else np.zeros(0, bool)
    name, heading = "curves", "Unknown against known"
    if not run.scores:
        if known.any() and not known.all():
            return section(name, heading, why="No detector was measured.")
        side = "unknown" if known.any() else "known"
        why = f"no test images of {side} classes" if run.classes else "no classes"
        return section(name, heading, why=f"There are {why}, so there is nothing to tell apart.")
    lines: dict[str, list[Line]] = {"roc": [], "oscr": [], "pr": []}
    for number, (detector, (score, correct)) in enumerate(run.scores.items()):
        colour = INK if detector == "pixels" else COLOURS[number % len(COLOURS)]
        for kind, metric in (("roc", "auroc"), ("oscr", "oscr"), ("pr", "aupr")):
            curve = thin(*CURVES[kind](score[known], score[~known], correct[known]))
            value = run.numbers.get(f"osr/{detector}/{metric}")
            label = name_of(detector) if value is None else f"{name_of(detector)} {percent(value)}"
            lines[kind].append(Line(*curve, label, colour))
    chance = Line([0, 1], [0, 1], None, "#808080", (0, (1, 2)))
    charts = [
        line_chart("ROC", [*lines["roc"], chance], "known images flagged", "unknown images caught", unit=True),
        line_chart("OSCR", lines["oscr"], "unknown images accepted", "known images accepted and right", unit=True),
        line_chart("Precision and recall", lines["pr"], "unknown images caught", "flagged images that are", unit=True),
    ]
    shown, (score, _) = next(iter(run.scores.items()))  # the reference, where it was measured
    parts = {"known": score[known], "unknown": score[~known]}
    calibration = run.detector.calibration_ if run.detector is not None and shown == PRIMARY else None
    limit = None if calibration is None or calibration.per_class else calibration.threshold
    marks: dict[str, float] = {} if limit is None else {"threshold": limit}
    reference = "Scores of the reference detector: distance to a near training image"
    return section(
        name,
        heading,
        why="",
        charts=[Chart(chart) for chart in charts],
        histogram=histogram("Scores of the test images", parts, f"{shown} score", marks),
        what=reference if shown == PRIMARY else f"Scores of {shown}",
        threshold=limit is not None,
    )


def roc(known: np.ndarray, unknown: np.ndarray, correct: np.ndarray) -> Points:
    """Shares of known images flagged and of unknown images caught, over all thresholds."""
    return roc_curve(*_targets(known, unknown))[:2]


def precision_recall(known: np.ndarray, unknown: np.ndarray, correct: np.ndarray) -> Points:
    """Recall and precision of unknown images."""
    precision, recall, _ = precision_recall_curve(*_targets(known, unknown))
    return recall, precision


def oscr(known: np.ndarray, unknown: np.ndarray, correct: np.ndarray) -> Points:
    """Shares of unknown images accepted, and of known images accepted and rightly classified."""
    thresholds = np.unique(np.concatenate([known, unknown]))
    accepted = np.searchsorted(np.sort(unknown), thresholds, "right") / len(unknown)
    right = np.searchsorted(np.sort(known[correct]), thresholds, "right") / len(known)
    return np.r_[0, accepted], np.r_[0, right]


CURVES = {"roc": roc, "oscr": oscr, "pr": precision_recall}


def _targets(known: np.ndarray, unknown: np.ndarray) -> Points:
    return np.r_[np.zeros(len(known)), np.ones(len(unknown))], np.r_[known, unknown]
