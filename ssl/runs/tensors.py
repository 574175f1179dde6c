"""Weights files, opened without reading a weight."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gradmix.ssl.runs.documents import parse_json


@contextmanager
def opened_tensors(path: Path) -> Iterator[safe_open]:
    """A safetensors file, to read from.

    Raises:
        ValueError: missing, no regular file, or damaged, also when what is read turns out to be.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing, or no regular file")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


@dataclass
class WeightsHeader:
    """A weights file without its weights.

    Attributes:
        gradmix: JSON, a :class:`Header`; None in a file of someone else's.
        classes: of the training images, None where it doesn't say.
        shapes: of the tensors by name.
    """

    gradmix: str | None
    classes: list[str] | None
    shapes: dict[str, list[int]]


def read_header(path: Path) -> WeightsHeader:
    """
    Raises:
        ValueError: missing, damaged, or the header makes no sense.
    """
    with opened_tensors(path) as file:
        metadata = file.metadata() or {}
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    classes = parse_json(metadata.get("classes", "null"), list[str] | None, f"{path}: classes")
    return WeightsHeader(metadata.get("gradmix"), classes, shapes)
