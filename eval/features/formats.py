"""Files of features: what gradmix-embed writes, block by block, whatever its size, and what is read from elsewhere.

NAME.npy           [N, F] float32; beside it NAME.csv with the columns path and label, a row for each, and where the
                   network has a head NAME.projections.npy
NAME.safetensors   features [N, F], projections [N, D]; labels [N] int64, -1 for none, which count the names in classes;
                   classes and paths: the bytes of all of them with a zero byte between two. Files from elsewhere may
                   have classes in the metadata, as JSON
NAME.parquet       columns path, label, features, projections
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradmix.eval.features.arrays import blocks, check_features
from gradmix.eval.features.embeddings import Embeddings, embeddings
from gradmix.eval.features.mapped import Arrays, map_arrays, write_arrays
from gradmix.ssl.data.listing import Files
from gradmix.ssl.runs.cells import guarded, unguarded
from gradmix.ssl.runs.documents import parse_json
from gradmix.ssl.runs.files import write_atomically

MARK = "gradmix-embed"  # in the metadata of the files that have some
HEAD = ("path", "label")


class Row(NamedTuple):
    """Of one image. The label is empty where it has none."""

    path: str
    label: str


Rows = Callable[[], Iterator[Row]]  # called anew for each pass over the images


def read_embeddings(path: Path, key: str = "features") -> Embeddings:
    """A file of features, mapped where its format allows that.

    Args:
        key: the setting that names it, for messages.

    Raises:
        ValueError: missing or damaged, or what it holds makes no sense.
    """
    if not path.is_file():
        raise ValueError(f"{key}: {path}: no such file")
    if path.suffix not in FORMATS:
        raise ValueError(f"{key}: {path}: expected a file that ends in {', '.join(FORMATS)}")
    try:
        return FORMATS[path.suffix].read(path)
    except (OSError, EOFError) as error:
        raise ValueError(f"{key}: {path}: can't be read ({error})") from error
    except ValueError as error:
        raise ValueError(f"{key}: {path}: {error}") from error


def write_embeddings(out: Path, matrix: np.ndarray, widths: tuple[int, int], rows: Rows) -> None:
    """Write a file of features; it, and what is beside it, appear whole or not at all, ``out`` last.

    Args:
        matrix: features and projections side by side, ``[N, F + D]`` float32, memory-mapped ones too.
        widths: F and D.
        rows: called anew for each pass over the N rows.

    Raises:
        OSError: it can't be written.
    """
    FORMATS[out.suffix].write(out, matrix, widths, rows)


def check_format(out: Path) -> None:
    """
    Raises:
        ValueError: ``out`` ends in no format that there is, or that this Python can write.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"out: {out}: expected a name that ends in {', '.join(FORMATS)}")
    if out.suffix == ".parquet":
        parquet("out")


def is_ours(path: Path) -> bool:
    """Whether a file was written by :func:`write_embeddings`, or is one of those beside it."""
    try:
        if path.suffix == ".safetensors":
            return MARK in map_arrays(path, "r")[0]
        if path.suffix == ".parquet":
            return MARK.encode() in (parquet("out").read_schema(path).metadata or {})
        if path.suffix == ".csv":
            return path.open("rb").read(10) in (b"path,label", b"path,error")
        name = path.name.removesuffix(".npy").removesuffix(".projections")
        return path.open("rb").read(6) == b"\x93NUMPY" and is_ours(path.with_name(f"{name}.csv"))
    except (OSError, ValueError):
        return False


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


def write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file of text."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            table = csv.writer(file)
            table.writerow(head)
            table.writerows(map(guarded, row) for row in rows)

    write_atomically(path, write)


def _parts(widths: tuple[int, int]) -> dict[str, slice]:
    """Which columns are the features, and which the projections where there are some."""
    first, second = widths
    return {"features": slice(0, first)} | ({"projections": slice(first, first + second)} if second else {})


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


def _write_npy(out: Path, matrix: np.ndarray, widths: tuple[int, int], rows: Rows) -> None:
    files, columns = beside(out), _parts(widths)

    def write_columns(temporary: Path, which: slice) -> None:
        with open(temporary, "wb") as file:
            shape = len(matrix), which.stop - which.start
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for some in blocks(matrix.shape):
                file.write(np.ascontiguousarray(matrix[some, which], "<f4").tobytes())

    write_table(files["rows"], HEAD, rows())
    if "projections" in columns:
        write_atomically(files["projections"], lambda temporary: write_columns(temporary, columns["projections"]))
    else:
        files["projections"].unlink(missing_ok=True)  # of an earlier network with a head
    write_atomically(out, lambda temporary: write_columns(temporary, columns["features"]))


