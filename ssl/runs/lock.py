"""One process at a time in a run's folder."""

import errno
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from gradmix.ssl.processes import is_first

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PATIENCE = 10.0  # seconds: the loader workers of a killed run live on for about five


@contextmanager
def alone_in(folder: Path, key: str = "run_dir") -> Iterator[None]:
    """Keep other processes from writing a run there meanwhile; a folder that stays empty is removed again.

    The kernel holds the lock, on the folder itself: nothing of it is left when a process dies. Where the file system
    has no such locks, or the system is Windows, nobody is kept out.

    Args:
        key: the setting that names the folder, for messages.

    Raises:
        ValueError: another process is at work there, or the folder can't be made.
    """
    if not is_first():  # the first process of a distributed run has it for all
        yield
        return
    descriptor = _locked(folder, key)
    try:
        yield
    finally:
        with suppress(OSError):  # before the lock is given back: then it may be somebody else's
            folder.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _locked(folder: Path, key: str) -> int | None:
    """The folder, made, open and locked; None where there are no locks."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{key}: {folder}: can't be made ({error.strerror})") from error
        if not fcntl:
            return None
        with suppress(FileNotFoundError):  # whoever was there before has just removed it
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                lock(descriptor, folder)
                if is_still_at(folder, descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def is_still_at(path: Path, descriptor: int) -> bool:
    """Whether what is open is what lies at the path."""
    return path.exists() and os.path.samestat(os.stat(path), os.fstat(descriptor))


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """One process after the other, of a job or of several; nobody waits where nothing can be written."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "a"))  # to write: without, network file systems lock none
            lock(file.fileno(), folder, math.inf)
        yield


def lock(descriptor: int, path: Path, patience: float | None = None) -> None:
    """Keep other processes from locking the open file or folder ``path`` until it is closed; see :func:`alone_in`.

    Args:
        patience: seconds to wait for another process that has it; None: ``PATIENCE``.

    Raises:
        ValueError: another process has it.
    """
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    while fcntl:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # no locks there, as on some network file systems
            if time.monotonic() > deadline:
                raise ValueError(f"{path}: another process is writing there; wait for it, or stop it") from error
        time.sleep(0.1)
