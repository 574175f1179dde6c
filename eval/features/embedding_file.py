"""Writing files of features, block by block, whatever their size; their formats are those of
:mod:`gradmix.eval.features.embeddings`.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gradmix.eval.features.array_file import Arrays, map_arrays, write_arrays
from gradmix.eval.features.arrays import blocks
from gradmix.eval.features.embeddings import HEAD, MARK, beside, parquet
from gradmix.ssl.runs.cells import guarded
from gradmix.ssl.runs.files import write_atomically


class Row(NamedTuple):
    """Of one image. The label is empty where it has none."""

    path: str
    label: str


def check_format(out: Path) -> None:
    """
    Raises:
        ValueError: ``out`` ends in no format that there is, or that this Python can write.
    """
    if out.suffix not in WRITERS:
        raise ValueError(f"out: {out}: expected a name that ends in {', '.join(WRITERS)}")
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


def write_embeddings(out: Path, matrix: np.ndarray, widths: tuple[int, int], rows: Callable[[], Iterator[Row]]) -> None:
    """Write a file of features; it, and what is beside it, appear whole or not at all, ``out`` last.

    Args:
        matrix: features and projections side by side, ``[N, F + D]`` float32, memory-mapped ones too.
        widths: F and D.
        rows: called anew for each pass over the N rows.

    Raises:
        OSError: it can't be written.
    """
    WRITERS[out.suffix](out, matrix, widths, rows)


def write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file of text."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            table = csv.writer(file)
            table.writerow(head)
            table.writerows(map(guarded, row) for row in rows)

    write_atomically(path, write)


def _parts(matrix: np.ndarray, widths: tuple[int, int]) -> dict[str, slice]:
    """The columns of ``matrix`` by name."""
    first, second = widths
    return {"features": slice(0, first)} | ({"projections": slice(first, first + second)} if second else {})


def _write_npy(out: Path, matrix: np.ndarray, widths: tuple[int, int], rows: Callable[[], Iterator[Row]]) -> None:
    files, columns = beside(out), _parts(matrix, widths)

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


def _write_safetensors(
    out: Path, matrix: np.ndarray, widths: tuple[int, int], rows: Callable[[], Iterator[Row]]
) -> None:
    columns, count = _parts(matrix, widths), len(matrix)
    classes = sorted({row.label for row in rows()} - {""})
    letters = sum(len(os.fsencode(row.path)) + 1 for row in rows()) - 1
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"labels": ("I64", (count,))}
    shapes |= {name: ("F32", (count, which.stop - which.start)) for name, which in columns.items()}
    shapes["paths"] = "U8", (letters,)

    def fill(arrays: Arrays) -> None:
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

    write_arrays(out, shapes, fill, {MARK: "1", "classes": json.dumps(classes)})


def _write_parquet(out: Path, matrix: np.ndarray, widths: tuple[int, int], rows: Callable[[], Iterator[Row]]) -> None:
    kind, arrow = parquet("out"), import_module("pyarrow")
    columns, every = _parts(matrix, widths), rows()
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


WRITERS = {".npy": _write_npy, ".safetensors": _write_safetensors, ".parquet": _write_parquet}
