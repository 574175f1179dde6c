"""The page of many runs: one table, every number, and the curves of all runs overlaid."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from gradmix.eval.catalogue import compared, is_of_the_method, match, metric_of, title
from gradmix.eval.detectors import PRIMARY
from gradmix.eval.report.charts import COLOURS, DASHES, Line, Points, line_chart, smooth, thin
from gradmix.eval.report.curves import CURVES
from gradmix.eval.report.page import Chart, page
from gradmix.eval.runs.folder import Run, read_run
from gradmix.eval.runs.groups import Difference, Group, Unit, difference, group_runs, shared
from gradmix.ssl.runs.files import write_text

SHOWN = (*compared(("knn", "linear", PRIMARY)), "osr/pixels/auroc")  # the numbers of the table
ENOUGH = 5  # pairs
TOO_FEW = "Differences of fewer than five pairs: too few to tell; run more splits or seeds."
OTHER_THRESHOLDS = (
    "accept or per_class differ: false alarms and balanced decisions, which follow them, stand without a difference."
)

OTHER_IMAGES = (
    "Runs of the same split and seed that were trained on other images (train/images in metrics.json) are no pairs."
)


def write_comparison(paths: Sequence[Path], out: Path) -> dict[str, list[Group]]:
    """Write the page ``out`` about these runs, and return them in groups."""
    sets = group_runs([read_run(path, images=False) for path in paths])
    write_text(out, html(sets, out.parent))
    return sets


def html(sets: dict[str, list[Group]], folder: Path) -> str:
    """The page: the same table, then every number, and the curves of all runs overlaid.

    Args:
        folder: where the page will be; the runs' own reports are linked from there.
    """
    data = [
        {
            "name": name,
            "groups": groups,
            "main": [_row(groups, key, metric_of(key).scale) for key in _measured(groups)],
            "notes": _notes(groups),
            "charts": _curves(groups),
            "others": [_row(groups, key, 1, named=False) for key in _others(groups)],
            "runs": _runs(groups, folder),
        }
        for name, groups in sets.items()
    ]
    return page("comparison.html", "Runs compared", sets=data)


def text(sets: dict[str, list[Group]]) -> str:
    """The table for a terminal."""
    lines = []
    for name, groups in sets.items():
        width = max(len(group.label) for group in groups) + 2
        lines += ["", name]
        for row in (_row(groups, key, metric_of(key).scale) for key in _measured(groups)):
            lines.append(f"  {row['title']} {row['arrow']}")
            for group, cell in zip(groups, row["cells"], strict=True):
                line = f"    {group.label:<{width}}{cell['mean']:>16}  n={cell['count']:<3} {cell['gap']}"
                lines.append(line.rstrip())
        lines += ["", *_notes(groups)]
    return "\n".join(lines)


def _measured(groups: list[Group]) -> list[str]:
    """The few keys that stand for a run, as far as any group has them."""
    return [key for key in SHOWN if any(group.values(key) for group in groups)]


def _others(groups: list[Group]) -> list[str]:
    numbers: dict[str, Any] = {}
    for group in groups:
        for run in (run for unit in group.runs.values() for run in unit):
            numbers |= run.numbers
    return [
        key
        for key, value in numbers.items()
        if isinstance(value, int | float) and key not in SHOWN and not key.endswith(("_low", "_high"))
    ]


def _row(groups: list[Group], key: str, scale: float, named: bool = True) -> dict[str, Any]:
    """A number of every group, and how far each is from the first group where that can be the method's doing."""
    found, cells = match(key), []
    for group in groups:
        values = list(group.values(key).values())
        apart = difference(group, groups[0], key) if group is not groups[0] and is_of_the_method(key) else None
        value = float(np.mean(values)) if values else None
        better = found[0].better if found else ""
        cells.append(
            {"value": value, "mean": mean(values, scale), "gap": gap(apart, scale, better), "count": len(values)}
        )
    if not named or found is None:
        return {"key": key, "title": key, "arrow": "", "sentence": "", "cells": cells}
    metric = found[0]
    name = f"{title(key)}, %" if metric.share else title(key)
    return {"key": key, "title": name, "arrow": metric.arrow, "sentence": metric.sentence, "cells": cells}


def _notes(groups: list[Group]) -> list[str]:
    notes = ["Mean ± standard deviation over splits and seeds (n); ↑ higher is better, ↓ lower is better."]
    if len(groups) > 1:
        notes.append(
            "Differences to the first group are over the splits and seeds that both have; "
            "± of a difference is its standard error."
        )
        apart = [difference(group, groups[0], key) for group in groups[1:] for key in _measured(groups)]
        if any(one is not None and one.pairs < ENOUGH for one in apart):
            notes.append(TOO_FEW)
        if any(shared(group, groups[0])[1] for group in groups[1:]):
            notes.append(OTHER_IMAGES)
        if len(set[tuple[float, bool]]().union(*(group.thresholds for group in groups))) > 1:
            notes.append(OTHER_THRESHOLDS)
    return notes


