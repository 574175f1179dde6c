"""Folders of someone who means harm, or whose disk does: every field of every file, and the bytes of every binary.

Hashes are made right again, so that what is looked at is the content.
"""

import copy
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradmix.ssl.runs.files import hash_file, hash_json

LONG = "x" * 10_000
DEEP: list = []
for _ in range(400):
    DEEP = [DEEP]
VALUES = {
    "null": None,
    "text": "nonsense",
    "empty text": "",
    "long text": LONG,
    "path": "../../../etc/passwd",
    "interpolation": "${oc.env:GRADMIX_SECRET}",
    "escape": "\x1b[31m=1+1",
    "surrogate": "\ud800",
    "true": True,
    "zero": 0,
    "negative": -1,
    "huge": 2**62,
    "beyond": 10**40,
    "float": 0.5,
    "nan": float("nan"),
    "infinite": float("inf"),
    "list": [],
    "object": {},
    "code": {"_target_": "os.mkdir", "path": "executed"},
    "deep": DEEP,
}


class Canary:
    """Unpickled, it makes a folder ``executed`` where the command runs."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


Change = tuple[str, Callable[[Path], None]]


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where values stand in a tree; of a list the first two and the last."""
    if path:
        yield path
    if isinstance(tree, dict):
        for key in tree:
            yield from places(tree[key], (*path, key))
    if isinstance(tree, list):
        for row in sorted({0, 1, len(tree) - 1} & set(range(len(tree)))):
            yield from places(tree[row], (*path, row))


def put(tree: Any, path: tuple, value: Any) -> Any:
    """A copy of the tree with another value there; without it where the value is ``put``."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if value is put:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return tree


def broken_json(name: str, tree: dict) -> Iterator[Change]:
    def write(value: Any) -> Callable[[Path], None]:
        return lambda folder: (folder / name).write_text(json.dumps(value))  # ASCII: half a surrogate is an escape

    yield from ((f"{name}: {label}", write(value)) for label, value in VALUES.items())
    for path in places(tree):
        for label, value in {"missing": put, **VALUES}.items():
            yield f"{name}: {'.'.join(map(str, path))}: {label}", write(put(tree, path, value))
    yield f"{name}: one more field", write({**tree, "more": 1})


def broken_bytes(name: str, generator: np.random.Generator, count: int) -> Iterator[Change]:
    def change(seed: int) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            draw, path = np.random.default_rng(seed), folder / name
            content = bytearray(path.read_bytes())
            kind = draw.integers(5)
            if kind == 0:
                content = bytearray(draw.bytes(int(draw.integers(0, 2000))))
            elif kind == 1:
                content = content[: draw.integers(len(content))]
            elif kind == 2:  # in the header, where the shapes are
                for place in draw.integers(min(400, len(content)), size=4):
                    content[place] = draw.integers(256)
            elif kind == 3:
                content += draw.bytes(100)
            else:
                place = int(draw.integers(len(content)))
                content[place : place + 64] = draw.bytes(64)
            path.write_bytes(content)

        return write

    yield from ((f"{name}: bytes {seed}", change(int(seed))) for seed in generator.integers(2**31, size=count))
    yield f"{name}: a pickle", lambda folder: (folder / name).write_bytes(pickle.dumps(Canary()))
    yield f"{name}: a torch file", lambda folder: torch.save({"module": Canary()}, folder / name)
    yield f"{name}: missing", lambda folder: (folder / name).unlink()
    yield f"{name}: pipe", lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))
    yield f"{name}: folder", lambda folder: ((folder / name).unlink(), (folder / name).mkdir())
    yield f"{name}: device", lambda folder: ((folder / name).unlink(), (folder / name).symlink_to("/dev/zero"))


def seal(detector: Path) -> None:
    """Make the hashes of a detector's folder right again, as far as the manifests still have a place for them."""
    inner = detector / "detector.json"
    for path, names in ((inner, ("detector.safetensors",)), (detector / "scorer.json", None)):
        try:
            said = json.loads(path.read_text())
            said.pop("sha256", None)
            for name in names or list(said["files"]):
                if name not in said["files"] or not (detector / name).is_file():
                    continue
                if names:
                    size = (detector / name).stat().st_size
                    said["files"][name] = {"bytes": size, "sha256": hash_file(detector / name)}
                else:
                    said["files"][name] = hash_file(detector / name)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        try:
            path.write_text(json.dumps({**said, "sha256": hash_json(said)}))
        except (OSError, TypeError, NameError, ValueError, RecursionError):
            pass


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def digest(folder: Path) -> dict[str, str]:
    """Everything in a folder, by name: regular files hashed, of the rest only that it is there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file() and not path.is_symlink()
        else ""
        for path in sorted(folder.rglob("*"))
    }
