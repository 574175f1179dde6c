"""A fitted detector on disk: JSON and safetensors, each file under its hash. Nothing is unpickled.

    detector.json          format, detector, parameters, threshold, versions; size and SHA-256 of each other
                           file, and the SHA-256 of this manifest's own content
    detector.safetensors   the fitted arrays
    detector.faiss         the search index, only where search is not exact

Written streaming and read back memory-mapped if asked, so that a bank larger than memory can be saved and
used.
The hashes find damage, not malice: who can write the folder can write the hashes too.
"""

import json
import platform
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from gradmix.eval.features.array_file import DTYPES, Arrays, map_arrays, write_arrays
from gradmix.eval.features.arrays import blocks
from gradmix.ssl.runs.files import hash_file, hash_json, write_atomically, write_text

FORMAT = 1
MANIFEST, TENSORS, INDEX = "detector.json", "detector.safetensors", "detector.faiss"


def write(
    folder: str | Path, manifest: dict[str, Any], arrays: dict[str, Any], index: faiss.Index | None = None
) -> None:
    """Write `arrays` (name -> numpy array, or anything with shape and dtype that is sliced by rows) and
    index.

    Each file appears whole or not at all. The manifest comes last: a save that was interrupted halfway over
    an older detector leaves hashes that don't match, which `read` refuses.
    """
    folder = Path(folder)
    _write_arrays(folder / TENSORS, arrays)
    files = [TENSORS]
    if index is not None:
        write_atomically(folder / INDEX, lambda path: _write_index(path, index))
        files.append(INDEX)
    manifest = {
        "format": FORMAT,
        **manifest,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "faiss": faiss.__version__,
        },
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in files
        },
    }
    manifest["sha256"] = hash_json(manifest)
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    write_text(folder / MANIFEST, text)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest, its own hash and format checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a format that this version doesn't know.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no saved detector here")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        stated = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not a detector's manifest ({error})") from error
    if stated != hash_json(manifest):
        raise ValueError(f"{path}: damaged, its content doesn't match its hash")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def read(folder: str | Path, mmap: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray], faiss.Index | None]:
    """Manifest, arrays by name, and FAISS index or None, everything checked against the hashes.

    Args:
        mmap: leave the arrays on disk (read once for the hash, then when used).

    Raises:
        ValueError: a file is missing or doesn't match its hash; else as `read_manifest`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, stated in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, the manifest lists it")
        if path.stat().st_size != stated["bytes"] or hash_file(path) != stated["sha256"]:
            raise ValueError(f"{path}: damaged, its content doesn't match the manifest's hash")
    index = faiss.read_index(str(folder / INDEX)) if INDEX in manifest["files"] else None
    arrays = map_arrays(folder / TENSORS, "r")[1]
    return manifest, arrays if mmap else {name: np.array(array) for name, array in arrays.items()}, index


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    # widest types first keeps every array aligned, so that it can be used in the mapped file
    names = sorted(arrays, key=lambda name: -np.dtype(arrays[name].dtype).itemsize)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    shapes = {name: (codes[np.dtype(arrays[name].dtype)], arrays[name].shape) for name in names}

    def fill(mapped: Arrays) -> None:
        for name, into in mapped.items():
            for rows in blocks((len(into), max(1, int(np.prod(into.shape[1:]))))):
                into[rows] = arrays[name][rows]

    write_arrays(path, shapes, fill)


def _write_index(path: Path, index: faiss.Index) -> None:
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # what FAISS makes of a full disk
        raise OSError(str(error)) from error