def _read_safetensors(path: Path) -> Embeddings:
    about, arrays = map_arrays(path, "r")
    if "features" not in arrays:
        raise ValueError("features: missing")
    paths, labels = None, arrays.get("labels")
    features, projections = check_features("features", arrays["features"]), arrays.get("projections")
    if "paths" in arrays:
        paths = Files(_split(arrays["paths"]))
    found = embeddings(features, None if labels is None else np.asarray(labels), paths, projections)
    if labels is None or not ("classes" in arrays or "classes" in about):
        return found
    if "classes" in arrays:
        classes = list(Files(_split(arrays["classes"])))
    else:
        classes = parse_json(about["classes"], list[str], "classes")
    if labels.min() < -1 or labels.max() >= len(classes):
        raise ValueError(f"labels: {labels.min()} to {labels.max()}, of {len(classes)} classes")
    return Embeddings(features, np.array(labels), classes, paths, found.projections)


def _write_safetensors(out: Path, matrix: np.ndarray, widths: tuple[int, int], rows: Rows) -> None:
    columns, count = _parts(widths), len(matrix)
    classes = sorted({row.label for row in rows()} - {""})
    names = b"\0".join(map(os.fsencode, classes))
    letters = sum(len(os.fsencode(row.path)) + 1 for row in rows()) - 1
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"labels": ("I64", (count,))}
    shapes |= {name: ("F32", (count, which.stop - which.start)) for name, which in columns.items()}
    shapes |= {"paths": ("U8", (letters,))} | ({"classes": ("U8", (len(names),))} if classes else {})

    def fill(arrays: Arrays) -> None:
        if classes:
            arrays["classes"][:] = np.frombuffer(names, np.uint8)
        number = {name: place for place, name in enumerate(classes)} | {"": -1}
        every, end = rows(), 0
        for some in blocks(matrix.shape):
            for name, which in columns.items():
                arrays[name][some] = matrix[some, which]
            here = list(islice(every, some.stop - some.start))
            arrays["labels"][some] = [number[row.label] for row in here]
            text = b"".join(os.fsencode(row.path) + b"\0" for row in here)
            text = text[: letters - end]  # no zero byte after the last
            arrays["paths"][end : end + len(text)] = np.frombuffer(text, np.uint8)
            end += len(text)

    write_arrays(out, shapes, fill, {MARK: "1"})


def _split(array: np.ndarray) -> np.ndarray:
    """Texts with a zero byte between two, ``[n]`` bytes each."""
    return np.array(array.tobytes().split(b"\0"), dtype="S")


def _read_parquet(path: Path) -> Embeddings:
    table, arrow = parquet("features").read_table(path), import_module("pyarrow")
    lists = arrow.ListArray, arrow.LargeListArray, arrow.FixedSizeListArray
    compute = import_module("pyarrow.compute")
    columns: dict[str, Any] = {}
    if "features" not in table.column_names:
        raise ValueError(f"no column features; there are {', '.join(table.column_names)[:200]}")
    for name in ("features", "projections"):
        if name in table.column_names:
            values = table.column(name).combine_chunks()
            even = isinstance(values, lists) and len(compute.list_value_length(values).unique()) == 1
            if not even or values.null_count:
                raise ValueError(f"{name}: expected a list of as many numbers in each row")
            flat = np.asarray(values.flatten().to_numpy(zero_copy_only=False))
            columns[name] = flat.reshape(len(values), -1)
    paths, labels = (table.column(name).to_pylist() if name in table.column_names else None for name in HEAD)
    if labels is not None:
        none = "" if any(isinstance(label, str) for label in labels) else -1
        labels = np.array([none if label is None else label for label in labels])
    paths = None if paths is None else Files("" if path is None else path for path in paths)
    return embeddings(columns["features"], labels, paths, columns.get("projections"))


def _write_parquet(out: Path, matrix: np.ndarray, widths: tuple[int, int], rows: Rows) -> None:
    kind, arrow = parquet("out"), import_module("pyarrow")
    columns, every = _parts(widths), rows()
    kinds = {name: arrow.list_(arrow.float32(), which.stop - which.start) for name, which in columns.items()}
    schema = arrow.schema([("path", arrow.string()), ("label", arrow.string()), *kinds.items()], metadata={MARK: "1"})

    def write(temporary: Path) -> None:
        with kind.ParquetWriter(temporary, schema) as file:
            for some in blocks(matrix.shape):
                here = list(islice(every, some.stop - some.start))
                paths = [os.fsencode(row.path).decode("utf-8", "replace") for row in here]  # Parquet's text is UTF-8
                table = [arrow.array(paths, arrow.string()), arrow.array([row.label for row in here], arrow.string())]
                for name, which in columns.items():
                    values = np.ascontiguousarray(matrix[some, which]).reshape(-1)
                    table.append(arrow.FixedSizeListArray.from_arrays(arrow.array(values), type=kinds[name]))
                file.write_table(arrow.Table.from_arrays(table, schema=schema))

    write_atomically(out, write)


class Format(NamedTuple):
    """How a kind of file is read and written."""

    read: Callable[[Path], Embeddings]
    write: Callable[[Path, np.ndarray, tuple[int, int], Rows], None]


FORMATS = {
    ".npy": Format(_read_npy, _write_npy),
    ".safetensors": Format(_read_safetensors, _write_safetensors),
    ".parquet": Format(_read_parquet, _write_parquet),
}
