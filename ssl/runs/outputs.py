"""Where a command writes: never over what it reads, nor into a folder that it reads."""

import os
from collections.abc import Iterable
from pathlib import Path

from gradmix.ssl.config import DataConfig


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


def folders_read(data: DataConfig) -> list[Path]:
    """The folders of images that a config names, as far as every file in them is taken for an image or a class."""
    named = [data.unknown_root, *data.unknown_roots.values()]
    folders = [Path(one).expanduser() for one in named if isinstance(one, str)]
    if data.name == "imagefolder" and data.root is not None:
        root = Path(data.root).expanduser()
        parts = [root / part for part in ("train", "test") if (root / part).is_dir()]
        folders += parts or [root]
    return folders


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_dev, state.st_ino
