"""Which image files can be read: every one is decoded once, in threads; the answers are kept for all runs."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL
import torch
from tqdm.auto import tqdm

from gradmix.ssl.data.images import ImageSet, decode
from gradmix.ssl.data.kept import read_kept, write_kept
from gradmix.ssl.data.reading import stamp
from gradmix.ssl.machine import usable_cpus

BLOCK = 4096  # files handed to the threads at a time
NAMED = 20  # files that can't be read in a message


class Scan:
    """Decodes image sets, or only tries to, and leaves out what can't be read.

    Args:
        cache: file with earlier answers, valid while path, size and time of change are the same; None keeps none.

    Attributes:
        bad: why, by path, for every file that was left out.
    """

    def __init__(self, cache: Path | None = None):
        self.cache = cache
        self.bad: dict[str, str] = {}
        self.header = {"pillow": PIL.__version__}
        self.answers: dict[str, list[Any]] | None = None  # path: [bytes, nanoseconds, why it can't be read or None]

    def read(self, images: ImageSet, limit: int) -> ImageSet:
        """The images that can be read, in order; decoded if all take at most ``limit`` bytes."""
        if images.images is not None:
            return images
        if self.answers is None:
            self.answers = read_kept(self.cache, self.header)
        answers = self.answers
        shape = len(images), 3, images.size, images.size
        pixels = torch.empty(shape, dtype=torch.uint8) if images.bytes <= limit else None

        def look(index: int) -> str | None:
            path = images.paths[index]
            try:
                state = list(stamp(path))
                *unchanged, reason = answers.get(path, (None, None, None))
                known = unchanged == state
                if known and (reason is not None or pixels is None):
                    return reason
                image, reason = decode(path, images.size, images.fit), None
                if pixels is not None:
                    pixels[index] = image
            except OSError as error:  # not even its state can be read; that may pass, so it is not kept
                return f"{path}: {error.strerror}"
            except ValueError as error:
                reason = str(error)
                if getattr(error.__cause__, "errno", None) is not None:  # no right to read it: that may pass too
                    return reason
            if not known or reason is not None:
                answers[path] = [*state, reason]
                self.new_answers = True
            return reason

        with self.kept(), ThreadPoolExecutor(usable_cpus()) as pool:
            reasons: list[str | None] = []
            with tqdm(total=len(images), desc="images", unit="image", leave=False, delay=5) as bar:
                for first in range(0, len(images), BLOCK):
                    reasons += pool.map(look, range(first, min(first + BLOCK, len(images))))
                    bar.update(len(reasons) - first)
        if pixels is not None:
            images = replace(images, images=pixels)
        good = [index for index, reason in enumerate(reasons) if reason is None]
        self.bad |= {images.paths[i]: reason for i, reason in enumerate(reasons) if reason is not None}
        return images if len(good) == len(images) else images.select(torch.tensor(good, dtype=torch.long))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Writes the answers at the end, also of a scan that was interrupted, if there are new ones."""
        self.new_answers = False
        try:
            yield
        finally:
            if self.new_answers:
                write_kept(self.cache, self.header, self.answers or {})

    def refuse_bad(self) -> None:
        """
        Raises:
            ValueError: there are files that can't be read; the message names the first ``NAMED``.
        """
        if self.bad:
            raise ValueError(refusal(self.bad.values()))


def refusal(reasons: Collection[str], hint: str = "") -> str:
    """What to say of files that can't be read, by the reason of each."""
    more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
    return (
        f"data: {len(reasons)} image files can't be read; replace or remove them, or leave them out with "
        f"data.on_bad_image=skip{hint}: {'; '.join(sorted(reasons)[:NAMED])}{more}"
    )
