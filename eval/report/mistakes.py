"""Where it goes wrong: the confusion matrix, and the mistakes it is surest of beside their nearest training images."""

from html import escape

import numpy as np
from PIL import Image

from gradmix.eval.detectors import PRIMARY
from gradmix.eval.report.page import missing, section, table
from gradmix.eval.report.pictures import SHARP, data_uri, thumbnail
from gradmix.eval.runs.folder import Run

WIDEST = 25  # classes that a matrix can show as a table
SHOWN = 6  # mistakes of each kind
NEAREST = 3


def confusion(run: Run) -> str:
    name = "confusion"
    if "test" not in run.features or run.detector is None or run.detector.classes_ is None:
        return section(name, "Confusion", missing("There are no classes to confuse."))
    labels, predicted = run.features["test"]["labels"], _predictions(run)
    parts = []
    if run.detector.threshold is None:
        parts.append(missing("No threshold was calibrated (data.holdout=0), so nothing is called unknown."))
    count = len(run.classes)
    matrix = np.zeros((count + 1, count + 1), int)  # the last row and column: unknown
    np.add.at(matrix, (labels % (count + 1), predicted % (count + 1)), 1)
    rows = range(count + 1) if matrix[count].any() else range(count)
    text = f"Rows: what the test images are; columns: what {PRIMARY} takes them for. Shades are shares of the row."
    show = _matrix if count <= WIDEST else _picture_of
    return section(name, "Confusion", f"<p>{text}</p>", show(run, matrix, rows), *parts)


def mistakes(run: Run) -> str:
    name, title = "mistakes", "The surest mistakes"
    if "test" not in run.features or run.detector is None or run.detector.classes_ is None:
        return section(name, title, missing("There are no classes, so there are no mistakes to show."))
    test, labels = run.features["test"]["features"], run.features["test"]["labels"]
    score, predicted, closest = run.detector.score(test), _predictions(run), run.detector.classify(test)
    low, high = np.argsort(score, kind="stable"), np.argsort(-score, kind="stable")
    kinds = {
        "Unknown images taken for known ones": low[(labels[low] < 0) & (predicted[low] >= 0)],
        "Known images of the wrong class": low[
            (labels[low] >= 0) & (closest[low] != labels[low]) & (predicted[low] >= 0)
        ],
        "Known images taken for unknown ones": high[(labels[high] >= 0) & (predicted[high] < 0)],
    }
    parts = [
        f"<p>The image is large, its {NEAREST} nearest training images are small beside it. The score is the distance "
        "to a near training image: low is sure to be known, high is sure to be unknown.</p>"
    ]
    if not run.images:
        parts.append(missing(run.why_no_images))
    for what, rows in kinds.items():
        chosen = rows[:SHOWN]
        parts.append(f"<h3>{what} ({len(rows)})</h3>")
        if len(chosen):
            nearest = run.detector.neighbours(test[chosen], min(NEAREST, len(run.features["train"]["labels"])))[1]
            cards = [_card(run, *each) for each in zip(chosen, nearest, score[chosen], closest[chosen], strict=True)]
            parts.append(f'<div class="cards">{"".join(cards)}</div>')
        else:
            parts.append(missing("None."))
    return section(name, title, *parts)


def _predictions(run: Run) -> np.ndarray:
    test = run.features["test"]["features"]
    return run.detector.classify(test) if run.detector.threshold is None else run.detector.predict(test)


def _matrix(run: Run, matrix: np.ndarray, rows: range) -> str:
    names = [escape(run.name_of(index)) for index in [*range(len(run.classes)), -1]]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cells = []
    for i in rows:
        row = [f"<th>{names[i]}</th>"]
        for j, share in enumerate(shares[i]):
            shade = f"background:color-mix(in srgb, var(--accent) {60 * share:.0f}%, transparent)"
            wrong = ' class="wrong"' if i != j and share > 0.1 else ""
            row.append(f'<td style="{shade}"{wrong} title="{100 * share:.1f} %">{matrix[i, j] or "·"}</td>')
        cells.append(row)
    outlined = '<p class="quiet">Outlined: mistakes with more than 10 % of their row.</p>'
    return table(["", *(f"<th>{name}</th>" for name in names)], cells, "confusion") + outlined


def _picture_of(run: Run, matrix: np.ndarray, rows: range) -> str:
    """Of many classes: one pixel per cell, and the confusions that happen most as a table."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = Image.fromarray((255 * (1 - shares[list(rows)] ** 0.5)).round().astype(np.uint8))  # roots show small shares
    text = f"Confusion matrix of {len(run.classes)} classes"
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:20]
    names = [escape(run.name_of(index)) for index in [*range(len(run.classes)), -1]]
    cells = [
        [f'<td class="text">{names[i]}</td>', f'<td class="text">{names[j]}</td>', f"<td>{wrong[i, j]}</td>"]
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]
    return (
        f'<img class="matrix sharp" src="{data_uri(image, lossless=True)}" alt="{text}" width="560" height="560">'
        f'<p class="quiet">{len(run.classes)} classes in the order of their names, unknown last; dark is many.</p>'
        "<h3>The confusions that happen most</h3>" + table(["what it is", "what it is taken for", "images"], cells)
    )


def _card(run: Run, row: int, nearest: np.ndarray, score: float, closest: int) -> str:
    pictures = ""
    if run.images:
        tiles = [_picture(run, "test", row, 96), *(_picture(run, "train", near, 64) for near in nearest)]
        pictures = f'<div class="row">{"".join(tiles)}</div>'
    label = run.features["test"]["labels"][row]
    what = f"{run.name_of(label)}, nearest class {run.name_of(closest)}"
    return (
        f'<div class="card">{pictures}<span><b>{escape(what)}</b></span>'
        f'<span class="quiet">score {score:.3f}, {escape(run.file_name("test", row))}</span></div>'
    )


def _picture(run: Run, name: str, row: int, side: int) -> str:
    image = thumbnail(run.images[name], int(row), side)
    if image is None:
        return "<span>gone</span>"
    sharp = ' class="sharp"' if image.width <= SHARP else ""
    text = f"{run.name_of(run.features[name]['labels'][row])}: {run.file_name(name, row)}"
    uri = data_uri(image, lossless=image.width <= SHARP)
    return f'<img{sharp} src="{uri}" alt="{escape(text)}" title="{escape(text)}" width="{side}" height="{side}">'
