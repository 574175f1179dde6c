"""Arrays in a safetensors file, written and read block by block through a memory map, whatever their size."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from gradmix.ssl.keys import Key
from gradmix.ssl.runs.documents import as_schema, parse_json
from gradmix.ssl.runs.files import write_atomically

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}
Arrays = dict[str, np.memmap]
LARGEST_HEADER = 2**20


@dataclass
class Entry:
    """What the header says of an array."""

    dtype: Annotated[str, Key(choices=tuple(DTYPES))]
    shape: list[Annotated[int, Key(at_least=0)]]
    data_offsets: list[Annotated[int, Key(at_least=0)]]


def write_arrays(
    path: Path,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    fill: Callable[[Arrays], None],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a file without ever holding it in memory; it appears whole or not at all.

    Args:
        shapes: name to (key of ``DTYPES``, shape); names of wide types first, so that all stay aligned.
        fill: is given the arrays, by name, to write into.
        metadata: stands in the file's header.

    Raises:
        OSError: it can't be written.
    """
    header: dict[str, dict[str, Any]] = {} if metadata is None else {"__metadata__": {**metadata}}
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


def map_arrays(path: Path, mode: Literal["c", "r", "r+"] = "c") -> tuple[dict[str, str], Arrays]:
    """A file's metadata and arrays, mapped in a mode of ``np.memmap``: writing to "c" does not reach the file.

    Raises:
        OSError: missing.
        ValueError: no regular file, or damaged: the header is none, or says something else than the file holds.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: no regular file")
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if length > min(size, LARGEST_HEADER):
            raise ValueError(f"{path}: damaged")
        header = parse_json(file.read(length), dict[str, dict[str, Any]], str(path))
    metadata = as_schema(header.pop("__metadata__", {}), dict[str, str], str(path))
    entries = as_schema(header, dict[str, Entry], str(path))
    arrays, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype = DTYPES[entry.dtype]
        stop = end + dtype.itemsize * math.prod(entry.shape)
        if entry.data_offsets != [end, stop] or 8 + length + stop > size or stop == end:
            raise ValueError(f"{path}: damaged, {name!a} is not where its header says")
        arrays[name] = np.memmap(path, dtype, mode, 8 + length + end, tuple(entry.shape))
        end = stop
    return metadata, {name: arrays[name] for name in entries}


def _reserve(descriptor: int, size: int) -> None:
    """Room for ``size`` bytes: where a file only claims them, writing to its map dies of SIGBUS on a full disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
