"""The test images' features in the plane; a point shows its image."""

import json
from html import escape

import numpy as np
from sklearn.manifold import TSNE

from gradmix.eval.report.charts import COLOURS
from gradmix.eval.report.pictures import SHARP, data_uri, sheet
from gradmix.eval.runs.folder import Run

POINTS = 1500
SIDE = 700  # of the drawing
COLUMNS = 40  # of the sprite
SHAPES = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4.5-4.5h9v9h-9z", "M0-6 5.5 4.5h-11z", "M0-6 6 0 0 6-6 0z")
CROSS = "M-4-4 4 4M4-4-4 4"  # unknown


def feature_map(run: Run) -> str:
    """A drawing with one mark per test image, and what `map.js` needs to show the image under the pointer."""
    test = run.features["test"]
    rows = np.arange(len(test["labels"]))
    if len(rows) > POINTS:
        rows = np.sort(np.random.default_rng(0).choice(rows, POINTS, replace=False))
    places = SIDE * (0.03 + 0.94 * plane(test["features"][rows]))
    labels = test["labels"][rows]
    order = np.argsort(labels >= 0, kind="stable")  # known ones are drawn on top
    rows, places, labels = rows[order], places[order], labels[order]
    marks = "".join(
        f'<path class="{_class(label)}" d="{_shape(label)}" transform="translate({x:.1f} {y:.1f})"/>'
        for (x, y), label in zip(places, labels, strict=True)
    )
    drawing = f'<svg class="map" viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="Map of the features">{marks}</svg>'
    size = min(48, run.images["test"].size) if run.images else 0
    picture = data_uri(sheet(run.images["test"], rows, COLUMNS, 48), lossless=size <= 16) if run.images else ""
    about = {"columns": COLUMNS, "rows": -(-len(rows) // COLUMNS), "captions": _captions(run, rows)}
    about["labels"] = labels.tolist()
    sharp = " sharp" if 0 < size <= SHARP else ""
    thumb = f'<div class="thumb{sharp}" style="background-image:url({picture})"></div>' if picture else ""
    data = json.dumps(about).replace("<", "\\u003c")
    return (
        f"{_legend(run, labels)}"
        f'<div class="mapbox" tabindex="0" aria-label="Map: arrow keys go from point to point">{drawing}'
        f'<div class="tip" role="status" hidden>{thumb}<p></p></div></div>'
        f'<script type="application/json" id="map-data">{data}</script>'
    )


def plane(features: np.ndarray) -> np.ndarray:
    """Places ``[N, 2]`` in the unit square: t-SNE, seeded, of L2-normalised features ``[N, F]``; of few or collapsed
    ones their principal components.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
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
    if run.detector is None:
        return captions
    scores = run.detector.score(test["features"][rows])
    taken = [""] * len(rows)
    if run.detector.classes_ is not None:
        predict = run.detector.predict if run.detector.threshold is not None else run.detector.classify
        taken = [f", taken for {run.name_of(label)}" for label in predict(test["features"][rows])]
    return [f"{c}{t}, score {s:.3f}" for c, t, s in zip(captions, taken, scores, strict=True)]


def _class(label: int) -> str:
    return f"c{label % len(COLOURS)}" if label >= 0 else "unknown"


def _shape(label: int) -> str:
    return SHAPES[label // len(COLOURS) % len(SHAPES)] if label >= 0 else CROSS


def _legend(run: Run, labels: np.ndarray) -> str:
    if len(run.classes) > len(COLOURS) * len(SHAPES):
        return f"<p>{len(run.classes)} classes are more than marks can tell apart: point at one to see which it is.</p>"
    entries = "".join(
        f'<li><svg viewBox="-8 -8 16 16" aria-hidden="true"><path class="{_class(label)}" d="{_shape(label)}"/></svg>'
        f"{escape(run.name_of(label))}</li>"
        for label in sorted(set(labels.tolist()), key=lambda label: (label < 0, label))
    )
    return f'<ul class="legend">{entries}</ul>' if run.classes else ""
