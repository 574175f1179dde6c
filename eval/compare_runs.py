"""gradmix-compare: many runs beside each other, over splits and seeds; differences are paired where runs share both."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gradmix.eval.report.charts import COLOURS, DASHES, Line, line_chart, smooth, thin
from gradmix.eval.report.curves import CURVES, grid
from gradmix.eval.report.folder import PRIMARY, Run, read_run
from gradmix.eval.report.page import missing, page, section, table
from gradmix.ssl.files import write_text
from gradmix.ssl.run import FREE_KEYS, flat

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
UNIT = ("data.split", "data.known", "seed")  # what a pair shares
DATA = ("data.name", "data.image_size", "data.holdout", "data.test_fraction", "data.unknown_root")
WATCHING = ("knn_every", "quality_every", "pictures_every")  # change nothing that is measured


@dataclass
class Group:
    """Runs of one data set that differ in split and seed only.

    Attributes:
        label: what sets the group apart from the others.
        runs: by split, known classes and seed; several where the same was run again.
    """

    label: str
    runs: dict[tuple, list[Run]]

    def values(self, key: str) -> dict[tuple, float]:
        """A number by unit; the mean where a unit was run several times."""
        found = {unit: [run.numbers[key] for run in runs if key in run.numbers] for unit, runs in self.runs.items()}
        return {unit: float(np.mean(values)) for unit, values in found.items() if values}


@dataclass
class Difference:
    """A group minus the first one, over the units that both have."""

    mean: float
    deviation: float | None
    higher: int
    pairs: int


def main() -> None:
    """gradmix-compare."""
    parser = argparse.ArgumentParser(
        prog="gradmix-compare",
        description="Compare runs: mean, standard deviation and paired differences over splits and seeds.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs at any depth")
    parser.add_argument("--out", default="compare.html", help="the page with the curves (default: compare.html)")
    arguments = parser.parse_args()
    try:
        sets = group_runs([read_run(path, images=False) for path in find_runs(arguments.runs)])
        print(text(sets))
        write_text(Path(arguments.out).expanduser(), html(sets))
        print(f"\n{arguments.out}: the curves")
    except (ValueError, OSError) as error:
        print(f"gradmix-compare: {error}", file=sys.stderr)
        sys.exit(2)


def find_runs(where: Sequence[str | Path]) -> list[Path]:
    """Evaluated runs in these folders, in the order given, each once.

    Raises:
        ValueError: a folder holds none.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, where):
        folder = folder.expanduser()
        inner = [
            path.parent for path in sorted(folder.rglob("config.yaml")) if (path.parent / "metrics.json").is_file()
        ]
        runs = [folder] if (folder / "config.yaml").is_file() else inner
        if not runs:
            raise ValueError(f"{folder}: no evaluated run there; a run's folder holds config.yaml and metrics.json")
        found |= {path.resolve(): path for path in runs}
    return list(found.values())


