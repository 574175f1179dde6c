"""Image files through a network: decoding, network and whoever uses the features overlap, and memory stays flat."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gradmix.ssl.machine import usable_cpus

T = TypeVar("T")
R = TypeVar("R")


def looked_at(
    images: Sequence[Any],
    decode: Callable[[Any], Tensor | str],
    look: Callable[[Tensor], Tensor],
    batch_size: int,
    progress: bool = False,
) -> Iterator[tuple[list[Tensor | str], Tensor | None]]:
    """Batch after batch, in order: what became of each image, and the features of those that could be read (or None).

    While the caller is at a batch, the network is at the next one, and the files of up to three more are decoded. How
    far they get changes no bit of a feature.

    Args:
        decode: an image to ``[3, S, S]`` uint8, or to the reason why it can't be read.
        look: ``[n, 3, S, S]`` uint8 to what is wanted of them, ``[n, F]``.
    """
    hidden = None if progress else True  # None: where the output is no terminal
    decoders, network = ThreadPoolExecutor(usable_cpus()), ThreadPoolExecutor(1)

    def look_at(batch: list[Tensor | str]) -> tuple[list[Tensor | str], Tensor | None]:
        readable = [image for image in batch if isinstance(image, Tensor)]
        return batch, look(torch.stack(readable)) if readable else None

    try:
        decoded = ahead(decoders, decode, images, 2 * batch_size)
        batches = iter(lambda: list(islice(decoded, batch_size)), [])
        with tqdm(total=len(images), unit="image", disable=hidden) as bar:
            for batch, features in ahead(network, look_at, batches, 1):
                yield batch, features
                bar.update(len(batch))
    finally:
        for pool in (network, decoders):
            pool.shutdown(cancel_futures=True)


def ahead(pool: Executor, function: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """``map(function, items)`` in a pool, up to ``count`` results ahead of whoever asks for them."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
