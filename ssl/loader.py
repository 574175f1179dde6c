"""Training batches as a function of (seed, epoch, step): any number of workers, resumable between any two steps."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gradmix.ssl.images import ImageSet


class Batch(NamedTuple):
    images: Tensor  # uint8 [b, 3, S, S]
    labels: Tensor  # int64 [b]
    index: Tensor  # int64 [b], rows of the training set
    epoch: int
    step: int  # within the epoch


class TrainLoader:
    """Shuffled epochs of a training set, without the incomplete last batch.

    The order of an epoch depends on the seed and the epoch alone; each of ``world_size`` processes takes its
    slice of every batch. ``state_dict`` holds the position (Lightning puts it into the checkpoint).

    Args:
        data: images in memory are indexed (on ``device``, when it is a GPU); others are decoded by workers.
        batch_size: over all processes; must be a multiple of ``world_size``.

    Raises:
        ValueError: fewer images than a batch, or a batch that does not divide among the processes.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
    ):
        if batch_size < 2 or batch_size % world_size:
            raise ValueError(
                f"batch_size: expected at least 2 and a multiple of the {world_size} processes, got {batch_size}"
            )
        if len(data) < batch_size:
            raise ValueError(f"batch_size: {batch_size} is larger than the training set, {len(data)} images")
        self.data, self.seed, self.rank, self.workers = data, seed, rank, workers
        self.batch_size, self.share = batch_size, batch_size // world_size
        self.images = None if data.images is None else data.images.to(device)
        self.labels = data.labels.to(device) if self.images is not None else data.labels
        self.epoch = self.step = 0

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch."""
        epoch, first = self.epoch, self.step
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
        order = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        mine = torch.from_numpy(order[first:, self.rank * self.share : (self.rank + 1) * self.share].copy())
        for step, (images, labels, index) in enumerate(self._batches(mine), start=first):
            # Advance before handing out: once a batch is out, the position is behind it.
            self.epoch, self.step = (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)
            yield Batch(images, labels, index, epoch, step)

    def _batches(self, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.images is None:
            yield from DataLoader(
                self.data,
                batch_sampler=indices.tolist(),
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
            )
            return
        for index in indices.to(self.images.device):
            yield self.images[index], self.labels[index], index


def seed_of(*place: int) -> int:
    """A 63-bit seed for a place such as (seed, epoch, step, rank): neighbours are as unrelated as any two."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)