def _curves(groups: list[Group]) -> list[Chart]:
    charts = []
    for tag in ("knn/held_out", "train/loss"):
        metric = metric_of(tag)
        lines = _lines(groups, partial(_training_curve, tag=tag, scale=metric.scale))
        if lines:
            charts.append(Chart(line_chart(metric.title, lines, "step", "%" * metric.share)))
    titles = {"roc": ("ROC", "known images flagged", "unknown images caught")}
    titles["oscr"] = ("OSCR", "unknown images accepted", "known images accepted and right")
    for kind, (name, x, y) in titles.items():
        lines = _lines(groups, partial(_open_set_curve, kind=kind))
        if lines:
            charts.append(Chart(line_chart(f"{name} of {PRIMARY}", lines, x, y, unit=True)))
    units = sorted({unit for group in groups for unit in group.runs}, key=str)
    key = f"osr/{PRIMARY}/auroc"
    if len(units) > 1 and any(group.values(key) for group in groups):
        charts.append(_by_unit(groups, units, key))
    return charts


def _by_unit(groups: list[Group], units: list[Unit], key: str) -> Chart:
    """One dot per run: where differences are small beside those between splits, only the pairs tell."""
    lines = []
    for group in groups:
        values = group.values(key)
        shown = [number for number, unit in enumerate(units) if unit in values]
        lines.append(Line(shown, [100 * values[units[number]] for number in shown], group.label))
    names = "; ".join(f"{number}: {_unit(unit)}" for number, unit in enumerate(units))
    return Chart(line_chart(f"{title(key)} by split and seed", lines, "split and seed", "%", marks=True), names)


def _lines(groups: list[Group], curve: Callable[[Run], Points | None]) -> list[Line]:
    """One line per run, in its group's colour and dashes."""
    lines = []
    for number, group in enumerate(groups):
        label: str | None = group.label
        for run in (run for unit in group.runs.values() for run in unit):
            points = curve(run)
            if points is not None:
                lines.append(Line(*points, label, COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]))
                label = None
    return lines


def _training_curve(run: Run, tag: str, scale: float) -> Points | None:
    if tag not in run.scalars:
        return None
    steps, values = smooth(*run.scalars[tag])
    return steps, scale * values


def _open_set_curve(run: Run, kind: str) -> Points | None:
    if PRIMARY not in run.scores:
        return None
    known = run.features["test"]["labels"] >= 0
    score, correct = run.scores[PRIMARY]
    return thin(*CURVES[kind](score[known], score[~known], correct[known]))


def _runs(groups: list[Group], folder: Path) -> list[tuple[str, str, str, str]]:
    """Group, split and seed, folder, and the way to its report, "" where there is none."""
    return [
        (group.label, _unit(unit), str(run.path), _link(run, folder))
        for group in groups
        for unit, runs in group.runs.items()
        for run in runs
    ]


def _link(run: Run, folder: Path) -> str:
    report = run.path / "report.html"
    where = Path(os.path.relpath(report.resolve(), folder.resolve())).as_posix()
    return quote(where) if report.is_file() else ""


def mean(values: list[float], scale: float) -> str:
    """Mean and sample standard deviation of a group's values, scaled, as text."""
    if not values:
        return "–"
    digits = _digits(float(np.mean(values)), scale)
    spread = f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * np.mean(values):.{digits}f}{spread}"


def gap(apart: Difference | None, scale: float, better: str) -> str:
    """A difference with its standard error, and in how many pairs the group is the better one; of a single pair that it
    is no evidence.
    """
    if apart is None:
        return ""
    digits = _digits(apart.mean, scale)
    value = round(scale * apart.mean, digits)
    text = f"{value:+.{digits}f}" if value else f"{0:.{digits}f}"  # no -0.00
    if apart.error is None:
        return f"{text} (n = 1: no evidence)"
    count, word = (apart.lower if better == "lower" else apart.higher), ("better" if better else "higher")
    return f"{text} ± {scale * apart.error:.{digits}f}, {word} in {count} of {apart.pairs}"


def _digits(value: float, scale: float) -> int:
    """Decimals: shares that are not shown in per cent need more."""
    return 2 if scale == 100 or abs(value) >= 10 else 4


def _unit(unit: Unit) -> str:
    split, known, seed = unit
    which = f"known {', '.join(map(str, known))}" if known else f"split {split}" if split is not None else "no split"
    return f"{which}, seed {seed}"
