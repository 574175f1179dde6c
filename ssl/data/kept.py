"""Answers about people's files that are kept for all runs, in the user's cache folder."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradmix.ssl.runs.files import write_json


def kept_file(kind: str, root: str | Path | None) -> Path | None:
    """Where answers of a kind about ``root`` are kept: in ``XDG_CACHE_HOME``, or ``~/.cache``. None without a root or a
    home.
    """
    if root is None:
        return None
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # as in a container whose user has no name
        return None
    name = hashlib.sha256(os.path.realpath(os.path.expanduser(root)).encode(errors="surrogateescape")).hexdigest()[:24]
    return Path(cache) / "gradmix" / kind / f"{name}.json"


def read_kept(path: Path | None, header: dict[str, str]) -> dict[str, Any]:
    """Answers that were kept under the same header; none where the file is missing, damaged or of another version."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        return stored["answers"] if stored["header"] == header else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_kept(path: Path | None, header: dict[str, str], answers: dict[str, Any]) -> None:
    """Keep answers, where that is possible; without them everything is looked at again, which is no error."""
    if path is not None:
        with suppress(OSError):
            write_json(path, {"header": header, "answers": answers})
