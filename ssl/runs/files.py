"""Writing files so that a crash leaves the old content or the new, never half of it."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gradmix.ssl.runs.signals import signals_wait

STRAY = ".gradmix-tmp"
NEW, OLD = ".new" + STRAY, ".old" + STRAY  # folders, while one is replaced by the other


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, force it to disk, rename it into place.

    The temporary file is in the same folder: a rename across file systems would be a copy.

    Raises:
        OSError: it can't be written; the message names ``path``, whose old content is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{STRAY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_strays_of(path)
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors would leave it to its owner alone
        put_in_place(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: can't be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # nothing there, as after success, or no folder to have been in
            temporary.unlink()


def _remove_strays_of(path: Path) -> None:
    """Remove what killed processes of this machine left while they wrote the same file."""
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*{STRAY}"):
        process = stray.name.removesuffix(STRAY).rpartition(".")[2]
        if process.isdecimal() and not _is_running(int(process)):
            with suppress(OSError):  # somebody else's, in a folder for all
                stray.unlink()


def _is_running(process: int) -> bool:
    if os.name == "nt":  # which can't be asked so
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def put_in_place(temporary: Path, path: Path) -> None:
    """Force a finished file to disk and rename it to ``path``, in the same folder."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)  # the rename itself must reach the disk too


@contextmanager
def replacing(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write to, whose entries then replace those of ``folder``; after an error nothing has changed.

    While ``folder / last`` is there, everything beside it belongs to it: it is taken away first and put back last.
    """
    new, old = folder / NEW, folder / OLD
    remove_strays(folder)
    new.mkdir(parents=True)
    try:
        yield new
        with signals_wait():
            (folder / last).unlink(missing_ok=True)
            for path in sorted(new.iterdir(), key=lambda path: path.name == last):
                if (folder / path.name).is_dir():
                    old.mkdir(exist_ok=True)
                    os.replace(folder / path.name, old / path.name)
                os.replace(path, folder / path.name)
            sync(folder)
    finally:
        remove_strays(folder)


def remove_strays(folder: Path) -> None:
    """Remove what a killed process was writing there; nobody else may be writing."""
    for name in (NEW, OLD):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (*folder.glob(f".*{STRAY}"), *folder.glob(f"*/.*{STRAY}")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Force what a folder holds, its names, to disk."""
    if os.name == "nt":  # which can't open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of the content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: dict[str, Any]) -> str:
    """SHA-256, whatever the order of the keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """A text file, UTF-8 whatever the locale; as :func:`write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """A JSON file; as :func:`write_atomically`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file; as :func:`write_atomically`.

    Args:
        tensors: on any device, by name.
        metadata: for its header.

    Raises:
        OSError: it can't be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, write)
