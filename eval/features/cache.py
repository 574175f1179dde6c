"""Feature files: safetensors that are written row by row and read memory-mapped, keyed by what made them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gradmix.ssl.data.images import Constants, ImageSet
from gradmix.ssl.data.reading import stamp
from gradmix.ssl.runs.files import write_atomically

DTYPES = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
Arrays = dict[str, np.memmap]


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, by name, type, shape and bits."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Nothing inside may change a bit of the weights or of BatchNorm's statistics.

    Raises:
        RuntimeError: something did.
    """
    before = fingerprint(module)
    yield
    if fingerprint(module) != before:
        raise RuntimeError("the evaluation changed weights or BatchNorm statistics of a network that must be frozen")


def images_key(images: ImageSet, constants: Constants) -> str:
    """SHA-256 of the pixels, or where there are files of their names, sizes and times; of the labels; the transform."""
    mean, std = constants
    fit = "" if images.fit == "crop" else f" {images.fit}"
    digest = hashlib.sha256(f"{images.size} {mean} {std}{fit}".encode())
    digest.update(images.labels.numpy())
    if images.files is None:
        digest.update(images.images.numpy())
    for name in images.files or ():
        size, changed = stamp(name)
        digest.update(f"{name} {size} {changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def write_arrays(path: Path, key: str, shapes: dict[str, tuple[str, tuple[int, ...]]], fill: Callable) -> None:
    """Write a safetensors file without ever holding it in memory.

    Args:
        shapes: name to (key of ``DTYPES``, shape); names of 8-byte types first, so that all stay aligned.
        fill: is given the arrays, by name, to write into.
    """
    header: dict[str, dict] = {"__metadata__": {"key": key}}
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


def _reserve(descriptor: int, size: int) -> None:
    """Room for ``size`` bytes: where a file only claims them, writing to its map dies of SIGBUS on a full disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def read_arrays(path: Path, key: str) -> Arrays | None:
    """The arrays of a file with this key, mapped; writing to them does not reach the file. None: there is no such."""
    try:
        metadata, arrays = map_arrays(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, damaged or of another version: it is made again
    return arrays if metadata.get("key") == key else None


def map_arrays(path: Path, mode: str = "c") -> tuple[dict, Arrays]:
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
