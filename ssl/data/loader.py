"""Training batches as a function of (seed, epoch, step): any number of workers, resumable between any two steps."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.machine import usable_cpus


class Batch(NamedTuple):
    images: Tensor  # uint8 [b, 3, S, S]
    labels: Tensor  # int64 [b]
    index: Tensor  # int64 [b], rows of the training set
    epoch: int
    step: int  # within the epoch


class TrainLoader:
    """Shuffled epochs of a training set in one sequence, without each epoch's incomplete last batch.

    The order of an epoch depends on the seed and the epoch alone; each of ``world_size`` processes takes its
    slice of every batch. There is no state: a resumed run starts at the step it has reached.

    Args:
        data: images in memory are indexed (on ``device``, when it is a GPU); others are decoded by workers.
        batch_size: over all processes; must be a multiple of ``world_size``.
        epochs: how often every image is seen.
        start: steps, over all epochs, that are done already.

    Raises:
        ValueError: fewer images than a batch, or a batch that does not divide among the processes.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        seed: int,
        epochs: int,
        start: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
    ):
        check_batch_size(batch_size, len(data), world_size)
        self.data, self.seed, self.epochs, self.start, self.workers = data, seed, epochs, start, workers
        self.rank, self.batch_size, self.share = rank, batch_size, batch_size // world_size
        self.steps_per_epoch = len(data) // batch_size
        self.images = None if data.images is None else data.images.to(device)
        self.labels = data.labels.to(device)

    def __len__(self) -> int:
        """Steps still to do, over all epochs."""
        return self.epochs * self.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[Batch]:
        for place, batch in enumerate(self._batches(), start=self.start):
            yield Batch(*batch, *divmod(place, self.steps_per_epoch))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.images is None:  # one loader for all epochs: its workers stay, and decode ahead across their ends
            pin = torch.cuda.is_available()
            workers = min(self.workers, usable_cpus())
            yield from DataLoader(self.data, batch_sampler=self._indices(), num_workers=workers, pin_memory=pin)
            return
        for index in self._indices():
            index = torch.from_numpy(index).to(self.images.device, non_blocking=True)
            yield self.images[index], self.labels[index], index

    def _indices(self) -> Iterator[np.ndarray]:
        """This process's rows of the training set, batch after batch."""
        first_epoch, first_step = divmod(self.start, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
            for step in range(first_step if epoch == first_epoch else 0, self.steps_per_epoch):
                first = step * self.batch_size + self.rank * self.share
                yield order[first : first + self.share]


def check_batch_size(batch_size: int, images: int, world_size: int = 1) -> None:
    """
    Raises:
        ValueError: fewer images than a batch, or a batch that does not divide among the processes.
    """
    if batch_size < 2 or batch_size % world_size:
        raise ValueError(
            f"batch_size: expected at least 2 and a multiple of the {world_size} processes, got {batch_size}"
        )
    if images < batch_size:
        raise ValueError(
            f"batch_size: {batch_size} is larger than the training set of {images} images; "
            f"try batch_size={max(2, images // 4)}"
        )


def seed_of(*place: int) -> int:
    """A 63-bit seed for a place such as (seed, epoch, step, rank): neighbours are as unrelated as any two."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) >> 1
