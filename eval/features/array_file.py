"""Arrays in a safetensors file, written and read block by block through a memory map, whatever their size."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradmix.ssl.runs.files import write_atomically

DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
Arrays = dict[str, np.memmap]


def write_arrays(
    path: Path,
    shapes: dict[str, tuple[str, tuple[int, ...]]],
    fill: Callable[[Arrays], None],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a file without ever holding it in memory; it appears whole or not at all.

    Args:
        shapes: name to (key of ``DTYPES``, shape); names of 8-byte types first, so that all stay aligned.
        fill: is given the arrays, by name, to write into.
        metadata: stands in the file's header.

    Raises:
        OSError: it can't be written.
    """
    header: dict[str, dict] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (kind, shape) in shapes.items():
        start, end = end, end + DTYPES[kind].itemsize * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            _reserve(file.fileno(), 8 + len(text) + end)
        arrays = map_arrays(temporary, "r+")[1]
        fill(arrays)
        for array in arrays.values():
            array.flush()

    write_atomically(path, write)


def map_arrays(path: Path, mode: str = "c") -> tuple[dict[str, str], Arrays]:
    """A file's metadata and arrays, mapped in a mode of ``np.memmap``: writing to "c" does not reach the file.

    Raises:
        OSError, ValueError, KeyError, TypeError: missing or damaged.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path}: damaged")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    arrays = {
        name: np.memmap(
            path, DTYPES[entry["dtype"]], mode, 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
        )
        for name, entry in header.items()
    }
    return metadata, arrays


def _reserve(descriptor: int, size: int) -> None:
    """Room for ``size`` bytes: where a file only claims them, writing to its map dies of SIGBUS on a full disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
