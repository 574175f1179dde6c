"""The tables: every number with its meaning, beside what raw pixels reach."""

from typing import Any

import numpy as np

from gradmix.eval import catalogue
from gradmix.eval.catalogue import CLASSIFIERS, KNOWN, OPEN_SET
from gradmix.eval.detectors import PRIMARY
from gradmix.eval.report.page import Section, section
from gradmix.eval.runs.folder import Run

CLASSES = 25  # whose recall is shown


def numbers(run: Run) -> Section:
    """The numbers of metrics.json, each with what it means."""
    found = run.numbers
    classifiers = [
        (name, catalogue.name_of(name), CLASSIFIERS.get(name.split("/")[0], ("", ""))[1])
        for name in catalogue.subjects(found, KNOWN)
    ]
    detectors = catalogue.subjects(found, OPEN_SET)
    detectors.sort(key=lambda name: (name != PRIMARY, name != "pixels"))  # first what to look at, on narrow screens too
    told = [metric for metric in OPEN_SET if any(metric.at(name) in found for name in detectors)]
    return section(
        "numbers",
        "Numbers",
        numbers=found,
        shaded=PRIMARY,
        saved=run.config.primary,
        known=[metric for metric in KNOWN if any(isinstance(found.get(metric.at(c[0])), float) for c in classifiers)],
        classifiers=classifiers,
        recalls=_recalls(run),
        heading=catalogue.detectors_title(told),
        open_set=told,
        detectors=[(name, catalogue.name_of(name)) for name in detectors],
    )


def _recalls(run: Run) -> dict[str, Any]:
    """Rows ``(class, test images, recall of each classifier)``, lowest first."""
    by = {name: run.numbers[f"{name}/recall"] for name in CLASSIFIERS if f"{name}/recall" in run.numbers}
    if not by:
        return {"names": [], "rows": [], "more": 0}
    first = next(iter(by.values()))
    classes = sorted(first, key=first.get)
    labels = run.features["test"]["labels"] if "test" in run.features else np.zeros(0)
    counts = {name: int((labels == label).sum()) or "–" for label, name in enumerate(run.classes)}
    rows = [(name, counts.get(name, "–"), [recall.get(name) for recall in by.values()]) for name in classes[:CLASSES]]
    return {"names": [catalogue.name_of(name) for name in by], "rows": rows, "more": max(0, len(classes) - CLASSES)}
