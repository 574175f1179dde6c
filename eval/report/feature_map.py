"""The test images' features in the plane; a point shows its image."""

from typing import Any

import numpy as np
from sklearn.manifold import TSNE

from gradmix.eval.counted import counted
from gradmix.eval.features.arrays import unit_rows
from gradmix.eval.report.charts import COLOURS
from gradmix.eval.report.page import Section, section
from gradmix.eval.report.pictures import SHARP, data_uri, sheet
from gradmix.eval.runs.folder import Run

POINTS = 1500
SIDE = 700  # of the drawing
COLUMNS = 40  # of the sprite
SHAPES = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4.5-4.5h9v9h-9z", "M0-6 5.5 4.5h-11z", "M0-6 6 0 0 6-6 0z")
CROSS = "M-4-4 4 4M4-4-4 4"  # unknown


def feature_map(run: Run) -> Section:
    """A drawing with one mark per test image, and what `map.js` needs to show the image under the pointer."""
    name, title = "map", "Map of the features"
    if "test" not in run.features:
        return section(name, title, why="There are no saved features in this folder.")
    test = run.features["test"]
    count = len(test["labels"])
    rows = np.arange(count)
    if count > POINTS:
        rows = np.sort(np.random.default_rng(0).choice(rows, POINTS, replace=False))
    places = SIDE * (0.03 + 0.94 * plane(test["features"][rows]))
    labels = test["labels"][rows]
    order = np.argsort(labels >= 0, kind="stable")  # known ones are drawn on top
    rows, places, labels = rows[order], places[order], labels[order]
    size = min(48, run.images["test"].size) if run.images else 0
    pictures = sheet(run.images["test"], rows.tolist(), COLUMNS, 48) if run.images else None
    return section(
        name,
        title,
        why="",
        shown=f"{POINTS} of the {count} test images" if count > POINTS else f"The {counted(count, 'test image')}",
        no_images="" if run.images else run.why_no_images,
        side=SIDE,
        marks=[(_class(label), _shape(label), x, y) for (x, y), label in zip(places, labels, strict=True)],
        sprite=data_uri(pictures, lossless=size <= 16) if pictures else "",
        sharp=0 < size <= SHARP,
        about={
            "columns": COLUMNS,
            "rows": -(-len(rows) // COLUMNS),
            "captions": _captions(run, rows),
            "labels": labels.tolist(),
        },
        **_legend(run, labels),
    )


def plane(features: np.ndarray) -> np.ndarray:
    """Places ``[N, 2]`` in the unit square: t-SNE, seeded, of L2-normalised features ``[N, F]``; of few or collapsed
    ones their principal components.
    """
    unit = unit_rows(features)
    left, spread, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
    reduced = (left * spread)[:, :50]
    flat = np.zeros((len(unit), 2))
    flat[:, : reduced.shape[1]] = reduced[:, :2]
    # On collapsed features scikit-learn's t-SNE divides by zero, and then it takes the whole process down.
    if len(unit) >= 10 and flat.std(axis=0).min() > 1e-4:
        start = (flat / flat[:, 0].std() * 1e-4).astype(np.float32)
        neighbours = min(30, (len(unit) - 1) / 3)
        tsne = TSNE(init=start, random_state=0, max_iter=500, angle=0.7, perplexity=neighbours)
        flat = tsne.fit_transform(reduced)
    low, high = flat.min(axis=0), flat.max(axis=0)
    return (flat - low) / np.where(high > low, high - low, 1)


def _captions(run: Run, rows: np.ndarray) -> list[str]:
    test = run.features["test"]
    names = [run.name_of(label) for label in test["labels"][rows]]
    captions = [f"test image {row}: {name}" for row, name in zip(rows, names, strict=True)]
    if run.images and run.images["test"].files is not None:
        captions = [f"{name}, {run.file_name('test', row)}" for row, name in zip(rows, names, strict=True)]
    if run.verdict is None:
        return captions
    taken = [""] * len(rows)
    if run.verdict.label is not None:
        taken = [f", taken for {run.name_of(label)}" for label in run.verdict.label[rows]]
    return [f"{c}{t}, score {s:.3f}" for c, t, s in zip(captions, taken, run.verdict.score[rows], strict=True)]


def _class(label: int) -> str:
    return f"c{label % len(COLOURS)}" if label >= 0 else "unknown"


def _shape(label: int) -> str:
    return SHAPES[label // len(COLOURS) % len(SHAPES)] if label >= 0 else CROSS


def _legend(run: Run, labels: np.ndarray) -> dict[str, Any]:
    """What each mark stands for; of too many classes their number."""
    if len(run.classes) > len(COLOURS) * len(SHAPES):
        return {"too_many": len(run.classes), "legend": []}
    shown = sorted(set(labels.tolist()), key=lambda label: (label < 0, label)) if run.classes else []
    return {"too_many": 0, "legend": [(_class(label), _shape(label), run.name_of(label)) for label in shown]}
