"""A file that grows batch after batch and is gone on with after a stop: ``OUT.KEY.part``, beside what it becomes."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gradmix.ssl.runs.lock import lock


@contextmanager
def opened(part: Path) -> Iterator[BinaryIO]:
    """The part, to be read and then appended to by this process alone; one that stays empty is removed again.

    Raises:
        ValueError: another process is writing it.
    """
    with open(part, "a+b") as file:
        lock(file.fileno(), part)
        if not (part.exists() and os.path.samestat(os.stat(part), os.fstat(file.fileno()))):
            raise ValueError(f"{part}: another process has just completed it")  # to write on would change its scores
        file.seek(0)
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                with suppress(OSError):  # Windows removes no open file
                    part.unlink(missing_ok=True)


def add_files(digest: Any, paths: Iterable[str]) -> None:
    """Let a hash (of hashlib) change with name, size and time of change of files; of one that is gone with its name."""
    for path in paths:
        try:
            state = os.stat(path)
            seen: tuple[str | int, ...] = path, state.st_size, state.st_mtime_ns
        except OSError:
            seen = (path,)
        digest.update(json.dumps(seen).encode())
