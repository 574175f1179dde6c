"""Features of images from anywhere: arrays, and the files that gradmix-embed writes.

NAME.npy           [N, F] float32; beside it NAME.csv with the columns path and label, a row for each, and where the
                   network has a head NAME.projections.npy
NAME.safetensors   features [N, F], projections [N, D]; labels [N] int64, -1 for none, which count the names in the
                   metadata's classes (JSON); paths, the bytes of all of them with a zero byte between two
NAME.parquet       columns path, label, features, projections
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gradmix.eval.features.array_file import map_arrays
from gradmix.eval.features.arrays import check_features, check_labels
from gradmix.ssl.data.listing import Files
from gradmix.ssl.runs.cells import unguarded
from gradmix.ssl.runs.documents import parse_json

MARK = "gradmix-embed"  # in the metadata of the files that have some
HEAD = ("path", "label")


@dataclass(frozen=True)
class Embeddings:
    """Features of images, wherever they come from.

    Attributes:
        features: ``[N, F]``.
        labels: ``[N]`` int64 that count ``classes``; -1 where an image has none.
        classes: names.
        paths: of the images, None where nobody said.
        projections: ``[N, D]``, None where there are none.
    """

    features: np.ndarray
    labels: np.ndarray
    classes: list[str]
    paths: Sequence[str] | None = None
    projections: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def names(self) -> np.ndarray:
        """The label of each as text ``[N]``, empty where there is none."""
        return np.array([*self.classes, ""])[self.labels]


def embeddings(
    features: Any,
    labels: Any = None,
    paths: Sequence[str] | None = None,
    projections: Any = None,
    name: str = "features",
) -> Embeddings:
    """Arrays of anyone's as :class:`Embeddings`.

    Args:
        features, projections: ``[N, F]`` and ``[N, D]`` numbers: arrays, tensors, memory-mapped ones too.
        labels: ``[N]``, names of classes (empty: none) or integers (negative: none), whose name is the number; or None.
        name: what they are called in messages; the labels are ``labels`` instead of ``features`` in it.

    Raises:
        ValueError: a wrong shape or type, nothing at all, or non-finite values.
    """
    features = check_features(name, features)
    count, called = len(features), name.replace("features", "labels")
    if projections is not None:
        projections = check_features(name.replace("features", "projections"), projections)
        if len(projections) != count:
            raise ValueError(f"{name.replace('features', 'projections')}: {len(projections)} rows, {name} has {count}")
    if paths is not None and len(paths) != count:
        raise ValueError(f"{name.replace('features', 'paths')}: {len(paths)}, {name} has {count} rows")
    if labels is None:
        return Embeddings(features, np.full(count, -1), [], paths, projections)
    labels = labels if hasattr(labels, "shape") else np.asarray(labels)
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "US":
        if labels.shape != (count,):
            raise ValueError(f"{called}: expected one for each of {count} features, got shape {labels.shape}")
        texts = labels if labels.dtype.kind == "U" else np.char.decode(labels, "utf-8")
        names, codes = np.unique(texts, return_inverse=True)
    else:
        numbers = np.maximum(check_labels(called, labels, count), -1)
        values, codes = np.unique(numbers, return_inverse=True)
        names = np.array(["" if value < 0 else str(value) for value in values])
    classes = [str(one) for one in names if one]
    place = np.array([classes.index(str(one)) if one else -1 for one in names])
    return Embeddings(features, place[codes], classes, paths, projections)


def read_embeddings(path: Path, key: str = "features") -> Embeddings:
    """A file of features, mapped where its format allows that.

    Args:
        key: the setting that names it, for messages.

    Raises:
        ValueError: missing or damaged, or what it holds makes no sense.
    """
    if not path.is_file():
        raise ValueError(f"{key}: {path}: no such file")
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{key}: {path}: expected a file that ends in {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except (OSError, EOFError) as error:
        raise ValueError(f"{key}: {path}: can't be read ({error})") from error
    except ValueError as error:
        raise ValueError(f"{key}: {path}: {error}") from error


def _read_npy(path: Path) -> Embeddings:
    features = np.load(path, mmap_mode="r", allow_pickle=False)
    files = beside(path)
    if not files["rows"].is_file():
        return embeddings(features)
    with open(files["rows"], encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.reader(file)
        head = next(table, [])
        if tuple(head) != HEAD:
            raise ValueError(f"{files['rows']}: expected the columns {', '.join(HEAD)}, got {', '.join(head)[:80]}")
        found = [(unguarded(row[0]), unguarded(row[1])) for row in table if len(row) == 2]
    if len(found) != len(features):
        raise ValueError(f"{len(features)} rows, {files['rows']} has {len(found)}; they don't belong together")
    projections = None
    if files["projections"].is_file():
        projections = np.load(files["projections"], mmap_mode="r", allow_pickle=False)
    return embeddings(features, np.array([label for _, label in found]), Files(p for p, _ in found), projections)


def _read_safetensors(path: Path) -> Embeddings:
    about, arrays = map_arrays(path, "r")
    if "features" not in arrays:
        raise ValueError("features: missing")
    paths, labels = None, arrays.get("labels")
    features, projections = check_features("features", arrays["features"]), arrays.get("projections")
    if "paths" in arrays:
        paths = Files(np.array(arrays["paths"].tobytes().split(b"\0"), dtype="S"))
    found = embeddings(features, None if labels is None else np.asarray(labels), paths, projections)
    if labels is None or "classes" not in about:
        return found
    classes = parse_json(about["classes"], list[str], "classes")
    if labels.min() < -1 or labels.max() >= len(classes):
        raise ValueError(f"labels: {labels.min()} to {labels.max()}, of {len(classes)} classes")
    return Embeddings(features, np.array(labels), classes, paths, found.projections)


def _read_parquet(path: Path) -> Embeddings:
    table = parquet("features").read_table(path)
    columns: dict[str, Any] = {}
    if "features" not in table.column_names:
        raise ValueError(f"no column features; there are {', '.join(table.column_names)[:200]}")
    for name in ("features", "projections"):
        if name in table.column_names:
            values = table.column(name).combine_chunks()
            flat = np.asarray(values.flatten().to_numpy(zero_copy_only=False))
            if not len(values) or values.null_count or flat.size % len(values):
                raise ValueError(f"{name}: expected a list of as many numbers in each row")
            columns[name] = flat.reshape(len(values), -1)
    labels = np.array(table.column("label").to_pylist()) if "label" in table.column_names else None
    paths = Files(table.column("path").to_pylist()) if "path" in table.column_names else None
    return embeddings(columns["features"], labels, paths, columns.get("projections"))


def beside(out: Path) -> dict[str, Path]:
    """The files that may be written beside ``out``, by what is in them."""
    kinds = {"unreadable": ".unreadable.csv"}
    if out.suffix == ".npy":
        kinds |= {"rows": ".csv", "projections": ".projections.npy"}
    return {kind: out.with_suffix(suffix) for kind, suffix in kinds.items()}


def parquet(key: str) -> Any:
    """
    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        return import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(f"{key}: .parquet needs one more package, pip install pyarrow") from error
