"""Where it goes wrong: the confusion matrix, and the mistakes it is surest of beside their nearest training images."""

from typing import Any

import numpy as np
from PIL import Image

from gradmix.eval.detectors import PRIMARY
from gradmix.eval.report.page import Section, section
from gradmix.eval.report.pictures import SHARP, data_uri, thumbnail
from gradmix.eval.runs.folder import Run

WIDEST = 25  # classes that a matrix can show as a table
SHOWN = 6  # mistakes of each kind
NEAREST = 3


def confusion(run: Run) -> Section:
    """Which test classes are taken for which: a table, or of more than ``WIDEST`` classes a picture."""
    name, title, detector = "confusion", "Confusion", run.detector
    if detector is None or run.verdict is None or run.verdict.label is None:
        return section(name, title, why="There are no classes to confuse.")
    labels, predicted = run.features["test"]["labels"], run.verdict.label
    count = len(run.classes)
    matrix = np.zeros((count + 1, count + 1), int)  # the last row and column: unknown
    np.add.at(matrix, (labels % (count + 1), predicted % (count + 1)), 1)
    rows = range(count + 1) if matrix[count].any() else range(count)
    names = [run.name_of(index) for index in [*range(count), -1]]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    show = _as_table if count <= WIDEST else _as_picture
    return section(
        name,
        title,
        why="",
        detector=PRIMARY,
        names=names,
        no_threshold=detector.threshold is None,
        **show(names, matrix, shares, rows),
    )


def mistakes(run: Run) -> Section:
    """The mistakes that the detector is surest of, beside the nearest training images."""
    name, title, detector = "mistakes", "Surest mistakes", run.detector
    if detector is None or run.verdict is None or run.verdict.label is None or run.verdict.closest is None:
        return section(name, title, why="There are no classes, so there are no mistakes to show.")
    test, labels = run.features["test"]["features"], run.features["test"]["labels"]
    score, closest, predicted = run.verdict.score, run.verdict.closest, run.verdict.label
    low, high = np.argsort(score, kind="stable"), np.argsort(-score, kind="stable")
    kinds = {
        "Unknown images taken for known ones": low[(labels[low] < 0) & (predicted[low] >= 0)],
        "Known images of the wrong class": low[
            (labels[low] >= 0) & (closest[low] != labels[low]) & (predicted[low] >= 0)
        ],
        "Known images taken for unknown ones": high[(labels[high] >= 0) & (predicted[high] < 0)],
    }
    shown = []
    for what, rows in kinds.items():
        chosen, cards = rows[:SHOWN], []
        if len(chosen):
            nearest = detector.neighbours(test[chosen], min(NEAREST, len(run.features["train"]["labels"])))[1]
            cards = [_card(run, *each) for each in zip(chosen, nearest, score[chosen], predicted[chosen], strict=True)]
        shown.append((what, len(rows), cards))
    no_images = "" if run.images else run.why_no_images
    return section(name, title, why="", nearest=NEAREST, no_images=no_images, kinds=shown)


def _as_table(names: list[str], matrix: np.ndarray, shares: np.ndarray, rows: range) -> dict[str, Any]:
    """Rows of cells ``(images, share of the row, whether a frequent mistake)``."""
    cells = [
        (names[i], [(int(matrix[i, j]), share, i != j and share > 0.1) for j, share in enumerate(shares[i])])
        for i in rows
    ]
    return {"picture": "", "rows": cells}


def _as_picture(names: list[str], matrix: np.ndarray, shares: np.ndarray, rows: range) -> dict[str, Any]:
    """Of many classes: one pixel per cell, and the confusions that happen most."""
    image = Image.fromarray((255 * (1 - shares[list(rows)] ** 0.5)).round().astype(np.uint8))  # roots show small shares
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:20]
    most = [(names[i], names[j], int(wrong[i, j])) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return {"picture": data_uri(image, lossless=True), "most": [entry for entry in most if entry[2]]}


def _card(run: Run, row: int, nearest: np.ndarray, score: float, predicted: int) -> dict[str, Any]:
    pictures = []
    if run.images:
        pictures = [_picture(run, "test", row, 96), *(_picture(run, "train", near, 64) for near in nearest)]
    label = run.features["test"]["labels"][row]
    return {
        "pictures": pictures,
        "what": f"{run.name_of(label)}, taken for {run.name_of(predicted)}",
        "score": f"score {score:.3f}, {run.file_name('test', row)}",
    }


def _picture(run: Run, name: str, row: int, side: int) -> dict[str, Any]:
    image = thumbnail(run.images[name], int(row), side)
    if image is None:
        return {"uri": ""}
    text = f"{run.name_of(run.features[name]['labels'][row])}: {run.file_name(name, row)}"
    small = image.width <= SHARP
    return {"uri": data_uri(image, lossless=small), "sharp": small, "text": text, "side": side}
