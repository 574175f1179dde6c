"""``metrics.json`` and ``training.json``: flat, and each number a number."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradmix.eval.catalogue import match
from gradmix.ssl.config import Config
from gradmix.ssl.runs.documents import as_schema, read_document

Plain = bool | int | float | str | None
# The rest of training.json are numbers.
WORDS = {"train/precision": str, "train/teacher": str, "command": str, "checkpoint": str}


@dataclass
class Evaluation:
    """With which settings of the run's an evaluation was made: it may have been told others."""

    accept: float
    per_class: bool
    primary: str


TREES: dict[str, Any] = {
    "evaluation": Evaluation,
    "skipped": dict[str, str],
    "data/unknown_roots": dict[str, str],
    "detector_options": dict[str, dict[str, Plain | list[Plain]]],
}


def made_with(config: Config) -> dict[str, Any]:
    """What an evaluation says, beside its numbers, of the settings that it was made with."""
    said: dict[str, Any] = {"evaluation": asdict(Evaluation(config.accept, config.per_class, config.primary))}
    if config.detector_options:
        said["detector_options"] = dict(config.detector_options)
    if config.data.unknown_root is not None:
        said["data/unknown_root"] = config.data.unknown_root
    if config.data.unknown_roots:
        said["data/unknown_roots"] = dict(config.data.unknown_roots)
    return said


def read_metrics(path: Path) -> dict[str, Any]:
    """What an evaluation found.

    Raises:
        ValueError: missing or damaged, or a number is none.
    """
    numbers = read_document(path, dict[str, Plain | dict[str, Any]])
    for key, value in numbers.items():
        schema: Any = TREES.get(key, Plain | dict[str, float | None])
        if key not in WORDS and (match(key) is not None or key.startswith("train/")):
            schema = dict[str, float | None] | None if key.endswith("/recall") else float
        if key == "data/unknown_root":
            schema = str | None
        as_schema(value, schema, f"{path}: {key}")
    return numbers


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
