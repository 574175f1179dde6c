"""Where a command writes: never over what it reads, nor into a folder that it reads, and only where it can."""

import os
from collections.abc import Iterable
from pathlib import Path


def check_output(key: str, out: Path, files: Iterable[str | Path] = (), folders: Iterable[str | Path] = ()) -> None:
    """
    Args:
        key: the setting that names ``out``, for messages.
        out: a file or folder that is to be written; links are followed.
        files, folders: what is read; what isn't there is passed over.

    Raises:
        ValueError: ``out`` is one of the files, under whatever name, or is one of the folders or lies in it.
    """
    real = Path(os.path.realpath(out))
    above = {_identity(path) for path in (real, *real.parents)} - {None}
    for folder in folders:
        if _identity(folder) in above:
            raise ValueError(f"{key}: {out} lies in {folder}, which is read; write it elsewhere")
    ours = _identity(real)
    if ours is not None and any(_identity(file) == ours for file in files):
        raise ValueError(f"{key}: {out} is one of the files that are read; write it elsewhere")


def check_writable(key: str, folder: Path, files: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
    """See, before the work, that its results can be put in place: what is written last would fail last.

    Args:
        key: the setting that names ``folder``, for messages.
        folder: where they will be; what isn't there is made later.
        files, folders: their names in it.

    Raises:
        ValueError: something is no folder or no file where one is to be, or nothing may be written there.
    """
    folder = folder.absolute()
    above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    for path in (above, *(folder / name for name in folders)):
        if not os.path.lexists(path):
            continue
        if not path.is_dir():
            raise ValueError(f"{key}: {path} is no folder; remove it, or write elsewhere")
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(f"{key}: {path}: no permission to write there")
    for name in files:
        if (folder / name).is_dir():
            raise ValueError(
                f"{key}: {folder / name} is a folder, where a file is to be; remove it, or write elsewhere"
            )


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_dev, state.st_ino
