"""``metrics.json`` and ``training.json``: flat, and each number a number."""

import os
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradmix.eval.catalogue import match
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.runs.documents import as_schema, read_document

Plain = bool | int | float | str | None
# The rest of training.json are numbers.
WORDS = {"train/precision": str, "train/teacher": str, "train/images": str, "command": str, "checkpoint": str}


@dataclass
class Evaluation:
    """With which settings of the run's an evaluation was made: it may have been told others. ``command`` is that of
    gradmix-eval, where it was one.
    """

    accept: float
    per_class: bool
    primary: str
    detectors: list[str] | None = None  # not said by earlier versions
    command: str | None = None


@dataclass
class DataUsed:
    """Which images an evaluation was of: keys of ``data``, the root as a whole path."""

    name: str
    root: str | None
    split: int | str | None
    known: list[int | str] | None


TREES: dict[str, Any] = {
    "evaluation": Evaluation,
    "data": DataUsed,
    "skipped": dict[str, str],
    "data/unknown_roots": dict[str, str],
    "detector_options": dict[str, dict[str, Plain | list[Plain]]],
}


def made_with(config: Config) -> dict[str, Any]:
    """What an evaluation says, beside its numbers, of the settings and images that it was made with."""
    told = Evaluation(config.accept, config.per_class, config.primary, list(config.detectors), eval_command())
    said: dict[str, Any] = {"evaluation": asdict(told), "data": asdict(data_used(config))}
    if config.detector_options:
        said["detector_options"] = dict(config.detector_options)
    if config.data.unknown_root is not None:
        said["data/unknown_root"] = config.data.unknown_root
    if config.data.unknown_roots:
        said["data/unknown_roots"] = dict(config.data.unknown_roots)
    return said


def data_used(config: Config) -> DataUsed:
    data = config.data
    root = None if data.root is None else os.path.abspath(os.path.expanduser(data.root))
    return DataUsed(data.name, root, data.split, data.known)


def eval_command() -> str | None:
    """The gradmix-eval command that runs here; None for another command, or a call from Python."""
    name = Path(sys.argv[0]).stem
    return shlex.join([name, *sys.argv[1:]]) if name == "gradmix-eval" else None


def as_evaluated(config: Config, numbers: dict[str, Any]) -> Config:
    """A run's config with what its evaluation, of which ``numbers`` are, was told otherwise."""
    told = {key: value for key, value in numbers.get("evaluation", {}).items() if key != "command"}
    told = {key: value for key, value in told.items() if value is not None}
    one, several = numbers.get("data/unknown_root"), numbers.get("data/unknown_roots", {})
    data = replace(config.data, unknown_root=one, unknown_roots=several)
    return replace(config, data=data, detector_options=numbers.get("detector_options", {}), **told)


def check_same_data(key: str, out: Path, config: Config) -> None:
    """
    Args:
        key: the setting that names ``out``, for messages.

    Raises:
        ValueError: ``out`` holds results of other data.
    """
    ours = asdict(data_used(config))
    for path in sorted(out.glob("metrics*.json")):
        said = read_document(path, dict[str, Any]).get("data")
        if said is None:
            continue  # an earlier version's
        theirs = asdict(as_schema(said, DataUsed, f"{path}: data"))
        different = [name for name in ours if theirs[name] != ours[name]]
        if different:
            told = "; ".join(f"data.{name} is {theirs[name]!r} there and {ours[name]!r} here" for name in different)
            raise ValueError(f"{key}: {out} holds results of other data ({told}); give another out=DIR")


def read_metrics(path: Path) -> dict[str, Any]:
    """What an evaluation found.

    Raises:
        ValueError: missing or damaged, or a number is none.
    """
    numbers = read_document(path, dict[str, Plain | dict[str, Any]])
    for key, value in numbers.items():
        schema: Any = (TREES | WORDS).get(key, Plain | dict[str, float | None])
        if key not in WORDS and (match(key) is not None or key.startswith("train/")):
            schema = dict[str, float | None] | None if key.endswith("/recall") else float
        if key == "data/unknown_root":
            schema = str | None
        as_schema(value, schema, f"{path}: {key}")
    return numbers


def check_trained_on(run_dir: Path, data: OpenSetData) -> None:
    """
    Raises:
        ValueError: the training images found now are not those that the run was trained on. Where the split is drawn,
            it has seen some of the test images then.
    """
    if read_training(run_dir / "training.json").get("train/images", data.drawn) != data.drawn:
        raise ValueError(
            f"data: not the training images that {run_dir} was trained on: files were added, removed or renamed, and "
            "it may have seen what would be its test images. Put them back as they were (data.on_bad_image=skip "
            "leaves out what can't be read), or train anew with another run_dir="
        )


def read_training(path: Path) -> dict[str, Any]:
    """What the training says of itself; nothing in it is a result.

    Raises:
        ValueError: missing or damaged, or it says something else.
    """
    said = read_document(path, dict[str, float | str | None])
    for key, value in said.items():
        if key not in WORDS and not key.startswith("train/"):
            raise ValueError(f"{path}: {key!a:.60}: a training measures no such number")
        as_schema(value, WORDS.get(key, float | None), f"{path}: {key}")
    return said
