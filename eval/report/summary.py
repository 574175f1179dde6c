"""What a terminal shows of a run: what it is about to do, and its numbers; of several splits, their mean."""

from collections import Counter
from typing import Any

import numpy as np

from gradmix.eval import catalogue
from gradmix.eval.counted import counted
from gradmix.eval.detectors import PRIMARY
from gradmix.ssl.config import Config, DataConfig
from gradmix.ssl.data.open_set import OpenSetData

CLASSES = 10  # whose recall is listed


def describe(config: Config, data: OpenSetData) -> str:
    """One paragraph on what is about to happen."""
    how = (
        f"{config.method.name} with mix={config.mix.name}, {config.encoder}, "
        f"{counted(config.epochs, 'epoch')}, batch {config.batch_size}"
    )
    return f"{describe_data(config.data, data)}\n{how}"


def describe_data(config: DataConfig, data: OpenSetData) -> str:
    """How many images of which kind there are, and what people should know of them."""
    known = len(data.classes)
    unknown = int((data.test.labels < 0).sum()) if known else 0
    others = f"{len(data.unknown)} unknown"
    if config.unknown_root is not None:
        others = f"unknown: {config.unknown_root}"
    if config.unknown_roots:
        sets = (f"{name} ({counted(int(rows.sum()), 'image')})" for name, rows in data.unknown_sets.items())
        others = f"unknown: {', '.join(sets)}"
    lines = [
        f"{config.name}: {len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test images"
        + (f" ({unknown} of unknown classes)" if unknown else ""),
    ]
    if known:
        shown = ", ".join(data.classes[:10]) + (", ..." if known > 10 else "")
        lines.append(f"{counted(known, 'known class')}: {shown}; {others}")
    if data.empty:
        lines.append(f"without images, left out: {', '.join(data.empty)}")
    lines += data.notes
    if data.bad:
        lines.append(f"image files that can't be read, left out: {len(data.bad)}, see bad_images.json")
    return "\n".join(lines)


def over_splits(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every number that all splits have; what else is the same in all of them;
    and what one of them or more did not measure.
    """
    first = results[0]
    numbers = [
        key
        for key, value in first.items()
        # the ends of an interval over one split's images; their mean would be the interval of nothing
        if isinstance(value, float | int) and all(key in r for r in results) and not key.endswith(("_low", "_high"))
    ]
    summary: dict[str, Any] = {"splits": len(results)}
    for key in numbers:
        values = [r[key] for r in results]
        summary[key] = float(np.mean(values))
        if len(values) > 1:
            summary[f"{key}/std"] = float(np.std(values, ddof=1))
    others = {
        key: value
        for key, value in first.items()
        if not isinstance(value, float | int) and all(r.get(key) == value for r in results)
    }
    skipped: dict[str, list[str]] = {}
    for what, why in (pair for result in results for pair in result.get("skipped", {}).items()):
        skipped[what] = [*skipped.get(what, []), why]
    merged = {what: _in_splits(whys, len(results)) for what, whys in skipped.items()}
    return summary | others | ({"skipped": merged} if merged else {})


def _in_splits(whys: list[str], splits: int) -> str:
    """Why something was not measured in some of the splits: said once where it is the same in all."""
    counts = Counter(whys)
    if counts[whys[0]] == splits:
        return whys[0]
    return "; ".join(f"in {count} of {splits} splits: {why}" for why, count in counts.items())


def table(result: dict[str, Any]) -> str:
    """What a person wants to see first, as text."""
    lines = [*_known(result), *_open_set(result), *_others(result)]
    if result.get("data/bad_images") and "corruptions/source" not in result:  # corruption_table says it
        lines.append(f"  left out: image files that can't be read: {result['data/bad_images']:g}, see bad_images.json")
    if result.get("data/test_copies"):
        lines.append(f"  too good: exact copies of training images in the test set: {result['data/test_copies']:g}")
    if result.get("data/unknown_copies"):
        lines.append(
            f"  wrong: exact copies of training images among the unknown ones: {result['data/unknown_copies']:g}"
        )
    lines += [f"  not measured: {what} ({why})" for what, why in result.get("skipped", {}).items()]
    return "\n".join(lines)


def _known(result: dict[str, Any]) -> list[str]:
    grid = _grid(result, [metric for metric in catalogue.KNOWN if metric.terminal])
    if not grid:
        return []
    lines = ["", "known classes, %", *grid]
    recalls = result.get("knn/recall", {})
    if recalls:
        shown = sorted(recalls.items(), key=lambda item: item[1])[:CLASSES]
        more = f" and {len(recalls) - CLASSES} more in metrics.json" if len(recalls) > CLASSES else ""
        lines.append(f"  kNN, recall by class: {', '.join(f'{name} {100 * value:.1f}' for name, value in shown)}{more}")
    return lines + [f"  {result[key]}" for key in result if key.startswith("protocol/")]


def _open_set(result: dict[str, Any]) -> list[str]:
    columns = [metric for metric in catalogue.OPEN_SET if metric.terminal]
    grid = _grid(result, columns)
    if not grid:
        return []
    shown = [m for m in columns if any(m.at(name) in result for name in catalogue.subjects(result, columns))]
    title = catalogue.detectors_title(shown)
    notes = [f"  {metric.title}: {metric.sentence} Lower is better." for metric in shown if metric.better == "lower"]
    if f"osr/{PRIMARY}/auroc_low" in result:
        notes.append("  [low, high]: 95 % interval, bootstrap over the test images.")
    return ["", f"{title[0].lower()}{title[1:]}, %", *grid, *([""] if notes else []), *notes]


def _others(result: dict[str, Any]) -> list[str]:
    """A line for each number of no classifier's and no detector's table."""
    grids, lines = (*catalogue.KNOWN, *catalogue.OPEN_SET), []
    for key in result:
        metric, _ = catalogue.match(key) or (None, "")
        if metric is not None and metric.terminal and metric not in grids and not catalogue.ENDS.search(key):
            lines.append(f"  {catalogue.title(key)}{' %' * metric.share}: {_cell(result, key, metric.scale)}")
    return ["", *lines] if lines else []


def _grid(result: dict[str, Any], columns: list[catalogue.Metric]) -> list[str]:
    """Rows of text under their titles, one for each classifier or detector; the columns that nobody has left out."""
    titles = [metric.title for metric in columns]
    who = catalogue.subjects(result, columns)
    if not who:
        return []
    cells = {name: [_cell(result, metric.at(name)) for metric in columns] for name in who}
    kept = [i for i in range(len(titles)) if any(row[i] != "-" for row in cells.values())]
    widths = {i: max(len(titles[i]), 11, *(len(row[i]) for row in cells.values())) + 2 for i in kept}
    names = {name: f"{PRIMARY} on pixels" if name == "pixels" else catalogue.name_of(name) for name in cells}
    first = max(20, *(len(name) for name in names.values()))

    def line(label: str, row: list[str]) -> str:
        return f"  {label:<{first}}" + "".join(f"{row[i]:>{width}}" for i, width in widths.items())

    return [line("", titles), *(line(names[name], row) for name, row in cells.items())]


def _cell(result: dict[str, Any], key: str, scale: int = 100) -> str:
    if key not in result:
        return "-"
    text = f"{scale * result[key]:.2f}"
    for deviation in (f"{key}/std", f"{key}_std"):
        if deviation in result:
            return f"{text} ± {scale * result[deviation]:.2f}"
    if f"{key}_low" in result:
        return f"{text} [{scale * result[f'{key}_low']:.1f}, {scale * result[f'{key}_high']:.1f}]"
    return text
