"""One process at a time in a run's folder."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}: {folder}: can't be made ({error.strerror})") from error
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if descriptor is not None:
            lock(descriptor, folder)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()


def lock(descriptor: int, path: Path) -> None:
    """Keep other processes from locking the open file or folder ``path`` until it is closed; see :func:`alone_in`.

    Raises:
        ValueError: another process has it.
    """
    deadline = time.monotonic() + PATIENCE
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
