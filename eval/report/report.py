"""Writes report.html."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from gradmix.eval.catalogue import title
from gradmix.eval.counted import counted
from gradmix.eval.detectors import PRIMARY
from gradmix.eval.features.feature_sets import FEATURES
from gradmix.eval.report.curves import open_set, training
from gradmix.eval.report.feature_map import feature_map
from gradmix.eval.report.mistakes import confusion, mistakes
from gradmix.eval.report.numbers import numbers
from gradmix.eval.report.page import Section, page, section
from gradmix.eval.report.pictures import data_uri, decode
from gradmix.eval.runs.folder import Run, command, differences, read_run
from gradmix.eval.runs.foreign import ELSEWHERE
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.pictures import PADDING, tile_side
from gradmix.ssl.runs.files import write_text

CLASSES = 25  # that are named
PICTURES = 5  # of mixing, spread over the training
HEADLINE = (
    "knn/top1",
    "knn_pixels/top1",
    f"osr/{PRIMARY}/auroc",
    f"osr/{PRIMARY}_start/auroc",
    "osr/pixels/auroc",
    f"osr/{PRIMARY}/oscr",
)
# What may be wrong with the images, as metrics.json counts it.
TROUBLES = {
    "data/bad_images": "unreadable files, left out",
    "data/test_copies": "exact copies of training images in the test set",
    "data/unknown_copies": "exact copies of training images among the unknown images",
    "data/class_copies": "exact copies of an image in another class",
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
    draw = (what_was_run, numbers, open_set, confusion, feature_map, mistakes, training, mixing)
    config = run.config
    path = run.path / "report.html"
    write_text(
        path,
        page(
            "report.html",
            f"{config.data.name}, {config.method.name}, mix={config.mix.name}",
            headline=[(title(key), run.numbers[key]) for key in HEADLINE if key in run.numbers],
            sections=[part(run) for part in draw],
        ),
    )
    return path


def what_was_run(run: Run) -> Section:
    """The run's settings, data, hardware and versions, and the command that makes it again."""
    found = run.numbers
    config = run.config
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
        + "".join(f"; {what}: {found[key]}" for key, what in TROUBLES.items() if found.get(key)),
        "Unknown images": config.data.unknown_root
        or ", ".join(f"{name}: {root}" for name, root in config.data.unknown_roots.items()),
        "Known classes": _first(run.classes) or "none: the images have no classes",
        "Split, seed": f"{'-' if config.data.split is None else config.data.split}, {config.seed}",
        "Network": ""
        if config.data.name == FEATURES
        else f"{config.encoder}, {config.data.image_size} x {config.data.image_size} pixels",
        "Training": "elsewhere"
        if config.method.name == ELSEWHERE
        else f"{counted(config.epochs, 'epoch')}, batch {config.batch_size}"
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
        "The command that made these numbers": found.get("evaluation", {}).get("command"),
        "A command that makes this run again": command(config, changed),
    }
    shown = [(key, _show(usual), _show(value)) for key, usual, value in changed if key != "run_dir"]
    return section("run", "What was run", facts=facts, commands=commands, changed=shown)


def mixing(run: Run) -> Section:
    """Mixed images from the beginning, the middle and the end of the training."""
    name, title = "mixing", "Mixing"
    if not run.pictures:
        nothing = run.config.mix.name == "none"
        why = "mix=none: nothing was mixed." if nothing else "TensorBoard holds no pictures of mixing."
        return section(name, title, why=why)
    chosen = np.unique(np.linspace(0, len(run.pictures) - 1, PICTURES).round().astype(int))
    pictures = [_mixing(run, *run.pictures[index]) for index in chosen]
    return section(name, title, why="", pictures=pictures)


def _mixing(run: Run, step: int, encoded: bytes) -> dict[str, Any]:
    picture = decode(encoded)
    size = run.config.data.image_size  # of a stranger's run it may be missing
    count = 0 if size is None else (picture.height - PADDING) // (tile_side(size) + PADDING)
    names = {
        3: ("view", "attribution", "outlier"),
        4: ("other view", "view", "partner", "mixed"),
        5: ("other view", "view", "attribution", "partner", "mixed"),
        6: ("other view", "view", "attribution", "partner", "mixed", "outlier"),
    }.get(count, ())
    epoch = step * run.config.epochs / run.numbers["train/steps"] if run.numbers.get("train/steps") else None
    when = f"step {step}" + ("" if epoch is None else f", epoch {epoch:.0f}")
    return {"rows": names, "uri": data_uri(picture), "when": when, "width": picture.width, "height": picture.height}


def _first(names: list[str]) -> str:
    rest = len(names) - CLASSES
    return ", ".join(names[:CLASSES]) + (f" and {rest} more" if rest > 0 else "")


def _show(value: Any) -> str:
    return ", ".join(map(_show, value)) if isinstance(value, list | tuple) else "null" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
