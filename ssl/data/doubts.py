"""What looks wrong about class folders: a line each, for people to judge."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradmix.ssl.data.listing import is_hidden, is_image

NAMED = 5  # of what there may be many


def doubts_of(root: Path, found: Mapping[str, Sequence[str]]) -> list[str]:
    """
    Args:
        root: the folder of the class folders.
        found: the image files in each, by class; none where there are no classes.
    """
    if not found:
        return []
    with os.scandir(root) as entries:
        seen = [entry for entry in entries if not is_hidden(entry.name)]
        loose = sorted(entry.name for entry in seen if is_image(entry))
        lost = sorted(entry.name for entry in seen if entry.is_symlink() and not os.path.exists(entry.path))
    lines = []
    if loose:
        lines.append(f"left out: {len(loose)} images right in {root} ({_first(loose)}), in no class folder")
    lines += [f"left out: {root / name}, a link that leads nowhere" for name in lost if name not in loose]
    spellings: dict[str, list[str]] = {}
    for name in found:
        spellings.setdefault(name.casefold(), []).append(name)
    for names in spellings.values():
        if len(names) > 1:
            lines.append(f"{' and '.join(names)} are two classes; if they are one, give their folders one name")
    inner = [_folders_in(root / name, files) for name, files in found.items() if files]
    if len(inner) > 1 and len(inner[0]) > 1 and all(folders == inner[0] for folders in inner):
        lines.append(
            f"all class folders hold the same folders ({_first(sorted(inner[0]))}); the classes are the outer ones, "
            f"{_first(list(found))}. If they should be the inner ones, move them up"
        )
    return lines


def _folders_in(folder: Path, files: Sequence[str]) -> set[str]:
    """The names right below ``folder`` on the way to the files; one that is a file's own is empty."""
    skip = len(str(folder)) + 1
    return {file[skip:].partition(os.sep)[0] if os.sep in file[skip:] else "" for file in files}


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
