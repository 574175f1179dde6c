"""Tar shards in WebDataset's layout: members are read where they lie, and an index of them is made once.

Files of one image share their name up to its first dot: ``000123.jpg`` and ``000123.cls``, the number of its class.
Without ``.cls``, the folder inside the shard is the class. An image's path is ``SHARD#OFFSET+BYTES#NAME``, which
:func:`gradmix.ssl.data.reading.opened` understands, so that images are read in any order.
"""

import os
import tarfile
from pathlib import Path
from typing import IO, cast

import torch

from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.kept import kept_file, read_kept, write_kept
from gradmix.ssl.data.listing import is_hidden
from gradmix.ssl.data.reading import EXTENSIONS, stamp

HEADER = {"shards": "1"}


def list_shards(root: Path) -> list[str]:
    """The tar files in a folder, sorted."""
    return sorted(str(path) for path in root.glob("*.tar") if not is_hidden(path.name) and path.is_file())


def read_shards(root: Path, size: int) -> tuple[ImageSet, list[str]]:
    """The images of ``root/*.tar``, shard by shard, and the names of the classes that their labels count.

    Raises:
        ValueError: a damaged shard, no images, or images of which only some have a class.
    """
    shards, cache = list_shards(root), kept_file("shards", root)
    kept = read_kept(cache, HEADER)
    found = {}
    for shard in shards:
        unchanged, members = kept.get(shard, (None, None))
        state = list(stamp(shard))
        found[shard] = [state, members if unchanged == state else _members(shard)]
    if found != kept:
        write_kept(cache, HEADER, found)
    members = [member for _, members in found.values() for member in members]
    if not members:
        raise ValueError(f"data.root: no images in {root}/*.tar; expected members .jpg, .png, ...")
    given = {name for _, name in members}
    if None in given and len(given) > 1:
        without = next(path for path, name in members if name is None)
        raise ValueError(f"data.root: {without} has no class (.cls, or a folder), other images have one")
    names = sorted(given - {None}, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
    index = {name: label for label, name in enumerate(names)} | {None: -1}
    labels = torch.tensor([index[name] for _, name in members])
    return ImageSet(labels, size, files=[path for path, _ in members]), names


def _members(shard: str) -> list[tuple[str, str | None]]:
    """Path and class name of every image in a shard, in its order."""
    images, classes = [], {}
    try:
        if os.path.getsize(shard) % tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it was cut short")
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > os.path.getsize(shard):  # tarfile says nothing
                    raise tarfile.ReadError(f"it ends in the middle of {member.name}")
                folder, name = os.path.split(member.name)
                if not member.isreg() or is_hidden(name):
                    continue
                key, extension = name.partition(".")[0], os.path.splitext(name)[1].lower()
                if extension == ".cls":
                    content = cast(IO[bytes], tar.extractfile(member)).read(100)  # a regular member has one
                    classes[folder, key] = content.decode(errors="replace").strip()
                elif extension in EXTENSIONS:
                    path = f"{shard}#{member.offset_data}+{member.size}#{member.name}"
                    images.append((path, (folder, key), os.path.basename(folder) or None))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"data.root: {shard}: not a readable tar file ({error})") from error
    return [(path, classes.get(key, folder)) for path, key, folder in images]
