"""Opening image files: regular files and members of tar shards, nothing that a program could wait for."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError

# Rasters only: for some of its other formats Pillow starts programs (PostScript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
NOT_READ = frozenset((".heic", ".heif", ".jxl"))  # listed like the others, so that nobody misses them without a word
EXTENSIONS = NOT_READ | {extension for extension, kind in Image.registered_extensions().items() if kind in FORMATS}
MAX_PIXELS = 89_478_485  # Pillow's limit, a quarter of a GiB as RGB: more is a decompression bomb
AT_ONCE = 2**25  # bytes of files that are read whole: Pillow reads headers in many small pieces
MEMBER = re.compile(r"(.+\.tar)#(\d+)\+(\d+)#", re.DOTALL)  # shard#offset+bytes#name: see gradmix.ssl.data.shards


def opened(path: str) -> BinaryIO:
    """A regular file, or a member of a tar shard, to read from.

    Raises:
        OSError: missing or not to be read.
        ValueError: a pipe, a socket or a device, from which reading might never end.
    """
    file, start, size = _place(path)
    if start is None and size > AT_ONCE:
        return file
    with file:
        file.seek(start or 0)
        return BytesIO(file.read(size))


def piece(path: str, start: int, count: int) -> bytes:
    """``count`` bytes of a file, or of a member of a shard, from ``start`` on; raises as :func:`opened` does."""
    file, first, size = _place(path)
    with file:
        file.seek((first or 0) + start)
        return file.read(max(0, min(count, size - start)))


def _place(path: str) -> tuple[BinaryIO, int | None, int]:
    """An open file; where in it the member of a shard begins, None of a file by itself; and how many bytes that has."""
    member = MEMBER.match(path)
    file = open(path if member is None else member[1], "rb", opener=_without_waiting)
    state = os.fstat(file.fileno())
    if not stat.S_ISREG(state.st_mode):
        file.close()
        raise ValueError("not a regular file")
    return (file, None, state.st_size) if member is None else (file, int(member[2]), int(member[3]))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # which opens a pipe without waiting for a writer


def stamp(path: str) -> tuple[int, int]:
    """Bytes and nanoseconds of the last change; they differ when the file, or the shard it is in, is another one."""
    member = MEMBER.match(path)
    state = os.stat(path if member is None else member[1])
    return (state.st_size if member is None else int(member[3])), state.st_mtime_ns


def content(path: str) -> bytes:
    """All bytes of a file, or of a member of a shard."""
    with opened(path) as file:
        return file.read()


@contextmanager
def opened_image(path: str) -> Iterator[Image.Image]:
    """An image of which only the header has been read.

    Raises:
        ValueError: missing, or no image that can be read in full, be it found here or in the block; names the file.
    """
    try:
        with opened(path) as file, Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            if image.mode == "I" and image.format == "TIFF":  # the other formats have 16 bits there
                raise ValueError(
                    "integers of 32 bits or with a sign, whose white is not known; save it with 8 or 16 bits"
                )
            yield image
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a readable image (no format known here; save it as JPEG or PNG)") from error
    except Exception as error:  # a damaged file can raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable image ({reason})") from error


def orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8: 1 is upright, as is what says nonsense; from 5 on width and height change places."""
    said: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return said if said in range(2, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after turning."""
    if image.format == "TIFF":  # Pillow turns these by itself: its size at once, the pixels and the tag with loading
        image.load()
    return image.size if orientation(image) < 5 else image.size[::-1]
