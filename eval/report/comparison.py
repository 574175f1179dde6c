"""The page of many runs: one table, every number, and the curves of all runs overlaid."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from gradmix.eval.detectors import PRIMARY
from gradmix.eval.report.charts import COLOURS, DASHES, Line, line_chart, smooth, thin
from gradmix.eval.report.curves import CURVES, grid
from gradmix.eval.report.page import missing, page, section, table
from gradmix.eval.runs.folder import Run, read_run
from gradmix.eval.runs.groups import Difference, Group, difference, group_runs
from gradmix.ssl.runs.files import write_text

# What a row of the table is, and by how much its number is multiplied.
NUMBERS = {
    "knn/top1": ("kNN accuracy of known classes, %", 100),
    "linear/top1": ("linear probe, %", 100),
    f"osr/{PRIMARY}/auroc": (f"AUROC of {PRIMARY}, %", 100),
    f"osr/{PRIMARY}/fpr95_known": ("unknown accepted with 95 % of known (FPR95 known, lower is better), %", 100),
    f"osr/{PRIMARY}/oscr": ("OSCR, %", 100),
    "osr/pixels/auroc": ("AUROC of raw pixels, %", 100),
    "train/images_per_s": ("training images/s", 1),
}


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
    body = '<p class="quiet">GradMix</p><h1>Runs compared</h1>'
    for number, (name, groups) in enumerate(sets.items()):
        body += section(
            f"data-{number}", name, _table(groups, NUMBERS), _curves(groups), _rest(groups), _folders(groups, folder)
        )
    return page("Runs compared - GradMix", body)


def text(sets: dict[str, list[Group]]) -> str:
    """The table for a terminal."""
    lines = []
    for name, groups in sets.items():
        width = max(len(group.label) for group in groups) + 2
        lines += ["", name]
        for key, (title, scale) in NUMBERS.items():
            if not any(group.values(key) for group in groups):
                continue
            lines.append(f"  {title}")
            for group in groups:
                values = list(group.values(key).values())
                what = difference(group, groups[0], key) if group is not groups[0] else None
                line = f"    {group.label:<{width}}{mean(values, scale):>16}  n={len(values):<3} {gap(what, scale)}"
                lines.append(line.rstrip())
    shared = "± standard deviation over splits and seeds (n)"
    if any(len(groups) > 1 for groups in sets.values()):
        shared += "; differences to the first group are over the splits and seeds that both have"
    return "\n".join([*lines, "", shared])


def _table(groups: list[Group], numbers: dict[str, tuple[str, float]]) -> str:
    head = ["number", *(escape(group.label) for group in groups)]
    rows = []
    for key, (title, scale) in numbers.items():
        cells = [f'<th><div class="meaning">{escape(title)}</div></th>']
        for group in groups:
            values = list(group.values(key).values())
            what = difference(group, groups[0], key) if group is not groups[0] else None
            data = f' data-key="{escape(key)}" data-value="{float(np.mean(values))!r}"' if values else ""
            cells.append(f"<td{data}>{mean(values, scale)}<small>{gap(what, scale)}</small></td>")
        rows.append(cells)
    note = "Mean ± standard deviation over splits and seeds"
    if len(groups) > 1:
        note += "; below it, the difference to the first column over the splits and seeds that both have"
    return table(head, rows) + f'<p class="quiet">{note}.</p>'


def _rest(groups: list[Group]) -> str:
    runs = [run for group in groups for unit in group.runs.values() for run in unit]
    keys = [
        key
        for key, value in {key: value for run in runs for key, value in run.numbers.items()}.items()
        if isinstance(value, int | float) and key not in NUMBERS and not key.endswith(("_low", "_high"))
    ]
    everything = _table(groups, {key: (key, 1) for key in keys})
    return f"<details><summary>Every number of metrics.json</summary>{everything}</details>"


def _curves(groups: list[Group]) -> str:
    charts = []
    for tag, title in (("knn/held_out", "kNN accuracy on held-out images"), ("train/loss", "Training loss")):
        lines = _lines(groups, lambda run, tag=tag: smooth(*run.scalars[tag]) if tag in run.scalars else None)
        if lines:
            charts.append(line_chart(title, lines, "step", ""))
    titles = {"roc": ("ROC", "known images flagged", "unknown images caught")}
    titles["oscr"] = ("OSCR", "unknown images accepted", "known images accepted and right")
    for kind, (title, x, y) in titles.items():
        lines = _lines(groups, lambda run, kind=kind: _open_set_curve(run, kind))
        if lines:
            charts.append(line_chart(f"{title} of {PRIMARY}", lines, x, y, unit=True))
    units = sorted({unit for group in groups for unit in group.runs}, key=str)
    key = f"osr/{PRIMARY}/auroc"
    if len(units) > 1 and any(group.values(key) for group in groups):
        charts.append(_by_unit(groups, units, key))
    return grid(charts) if charts else missing("The runs hold no TensorBoard events and no open-set scores.")


def _by_unit(groups: list[Group], units: list[tuple], key: str) -> str:
    """One dot per run: where differences are small beside those between splits, only the pairs tell."""
    lines = []
    for group in groups:
        values = group.values(key)
        shown = [number for number, unit in enumerate(units) if unit in values]
        lines.append(Line(shown, [100 * values[units[number]] for number in shown], group.label))
    names = "; ".join(f"{number}: {_unit(unit)}" for number, unit in enumerate(units))
    chart = line_chart(f"AUROC of {PRIMARY} by split and seed, %", lines, "split and seed", "", marks=True)
    return f"{chart}<figcaption>{escape(names)}</figcaption>"


def _lines(groups: list[Group], curve) -> list[Line]:
    """One line per run, in its group's colour and dashes."""
    lines = []
    for number, group in enumerate(groups):
        label = group.label
        for run in (run for unit in group.runs.values() for run in unit):
            points = curve(run)
            if points is not None:
                lines.append(Line(*points, label, COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]))
                label = None
    return lines


