"""Writing files so that a crash leaves the old content or the new, never half of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, force it to disk, rename it into place.

    The temporary file is in the same folder: a rename across file systems would be a copy.

    Raises:
        OSError: it can't be written; the message names ``path``, whose old content is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors would leave it to its owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(f"{path}: can't be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_strays(folder: Path) -> None:
    """Remove what a killed process was writing; nobody else may be writing there."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, write)
