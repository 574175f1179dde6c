"""Writes report.html."""

import time
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gradmix.eval.detectors import PRIMARY
from gradmix.eval.report.curves import open_set, training
from gradmix.eval.report.feature_map import POINTS, feature_map
from gradmix.eval.report.mistakes import confusion, mistakes
from gradmix.eval.report.numbers import numbers
from gradmix.eval.report.page import definitions, missing, page, percent, section, table
from gradmix.eval.report.pictures import data_uri, decode
from gradmix.eval.runs.folder import Run, command, differences, read_run
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.runs.files import write_text

PICTURES = 5  # of mixing, spread over the training
HEADLINE = {
    "knn/top1": "kNN accuracy, known classes",
    f"osr/{PRIMARY}/auroc": "AUROC, unknown against known",
    f"osr/{PRIMARY}/oscr": "OSCR",
    "osr/pixels/auroc": "AUROC of raw pixels",
}


def write_report(run_dir: Path, data: OpenSetData | None = None) -> Path:
    """Write ``run_dir/report.html`` from what is in the run's folder; what is missing there, the report names.

    Args:
        run_dir: folder of an evaluated run.
        data: the run's images, where the caller has them at hand; else they are read as config.yaml says.

    Returns:
        The file written.

    Raises:
        ValueError: no evaluated run there, or a damaged file.
    """
    run = read_run(Path(run_dir), data)
    sections = {
        "run": what_was_run(run),
        "numbers": numbers(run),
        "curves": open_set(run),
        "confusion": confusion(run),
        "map": the_map(run),
        "mistakes": mistakes(run),
        "training": training(run),
        "mixing": mixing(run),
    }
    names = {"run": "What was run", "curves": "Unknown against known", "map": "Map of the features"}
    links = "".join(f'<a href="#{key}">{names.get(key, key.capitalize())}</a>' for key in sections)
    config = run.config
    title = f"{config.data.name}, {config.method.name}, mix={config.mix.name}"
    head = f'<p class="quiet">GradMix run</p><h1>{escape(title)}</h1><nav>{links}</nav>{_headline(run)}'
    path = run.path / "report.html"
    write_text(path, page(f"{title} - GradMix", head + "".join(sections.values())))
    return path


def what_was_run(run: Run) -> str:
    config, found = run.config, run.numbers
    changed = differences(config)
    counts = {"train": "training", "held_out": "held-out", "test": "test"}
    sizes = [f"{len(run.features[name]['labels'])} {what}" for name, what in counts.items() if name in run.features]
    labels = run.features["test"]["labels"] if "test" in run.features else np.zeros(0)
    unknown = int((labels < 0).sum()) if run.classes else 0
    seconds = found.get("train/seconds")
    facts = {
        "Run": str(run.path),
        "Data": f"{config.data.name}{f', {config.data.root}' if config.data.root else ''}: {', '.join(sizes)} images"
        + (f" ({unknown} of unknown classes)" if unknown else "")
        + (f"; {found['data/bad_images']} unreadable files left out" if found.get("data/bad_images") else ""),
        "Known classes": _first(run.classes) or "none: the images have no classes",
        "Split, seed": f"{'-' if config.data.split is None else config.data.split}, {config.seed}",
        "Network": f"{config.encoder}, {config.data.image_size} x {config.data.image_size} pixels",
        "Training": f"{config.epochs} epochs, batch {config.batch_size}"
        + (f", {_duration(seconds)}" if seconds is not None else ""),
        "Speed": f"{found['train/images_per_s']:.0f} images/s" if "train/images_per_s" in found else "",
        "Resumed": f"from step {found['train/resumed_from_step']}" if found.get("train/resumed_from_step") else "",
        "Hardware": str(found.get("hardware", "")),
        "Revision": str(found.get("git/revision") or "not a git checkout"),
        "Versions": ", ".join(
            f"{k.removeprefix('version/')} {v}" for k, v in found.items() if k.startswith("version/")
        ),
        "Evaluated": time.strftime("%Y-%m-%d %H:%M", time.localtime((run.path / "metrics.json").stat().st_mtime)),
    }
    commands = {
        "The command that was typed": found.get("command"),
        "A command that makes this run again": command(config, changed),
    }
    rows = [
        [
            f"<th><code>{escape(key)}</code></th>",
            *(f'<td class="value">{escape(_show(part))}</td>' for part in (usual, value)),
        ]
        for key, usual, value in changed
        if key != "run_dir"
    ]
    head = ["key", '<th class="value">default</th>', '<th class="value">here</th>']
    return section(
        "run",
        "What was run",
        definitions(facts),
        *(f"<h3>{what}</h3><pre>{escape(text)}</pre>" for what, text in commands.items() if text),
        "<h3>Settings that are not the default</h3>",
        table(head, rows) if rows else missing("None beside the groups in the command."),
    )


def the_map(run: Run) -> str:
    title = "Map of the features"
    if "test" not in run.features:
        return section("map", title, missing("There are no saved features in this folder."))
    count = len(run.features["test"]["labels"])
    shown = f"{POINTS} of the {count} test images" if count > POINTS else f"The {count} test images"
    notes = [] if run.images else [missing(run.why_no_images)]
    text = (
        f"<p>{shown}, placed by t-SNE of their features: near points are similar to the network, distances between "
        "groups mean little. Point at one, or touch it, to see its image and where its class is; or use the arrow keys."
        "</p>"
    )
    return section("map", title, text, *notes, feature_map(run))


def mixing(run: Run) -> str:
    title = "Mixing through training"
    if not run.pictures:
        why = (
            "mix=none: nothing was mixed"
            if run.config.mix.name == "none"
            else "TensorBoard holds no pictures of mixing"
        )
        return section("mixing", title, missing(f"{why}."))
    chosen = np.unique(np.linspace(0, len(run.pictures) - 1, PICTURES).round().astype(int))
    return section(
        "mixing",
        title,
        "<p>Each column is one image of the batch: its two views, where the loss looks in the second (bright; GradMix "
        "only), the image that is mixed in, and the mix.</p>",
        *(_mixing(run, *run.pictures[index]) for index in chosen),
    )


def _mixing(run: Run, step: int, encoded: bytes) -> str:
    picture = decode(encoded)
    columns = min(8, run.config.batch_size)
    count = round((picture.height - 2) / ((picture.width - 2) / columns))  # tiles are square, 2 pixels apart
    names = {
        4: ("other view", "view", "partner", "mixed"),
        5: ("other view", "view", "attribution", "partner", "mixed"),
    }.get(count, ())
    rows = "".join(f"<span>{name}</span>" for name in names)
    epoch = step * run.config.epochs / run.numbers["train/steps"] if run.numbers.get("train/steps") else None
    text = f"step {step}" + ("" if epoch is None else f", epoch {epoch:.0f}")
    return (
        f'<figure class="mixing"><div class="rows">{rows}</div><img src="{data_uri(picture)}" alt="Mixing at {text}" '
        f'width="{picture.width}" height="{picture.height}"><figcaption>{text}</figcaption></figure>'
    )


def _headline(run: Run) -> str:
    boxes = [
        f"<div><b>{percent(run.numbers[key])}</b><span>{escape(text)}, %</span></div>"
        for key, text in HEADLINE.items()
        if key in run.numbers
    ]
    return f'<div class="headline">{"".join(boxes)}</div>' if boxes else ""


def _first(names: list[str], count: int = 25) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


def _show(value: Any) -> str:
    return ", ".join(map(_show, value)) if isinstance(value, list | tuple) else "null" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
