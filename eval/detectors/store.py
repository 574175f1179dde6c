"""A fitted detector on disk: JSON and safetensors, each file under its hash. Nothing is unpickled.

    detector.json          format, detector, parameters, threshold, versions; how the search index is made, only where
                           search is not exact; size and SHA-256 of the other file, and the SHA-256 of this manifest's
                           own content
    detector.safetensors   the fitted arrays

Written streaming and read back memory-mapped if asked, so that a bank larger than memory can be saved and
used.
The hashes find damage, not malice: who can write the folder can write the hashes too. So every value is looked at as
well (`gradmix.ssl.runs.documents`, `gradmix.eval.detectors.saved`).
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch

from gradmix.eval.features.arrays import blocks
from gradmix.eval.features.mapped import DTYPES, Arrays, map_arrays, write_arrays
from gradmix.eval.features.search import SavedIndex
from gradmix.ssl.keys import Key
from gradmix.ssl.runs.documents import as_schema, read_document
from gradmix.ssl.runs.files import hash_file, hash_json, write_text

FORMAT = 1
MANIFEST, TENSORS = "detector.json", "detector.safetensors"
ELDER = "detector.faiss"  # of earlier versions; FAISS can be made to open any file by what it reads


@dataclass
class Size:
    """What the manifest says of a file."""

    bytes: Annotated[int, Key(at_least=0)]
    sha256: str


@dataclass
class Manifest:
    """``detector.json``."""

    format: int
    detector: str
    parameters: dict[str, bool | int | float | str | None]
    width: Annotated[int, Key(at_least=1, at_most=2**20)]
    threshold: float | None
    versions: dict[str, str]
    files: dict[str, Size]
    index: SavedIndex | None = None
    accept: Annotated[float, Key(above=0, at_most=1)] | None = None  # with the scores of held-out images
    per_class: bool = False


def write(folder: str | Path, manifest: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Write `arrays` (name -> numpy array, or anything with shape and dtype that is sliced by rows).

    Each file appears whole or not at all. The manifest comes last: a save that was interrupted halfway over
    an older detector leaves hashes that don't match, which `read` refuses.
    """
    folder = Path(folder)
    json.dumps(manifest, allow_nan=False)  # what can't be said is found before an older detector is gone
    _write_arrays(folder / TENSORS, arrays)
    (folder / ELDER).unlink(missing_ok=True)
    manifest = {
        "format": FORMAT,
        **manifest,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "faiss": faiss.__version__,
        },
        "files": {TENSORS: {"bytes": (folder / TENSORS).stat().st_size, "sha256": hash_file(folder / TENSORS)}},
    }
    manifest["sha256"] = hash_json(manifest)
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    write_text(folder / MANIFEST, text)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest, its own hash and format checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a format that this version doesn't know.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no saved detector here")
    said = read_document(path, dict[str, Any])
    stated = said.pop("sha256", None)
    try:
        actual = hash_json(said)
    except RecursionError:
        raise ValueError(f"{path}: damaged, nested too deep") from None
    if stated != actual:
        raise ValueError(f"{path}: damaged, its content doesn't match its hash")
    if said.get("format") != FORMAT:
        raise ValueError(f"{path}: format {said.get('format')!a:.40}, this version reads {FORMAT}")
    manifest = as_schema(said, Manifest, str(path))
    if ELDER in manifest.files:
        raise ValueError(f"{path}: {ELDER} is of an earlier version and not read; gradmix-eval run=... writes it anew")
    if set(manifest.files) != {TENSORS}:
        raise ValueError(f"{path}: files: expected {TENSORS} alone, got {sorted(manifest.files)!a:.80}")
    return manifest


def read(folder: str | Path, mmap: bool = False) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Manifest and arrays by name, everything checked against the hashes.

    Args:
        mmap: leave the arrays on disk (read once for the hash, then when used).

    Raises:
        ValueError: a file is missing or doesn't match its hash; else as `read_manifest`.
    """
    folder = Path(folder)
    manifest, path = read_manifest(folder), folder / TENSORS
    stated = manifest.files[TENSORS]
    if not path.is_file():
        raise ValueError(f"{path}: missing, the manifest lists it")
    if path.stat().st_size != stated.bytes or hash_file(path) != stated.sha256:
        raise ValueError(f"{path}: damaged, its content doesn't match the manifest's hash")
    arrays = map_arrays(path, "r")[1]
    return manifest, {name: array if mmap else np.array(array) for name, array in arrays.items()}


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