def _open_set_curve(run: Run, kind: str):
    if PRIMARY not in run.scores:
        return None
    known = run.features["test"]["labels"] >= 0
    score, correct = run.scores[PRIMARY]
    return thin(*CURVES[kind](score[known], score[~known], correct[known]))


def _folders(groups: list[Group], folder: Path) -> str:
    rows = [
        [f'<td class="text">{cell}</td>' for cell in (escape(group.label), escape(_unit(unit)), _link(run, folder))]
        for group in groups
        for unit, runs in group.runs.items()
        for run in runs
    ]
    shown = " open" if len(rows) <= 10 else ""
    return f"<details{shown}><summary>The runs</summary>{table(['group', 'split and seed', 'folder'], rows)}</details>"


def _link(run: Run, folder: Path) -> str:
    report = run.path / "report.html"
    where = quote(Path(os.path.relpath(report.resolve(), folder.resolve())).as_posix())
    return f'<a href="{where}">{escape(str(run.path))}</a>' if report.is_file() else escape(str(run.path))


def mean(values: list[float], scale: float) -> str:
    if not values:
        return "–"
    digits = _digits(np.mean(values), scale)
    spread = f" ± {scale * np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * np.mean(values):.{digits}f}{spread}"


def gap(what: Difference | None, scale: float) -> str:
    if what is None:
        return ""
    digits = _digits(what.mean, scale)
    spread = "" if what.deviation is None else f" ± {scale * what.deviation:.{digits}f}"
    return f"{scale * what.mean:+.{digits}f}{spread}, higher in {what.higher} of {what.pairs}"


def _digits(value: float, scale: float) -> int:
    """Decimals: shares that are not shown in per cent need more."""
    return 2 if scale == 100 or abs(value) >= 10 else 4


def _unit(unit: tuple) -> str:
    split, known, seed = unit
    which = f"known {', '.join(map(str, known))}" if known else f"split {split}" if split is not None else "no split"
    return f"{which}, seed {seed}"
