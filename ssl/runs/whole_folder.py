"""A folder that is replaced as a whole: at every moment the old one is there or the new one, whatever happens."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradmix.ssl.runs.files import NEW, OLD, sync
from gradmix.ssl.runs.lock import is_still_at, lock

HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def whole_folder(folder: Path, key: str = "out") -> Iterator[Path]:
    """A folder beside ``folder`` to write to, which then becomes it; what was there is removed.

    After an error, a kill or with a full disk ``folder`` is as it was; what a killed process left beside it the next
    one removes. Linux exchanges two folders in one step. Elsewhere two renames do it: a kill between them leaves the
    old folder beside, and the next process puts it back.

    Args:
        key: the setting that names the folder, for messages.

    Raises:
        ValueError: another process is at work there.
        OSError: it can't be written; the message names ``folder``.
    """
    folder = Path(os.path.realpath(folder))
    new, old = (folder.with_name(f".{folder.name}{end}") for end in (NEW, OLD))
    try:
        new.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(new, os.O_RDONLY) if os.name != "nt" else None
        try:
            if descriptor is not None:
                lock(descriptor, folder)
                if not is_still_at(new, descriptor):
                    raise ValueError(f"{key}: {folder}: another process has just written it")
            if old.exists() and not folder.exists():
                os.rename(old, folder)
            _empty(new)
            yield new
            for path in (*new.rglob("*"), new):
                if path.is_dir():
                    sync(path)
            _put(new, folder, old)
            sync(folder.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)
    except OSError as error:
        why = error.strerror or str(error).removeprefix(f"{new}{os.sep}")
        raise OSError(f"{key}: {folder}: can't be written ({why})") from error


def _put(new: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        os.rename(folder, old)
        os.rename(new, folder)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system can't."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return exchange is not None and exchange(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
