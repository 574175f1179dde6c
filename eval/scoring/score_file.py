"""The file of scores: batch after batch goes to disk in a part beside it, and a stopped scoring goes on from there."""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gradmix.eval.scoring.scorer import UNKNOWN_NAME, Score, Scorer
from gradmix.ssl.runs.cells import guarded
from gradmix.ssl.runs.files import put_in_place, write_atomically
from gradmix.ssl.runs.parts import add_files, opened

COLUMNS = [field.name for field in fields(Score)]


def write_scores(
    scorer: Scorer,
    paths: Sequence[str],
    out: Path,
    batch_size: int = 256,
    progress: bool = False,
    features: np.ndarray | None = None,
    files: Sequence[str] = (),
) -> tuple[int, int, int]:
    """Score image files into a CSV file, or JSON lines when ``out`` ends in ``.jsonl``.

    Every batch is forced to disk in ``OUT.KEY.part``, which becomes ``out`` when it is complete; KEY stands for
    detector, images and batch size. A part of the same key is gone on with after its last whole batch: then the bytes
    are those of a scoring that was never stopped (a feature's last digits depend on what else is in its batch).

    Args:
        features: of the images ``[N, F]``, which then need not be there; a row of them counts as its image.
        files: what the features were read from.

    Returns:
        Numbers of rows, of images called unknown, and of files that could not be read.

    Raises:
        ValueError: ``out`` is a folder, or another process is writing the same scores.
        OSError: ``out`` can't be written.
    """
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder; give a file, such as {out / 'scores.csv'}")
    part = out.with_name(f"{out.name}.{scoring_key(scorer, [*paths, *files], batch_size)}.part")
    for other in sorted(set(out.parent.glob(f"{escape(out.name)}.*.part")) - {part}):
        print(f"{other}: left alone; of another detector or other images, accept, per_class, device or batch_size")
    as_json = out.suffix == ".jsonl"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with opened(part) as file:
            counts, end = whole_batches(file, as_json, len(paths), batch_size)
            if end:
                print(f"{part}: {counts[0]} of {len(paths)} images are scored already")
            file.truncate(end)
            rest = paths[counts[0] :]
            if features is None:
                scores = scorer.score(rest, batch_size, progress)
            else:
                scores = scorer.score_features(features[counts[0] :], rest, batch_size)
            try:
                while batch := [asdict(score) for score in islice(scores, batch_size)]:
                    file.write(encode(batch, as_json, header=not counts[0]))
                    file.flush()
                    os.fsync(file.fileno())
                    counts = sum(map(count, batch), counts)
                put_in_place(part, out)
            except BaseException:  # of Ctrl-C and SIGTERM too
                if counts[0]:
                    kept = f"{counts[0]} of {len(paths)} images are scored"
                    print(f"{part}: {kept}; the same command goes on after them", file=sys.stderr)
                raise
    except OSError as error:
        raise OSError(f"{out}: can't be written ({error.strerror or error})") from error
    return tuple(counts.tolist())


def check_replaceable(out: Path) -> None:
    """
    Raises:
        ValueError: there is something at ``out`` that is no file of scores.
    """
    if not out.exists() or out.is_dir():  # a folder is spoken of where it is written to
        return
    beginnings = ",".join(COLUMNS[:4]).encode(), f'{{"{COLUMNS[0]}": '.encode()
    if out.is_file():
        with open(out, "rb") as file:
            start = file.read(max(map(len, beginnings)))
        if not start or any(start.startswith(beginning) for beginning in beginnings):
            return
    raise ValueError(f"out: {out} is there already and is no file of scores; give another name, or remove it")


def scoring_key(scorer: Scorer, paths: Sequence[str], batch_size: int) -> str:
    """Eight digits that change with detector, threshold, batch size, device and images (name, size, time of change)."""
    calibration = scorer.detector.calibration_
    asked: list[float] = [] if calibration is None else [calibration.accept, calibration.per_class]
    digest = hashlib.sha256(json.dumps([scorer.sha256, batch_size, str(scorer.device), *asked, *COLUMNS]).encode())
    add_files(digest, paths)
    return digest.hexdigest()[:8]


def whole_batches(file: BinaryIO, as_json: bool, images: int, batch_size: int) -> tuple[np.ndarray, int]:
    """What :func:`count` counts in the whole batches of a part, and the bytes that they take."""
    end, counts = 0, np.zeros(3, dtype=np.int64)
    whole = counts, end

    def lines() -> Iterator[str]:
        nonlocal end
        for line in file:
            if not line.endswith(b"\n") or b"\0" in line:  # the process was killed here, or the machine
                return
            end += len(line)
            yield line.decode("utf-8", "surrogateescape")

    with suppress(csv.Error):  # cut off inside quotes
        for row in map(json.loads, lines()) if as_json else csv.DictReader(lines(), strict=True):
            counts = counts + count(row)
            if counts[0] % batch_size == 0 or counts[0] == images:
                whole = counts, end
    return whole


def read_scores(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Scores and p-values ``[N]`` of the images that could be read, from a finished file of a calibrated detector."""
    with rows_of(out) as rows:
        found = [(float(row["score"]), float(row["p_value"])) for row in rows if not row["error"]]
    scores, p_values = np.array(found).reshape(-1, 2).T
    return scores, p_values


def add_discoveries(out: Path, limit: float) -> None:
    """Give a finished file the column ``discovery``: whether the p-value is at most ``limit``; empty for unread images.

    The file is replaced as a whole.
    """
    as_json = out.suffix == ".jsonl"

    def write(temporary: Path) -> None:
        with rows_of(out) as rows, open(temporary, "wb") as file:
            for number, row in enumerate(rows):
                p_value = row["p_value"]
                found = None if p_value in ("", None) else float(p_value) <= limit
                row["discovery"] = found if as_json else "" if found is None else str(found).lower()
                file.write(encode([row], as_json, header=not number, columns=(*COLUMNS, "discovery")))

    write_atomically(out, write)


@contextmanager
def rows_of(out: Path) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows of a finished file."""
    with open(out, encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield map(json.loads, file) if out.suffix == ".jsonl" else csv.DictReader(file)


def count(row: Mapping[str, Any]) -> np.ndarray:
    """One row; whether the image is called unknown; whether the file could not be read."""
    return np.array([1, row["prediction"] == UNKNOWN_NAME, bool(row["error"])])


def encode(rows: Sequence[Mapping[str, Any]], as_json: bool, header: bool, columns: Sequence[str] = COLUMNS) -> bytes:
    """Rows as they stand in the file."""
    text = io.StringIO(newline="")
    if as_json:
        text.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        table = csv.DictWriter(text, columns)
        if header:
            table.writeheader()
        table.writerows({name: guarded(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode("utf-8", "surrogateescape")  # a name that is no UTF-8: the bytes that it is
