"""Lists of image files: found in folders, and kept small, so that a million of them are no burden."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from gradmix.ssl.data.reading import EXTENSIONS

# Folders that systems put beside people's own.
NO_CLASSES = frozenset(
    ("__MACOSX", "lost+found", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information")
)


class Files(Sequence[str]):
    """Paths, about as many bytes as they have letters; a list of a million strings would be copied into every worker.

    Args:
        paths: strings, or an array of bytes as :attr:`array` is.
    """

    def __init__(self, paths: Iterable[str] | np.ndarray = ()):
        self.array = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(p) for p in paths], dtype="S")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # one path at a time
        return os.fsdecode(bytes(self.array[index]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # what can be compared like this is no key

    def select(self, indices: Tensor) -> "Files":
        """The paths at ``indices`` (int64), in that order."""
        return Files(self.array[indices.numpy()])

    def __add__(self, other: "Files") -> "Files":
        return Files(np.concatenate([self.array, other.array]))


def list_images(folder: str | Path) -> list[str]:
    """Image files in ``folder`` and below, by extension, sorted; hidden names are left out.

    Links are followed. One that leads nowhere is listed, and can't be read, so that nobody misses it without a word.

    Raises:
        ValueError: a folder can't be read.
    """
    found: list[str] = []
    _list(os.fspath(folder), found, ())
    return sorted(found)


def _list(folder: str, found: list[str], above: tuple[tuple[int, int], ...]) -> None:
    try:
        state = os.stat(folder)
        here = state.st_dev, state.st_ino
        if here in above:  # a link to a folder that it lies in
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if is_image(entry):
                    found.append(entry.path)
                elif _is_folder(entry):
                    _list(entry.path, found, (*above, here))
    except OSError as error:
        raise ValueError(f"{folder}: this folder can't be read ({error.strerror})") from error


def is_image(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a file, or a link to none, that is called as an image is."""
    if os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    except OSError:  # a link to itself
        return True


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_folders(root: Path) -> list[str]:
    """Names of the folders, or links to folders, in ``root`` that may be classes, sorted."""
    return sorted(path.name for path in root.iterdir() if not is_hidden(path.name) and path.is_dir())


def is_hidden(name: str) -> bool:
    """Whether a name is passed over: it begins with a dot, or systems put it there."""
    return name.startswith(".") or name in NO_CLASSES
