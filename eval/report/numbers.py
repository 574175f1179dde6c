"""The tables: every number with its meaning, beside what raw pixels reach."""

from html import escape

from gradmix.eval.detectors import PRIMARY
from gradmix.eval.report.page import missing, percent, section, table
from gradmix.eval.runs.folder import Run

KNOWN = {
    "knn/top1": (
        "kNN",
        "Share of the known test images whose class a vote of the nearest training images gets right. Nothing is "
        "trained on top of the features.",
        "knn_pixels/top1",
    ),
    "linear/top1": ("Linear probe", "The same share for a linear classifier trained on the frozen features.", None),
}
OPEN_SET = {
    "auroc": ("AUROC ↑", "Probability that an unknown image scores above a known one; 50 is chance."),
    "aupr": ("AUPR ↑", "Average precision of finding the unknown images; chance is their share of the test set."),
    "aupr_known": ("AUPR known ↑", "Average precision of finding the known images."),
    "fpr95": ("FPR95 ↓", "Share of known images flagged when 95 % of the unknown ones are caught."),
    "fpr95_known": ("FPR95 known ↓", "Share of unknown images accepted when 95 % of the known ones are."),
    "oscr": (
        "OSCR ↑",
        "Area under the share of known images that are accepted and rightly classified, against the share of unknown "
        "images accepted.",
    ),
    "closed_set_accuracy": ("Closed set ↑", "Share of known images whose closest class is the right one."),
    "balanced_accuracy": (
        "Balanced accuracy ↑",
        "Mean of the shares of known images accepted and unknown images rejected, at the threshold that accepts 95 % "
        "of held-out known images.",
    ),
}


def numbers(run: Run) -> str:
    return section(
        "numbers",
        "Numbers",
        '<p class="quiet">Per cent. ↑ higher is better, ↓ lower is better.</p>',
        _known(run),
        _open_set(run),
        *(missing(f"Not measured: {what}, for {why}.") for what, why in run.numbers.get("skipped", {}).items()),
        _everything(run),
    )


def _known(run: Run) -> str:
    rows = [
        [_name(title, meaning), _cell(run, key), _cell(run, baseline)]
        for key, (title, meaning, baseline) in KNOWN.items()
        if key in run.numbers
    ]
    if not rows:
        return ""
    return "<h3>Known classes</h3>" + table(["accuracy", "features", "raw pixels"], rows)


def _open_set(run: Run) -> str:
    found = [key.split("/")[1] for key in run.numbers if key.startswith("osr/") and key.endswith("/auroc")]
    if not found:
        return ""
    found.sort(key=lambda name: (name != PRIMARY, name != "pixels"))  # what to look at first, also on a narrow screen
    head = [f'<th class="primary">{escape(n)}</th>' if n == PRIMARY else f"<th>{escape(_title(n))}</th>" for n in found]
    rows = [
        [_name(title, meaning), *(_cell(run, f"osr/{name}/{key}", name == PRIMARY) for name in found)]
        for key, (title, meaning) in OPEN_SET.items()
        if any(f"osr/{name}/{key}" in run.numbers for name in found)
    ]
    return (
        "<h3>Unknown against known classes</h3>"
        f"<p>The shaded column is the primary detector, <code>{PRIMARY}</code> on backbone features: the one that "
        "claims are made with, chosen without looking at unknown images. Raw pixels need no learning at all: the same "
        "detector, on the images themselves.</p>" + table(["number", *head], rows)
    )


def _everything(run: Run) -> str:
    rows = [
        [f'<td class="text"><code>{escape(key)}</code></td>', f"<td>{escape(str(value))}</td>"]
        for key, value in run.numbers.items()
        if not isinstance(value, dict)
    ]
    return f"<details><summary>All of metrics.json</summary>{table(['key', 'value'], rows)}</details>"


def _title(name: str) -> str:
    return "raw pixels" if name == "pixels" else name


def _name(title: str, meaning: str) -> str:
    return f'<th><div class="meaning">{escape(title)}<small>{escape(meaning)}</small></div></th>'


def _cell(run: Run, key: str | None, primary: bool = False) -> str:
    shade = ' class="primary"' if primary else ""
    if key not in run.numbers:
        return f"<td{shade}>–</td>"
    low, high = run.numbers.get(f"{key}_low"), run.numbers.get(f"{key}_high")
    spread = f"<small>{percent(low)} to {percent(high)}</small>" if low is not None and high is not None else ""
    value = run.numbers[key]
    return f'<td{shade} data-key="{escape(key)}" data-value="{value!r}">{percent(value)}{spread}</td>'
