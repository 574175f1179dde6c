"""The curves: training, and unknown against known."""

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from gradmix.eval.detectors import PRIMARY
from gradmix.eval.report.charts import COLOURS, INK, Line, histogram, line_chart, smooth, thin
from gradmix.eval.report.page import missing, percent, section
from gradmix.eval.runs.folder import Run

LOSSES = {
    "train/loss": "total",
    "train/supervised": "supervised",
    "train/selfsup": "self-supervised",
    "train/targets": "class targets",
    "train/mixed": "mixed",
}

QUALITY = {
    "quality/alignment": "Alignment: distance of two views (lower is closer)",
    "quality/uniformity": "Uniformity (lower is more spread out)",
    "quality/effective_rank": "Effective rank",
    "quality/class_spread": "Spread within classes over between them (NC1)",
}


def training(run: Run) -> str:
    if not run.scalars:
        return section("training", "Training", missing("There are no TensorBoard events in this folder."))
    charts = []
    losses = [Line(*smooth(*run.scalars[tag]), name) for tag, name in LOSSES.items() if tag in run.scalars]
    if losses:
        charts.append(line_chart("Loss", losses, "step", "loss"))
    others = {"knn/held_out": "kNN accuracy on held-out images"}
    others |= {tag: "Learning rate" for tag in run.scalars if tag == "lr" or tag.startswith("lr-")}
    others |= {"train/images_per_s": "Training images per second", "train/kept": "Share of the image that mixing keeps"}
    others |= QUALITY
    for tag, title in others.items():
        if tag in run.scalars:
            steps, values = smooth(*run.scalars[tag])
            shares = tag in ("knn/held_out", "train/kept")
            charts.append(line_chart(title, [Line(steps, 100 * values if shares else values)], "step", "%" * shares))
    notes = [missing("kNN was not watched while training (knn_every=0, no classes, or no held-out images).")]
    return section("training", "Training", grid(charts), *([] if "knn/held_out" in run.scalars else notes))


def open_set(run: Run) -> str:
    known = run.features["test"]["labels"] >= 0 if "test" in run.features else np.zeros(0, bool)
    if not run.scores:
        side = "unknown" if known.any() else "known"
        why = f"no test images of {side} classes" if run.classes else "no classes"
        return section(
            "curves", "Unknown against known", missing(f"There are {why}, so there is nothing to tell apart.")
        )
    lines: dict[str, list[Line]] = {"roc": [], "oscr": [], "pr": []}
    for number, (name, (score, correct)) in enumerate(run.scores.items()):
        title = "raw pixels" if name == "pixels" else name
        style = {"colour": INK if name == "pixels" else COLOURS[number % len(COLOURS)]}
        for kind, metric in (("roc", "auroc"), ("oscr", "oscr"), ("pr", "aupr")):
            curve = thin(*CURVES[kind](score[known], score[~known], correct[known]))
            value = run.numbers.get(f"osr/{name}/{metric}")
            label = title if value is None else f"{title} {percent(value)}"
            lines[kind].append(Line(*curve, label, **style))
    chance = Line([0, 1], [0, 1], None, "#808080", (0, (1, 2)))
    charts = [
        line_chart("ROC", [*lines["roc"], chance], "known images flagged", "unknown images caught", unit=True),
        line_chart("OSCR", lines["oscr"], "unknown images accepted", "known images accepted and right", unit=True),
        line_chart("Precision and recall", lines["pr"], "unknown images caught", "flagged images that are", unit=True),
    ]
    name, (score, _) = next(iter(run.scores.items()))  # the primary one, where it was measured
    parts = {"known": score[known], "unknown": score[~known]}
    limit = run.detector.threshold if run.detector is not None and name == PRIMARY else None
    marks = {} if limit is None else {"threshold": limit}
    what = (
        "Scores of the primary detector: distance to a near training image" if name == PRIMARY else f"Scores of {name}"
    )
    note = "" if limit is None else " Images to the right of the threshold are called unknown."
    return section(
        "curves",
        "Unknown against known",
        grid(charts),
        '<p class="quiet">Legends: area under the curve, average precision for precision and recall, in per cent.</p>',
        f'<div class="wide">{histogram("Scores of the test images", parts, f"{name} score", marks)}</div>',
        f"<p>{what}; the less the two overlap, the better.{note}</p>",
    )


def roc(known: np.ndarray, unknown: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of known images flagged and of unknown images caught, over all thresholds."""
    return roc_curve(*_targets(known, unknown))[:2]


def precision_recall(known: np.ndarray, unknown: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision of unknown images."""
    precision, recall, _ = precision_recall_curve(*_targets(known, unknown))
    return recall, precision


def oscr(known: np.ndarray, unknown: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of unknown images accepted, and of known images accepted and rightly classified."""
    thresholds = np.unique(np.concatenate([known, unknown]))
    accepted = np.searchsorted(np.sort(unknown), thresholds, "right") / len(unknown)
    right = np.searchsorted(np.sort(known[correct]), thresholds, "right") / len(known)
    return np.r_[0, accepted], np.r_[0, right]


CURVES = {"roc": roc, "oscr": oscr, "pr": precision_recall}


def grid(charts: list[str]) -> str:
    return f'<div class="grid">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>'


def _targets(known: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.r_[np.zeros(len(known)), np.ones(len(unknown))], np.r_[known, unknown]