def group_runs(runs: Sequence[Run]) -> dict[str, list[Group]]:
    """Runs by data set, and within it by everything in the config but split, seed and where a run computes."""
    sets: dict[tuple, dict[tuple, list[tuple[Run, dict]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        config = {key: _frozen(value) for key, value in flat(asdict(run.config)).items()}
        keys = (*DATA, "data.root") if config["data.name"] == "imagefolder" else DATA
        data = tuple((key, config[key]) for key in keys)
        apart = {key: value for key, value in config.items() if not _shared(key)}
        sets[data][tuple(apart.items())].append((run, config))
    names = _labels([dict(data) for data in sets], ("data.name",))
    result = {}
    for name, groups in zip(names, sets.values(), strict=True):
        labels = _labels([dict(apart) for apart in groups], ("method.name", "mix.name"))
        result[name] = []
        for label, members in zip(labels, groups.values(), strict=True):
            units = defaultdict(list)
            for run, config in members:
                units[tuple(config[key] for key in UNIT)].append(run)
            result[name].append(Group(label, dict(units)))
    return result


def difference(group: Group, reference: Group, key: str) -> Difference | None:
    """``group`` minus ``reference``, paired by split and seed; None where they share none."""
    ours, theirs = group.values(key), reference.values(key)
    values = np.array([ours[unit] - theirs[unit] for unit in ours if unit in theirs])
    if not len(values):
        return None
    deviation = float(values.std(ddof=1)) if len(values) > 1 else None
    return Difference(float(values.mean()), deviation, int((values > 0).sum()), len(values))


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
                line = f"    {group.label:<{width}}{_mean(values, scale):>16}  n={len(values):<3} {_gap(what, scale)}"
                lines.append(line.rstrip())
    shared = "± standard deviation over splits and seeds (n)"
    if any(len(groups) > 1 for groups in sets.values()):
        shared += "; differences to the first group are over the splits and seeds that both have"
    return "\n".join([*lines, "", shared])


def html(sets: dict[str, list[Group]]) -> str:
    """The page: the same table, then every number, and the curves of all runs overlaid."""
    body = '<p class="quiet">GradMix</p><h1>Runs compared</h1>'
    for number, (name, groups) in enumerate(sets.items()):
        body += section(
            f"data-{number}", name, _table(groups, NUMBERS), _curves(groups), _rest(groups), _folders(groups)
        )
    return page("Runs compared - GradMix", body)


def _table(groups: list[Group], numbers: dict[str, tuple[str, float]]) -> str:
    head = ["number", *(escape(group.label) for group in groups)]
    rows = []
    for key, (title, scale) in numbers.items():
        cells = [f'<th><div class="meaning">{escape(title)}</div></th>']
        for group in groups:
            values = list(group.values(key).values())
            what = difference(group, groups[0], key) if group is not groups[0] else None
            data = f' data-key="{escape(key)}" data-value="{float(np.mean(values))!r}"' if values else ""
            cells.append(f"<td{data}>{_mean(values, scale)}<small>{_gap(what, scale)}</small></td>")
        rows.append(cells)
    note = (
        "Mean ± standard deviation over splits and seeds; below it, the difference to the first column over the splits "
        "and seeds that both have."
    )
    return table(head, rows) + f'<p class="quiet">{note}</p>'


def _rest(groups: list[Group]) -> str:
    runs = [run for group in groups for unit in group.runs.values() for run in unit]
    keys = [
        key
        for key, value in runs[0].numbers.items()
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


def _folders(groups: list[Group]) -> str:
    rows = [
        [f'<td class="text">{escape(part)}</td>' for part in (group.label, _unit(unit), str(run.path))]
        for group in groups
        for unit, runs in group.runs.items()
        for run in runs
    ]
    return f"<details><summary>The runs</summary>{table(['group', 'split and seed', 'folder'], rows)}</details>"


def _mean(values: list[float], scale: float) -> str:
    if not values:
        return "–"
    spread = f" ± {scale * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{scale * np.mean(values):.2f}{spread}"


def _gap(what: Difference | None, scale: float) -> str:
    if what is None:
        return ""
    spread = "" if what.deviation is None else f" ± {scale * what.deviation:.2f}"
    return f"{scale * what.mean:+.2f}{spread}, higher in {what.higher} of {what.pairs}"


def _unit(unit: tuple) -> str:
    split, known, seed = unit
    which = f"known {', '.join(map(str, known))}" if known else f"split {split}" if split is not None else "no split"
    return f"{which}, seed {seed}"


def _labels(configs: list[dict[str, Any]], alone: Sequence[str]) -> list[str]:
    """What sets each config apart from the others; the keys ``alone`` where there is nothing."""
    differing = [key for key in configs[0] if len({config.get(key) for config in configs}) > 1]
    names = [key for key in differing if key.endswith(".name")]
    # method=joint says all that its weights would; unless two groups then have the same label.
    short = [key for key in differing if key in names or key.split(".")[0] + ".name" not in names]
    for keys in (short, differing):
        labels = [
            ", ".join(f"{key.removesuffix('.name')}={config.get(key)}" for key in keys or alone) for config in configs
        ]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels)]


def _shared(key: str) -> bool:
    """Whether a key says which data, which unit, or only where and how a run computes."""
    free = (*FREE_KEYS, *UNIT, *DATA, *WATCHING)
    return any(key == name or key.startswith(f"{name}.") for name in free)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
