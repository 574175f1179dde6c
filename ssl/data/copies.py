"""Image files that are the same, byte for byte: found without reading most of them, and what to say of them."""

import hashlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.listing import Files
from gradmix.ssl.data.reading import content, piece, stamp
from gradmix.ssl.machine import usable_cpus

BLOCK = 256  # files handed to a thread at a time
PIECE = 1024  # bytes from the middle, where pixels are; a camera's files begin and end alike


def first_copies(*sets: ImageSet) -> Tensor | None:
    """For each image of the sets, one behind the other, the index of the first one that has the same bytes as a file.

    A file is opened only if another has its size, and read in full only if another has its middle too. One that is
    empty or can't be read is nobody's copy.

    Returns:
        ``[N]`` int64; an image that has none before it has its own index. None where the images never were files.
    """
    if any(images.files is None for images in sets):
        return None
    files = sum((images.paths for images in sets), Files())

    def bytes_of(path: str) -> int:
        return stamp(path)[0]

    def middle(path: str) -> int:
        size = bytes_of(path)
        return _hash(size.to_bytes(8, "big") + piece(path, max(0, size - PIECE) // 2, PIECE))

    first, rows = torch.arange(len(files)), np.arange(len(files))
    for look in (bytes_of, middle, lambda path: _hash(content(path))):
        rows, keys = _looked_at(look, files, rows)
        _, where, counts = np.unique(keys, return_inverse=True, return_counts=True)
        several = counts[where] > 1
        rows, keys = rows[several], keys[several]
    _, begin, where = np.unique(keys, return_index=True, return_inverse=True)
    first[torch.from_numpy(rows)] = torch.from_numpy(rows[begin][where])
    return first


def _looked_at(look: Callable[[str], int], files: Files, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose file can be looked at, and what it gives; without those that give 0."""

    def of_block(block: np.ndarray) -> list[int]:
        keys = []
        for path in map(files.__getitem__, block):
            try:
                keys.append(look(path))
            except (OSError, ValueError):
                keys.append(0)
        return keys

    with ThreadPoolExecutor(usable_cpus()) as pool:
        blocks = pool.map(of_block, np.split(rows, range(BLOCK, len(rows), BLOCK)))
        keys = np.fromiter((key for block in blocks for key in block), np.int64, len(rows))
    return rows[keys != 0], keys[keys != 0]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def count_copies(
    first: Tensor | None, train: ImageSet, test: ImageSet, bad: Collection[str] = ()
) -> tuple[dict[str, int], list[str]]:
    """The numbers of copies as ``metrics.json`` has them, and what to say of them, a line each; nothing without files.

    Args:
        first: as :func:`first_copies` has it of both sets.
        bad: files that are left out.
    """
    if first is None:
        return {}, []
    files, labels = train.paths + test.paths, torch.cat([train.labels, test.labels.clamp(min=-1)])
    rows = (first != torch.arange(len(first))).nonzero()[:, 0].tolist()
    pairs = [(row, int(first[row])) for row in rows if files[row] not in bad]
    unknown = [(row, other) for row, other in pairs if other < len(train) <= row and labels[row] < 0 <= labels[other]]
    rest = sorted({*pairs} - {*unknown})
    in_test = [(row, other) for row, other in rest if other < len(train) <= row]
    in_class = [(row, other) for row, other in rest if labels[row] != labels[other]]
    told = [
        (
            pairs if {*pairs} - {*unknown, *in_test, *in_class} else [],
            "exact copies among the image files",
            "they count more than once; a split that is drawn keeps copies together",
        ),
        (
            in_test,
            f"exact copies of training images among {len(test)} test images",
            "the numbers will look better than they are; remove them from one of the two",
        ),
        (
            unknown,
            f"exact copies of training images among {int((test.labels < 0).sum())} unknown images",
            "they are of known classes, and the numbers will look worse than they are; remove them",
        ),
        (
            in_class,
            "exact copies of an image in another class",
            "one of the two classes is wrong; remove one of each pair",
        ),
    ]
    notes = [
        f"{what}: {len(found)}, such as {_shown(files[found[0][0]])} of {_shown(files[found[0][1]])}; {so}"
        for found, what, so in told
        if found
    ]
    return {
        "data/copies": len(pairs),
        "data/test_copies": len(in_test),
        "data/unknown_copies": len(unknown),
        "data/class_copies": len(in_class),
    }, notes


def _shown(path: str) -> str:
    return path if path.isprintable() else ascii(path)
