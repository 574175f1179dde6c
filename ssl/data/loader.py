"""Training batches as a function of (seed, epoch, step): any number of workers, resumable between any two steps."""

import signal
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from gradmix.ssl.data.images import ImageSet, decode
from gradmix.ssl.data.scan import refusal
from gradmix.ssl.data.views import Crops
from gradmix.ssl.machine import decoders
from gradmix.ssl.runs.signals import SIGNALS

VIEWS = 0xC809  # what is drawn for views has nothing to do with what else is drawn for the same place


class Batch(NamedTuple):
    """What a training step is given."""

    images: Tensor  # uint8 [b, 3, S, S]: whole images; or [b, V, 3, S, S]: V views of each, cut already
    labels: Tensor  # int64 [b]
    index: Tensor  # type: ignore[assignment]  # int64 [b], rows of the training set; a tuple's own `index` is not used
    epoch: int
    step: int  # within the epoch
    bad: tuple[str, ...] = ()  # why files of this process's share can't be read; another image stands in for each


class TrainLoader:
    """Shuffled epochs of a training set in one sequence, without each epoch's incomplete last batch.

    The order of an epoch depends on the seed and the epoch alone; each of ``world_size`` processes takes its
    slice of every batch. There is no state: a resumed run starts at the step it has reached.

    Args:
        data: images in memory are indexed (on ``device``, when it is a GPU); others are decoded by workers.
        batch_size: over all processes; must be a multiple of ``world_size``.
        epochs: how often every image is seen.
        start: steps, over all epochs, that are done already.
        workers: processes that decode; None: what the machine has, shared among ``world_size`` processes.
        crops: how views are cut from photographs (``data.photographs``); None: whole images are made of them too.
        on_bad_image: a file that can't be read when its turn comes: ``error`` raises; ``skip`` says so, and lets the
            next image of its label stand in for it, with any number of workers the same; ``tell`` does that in
            silence: whoever takes the batch looks at ``bad``.

    Raises:
        ValueError: fewer images than a batch, or a batch that does not divide among the processes; a file that can't
            be read.
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
        workers: int | None = None,
        crops: Crops | None = None,
        on_bad_image: str = "error",
    ):
        check_batch_size(batch_size, len(data), world_size)
        self.data, self.seed, self.epochs, self.start = data, seed, epochs, start
        self.workers, self.on_bad_image = decoders(workers, world_size), on_bad_image
        self.told: set[str] = set()
        self.crops = crops if data.photographs else None
        self.rank, self.batch_size, self.share = rank, batch_size, batch_size // world_size
        self.steps_per_epoch = len(data) // batch_size
        self.images = None if data.images is None else data.images.to(device)
        self.labels = data.labels.to(device)

    def __len__(self) -> int:
        """Steps still to do, over all epochs."""
        return self.epochs * self.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[Batch]:
        if self.images is None:
            yield from self._stream()
            return
        for epoch, step, rows in self._places():
            index = torch.from_numpy(rows).to(self.images.device, non_blocking=True)
            yield Batch(self.images[index], self.labels[index], index, epoch, step)

    def _stream(self) -> Iterator[Batch]:
        """One set of workers for all epochs: they decode ahead across their ends."""
        stream, pin = Stream(self.data, self.seed, self.crops), torch.cuda.is_available()
        for batch in DataLoader(
            stream,
            batch_size=None,
            sampler=self._places(),
            num_workers=self.workers,
            pin_memory=pin,
            worker_init_fn=outlive_signals,
        ):
            if isinstance(batch, str):
                raise ValueError(batch)
            batch = batch._replace(bad=tuple(batch.bad))  # DataLoader makes a list of it
            if batch.bad and self.on_bad_image == "error":
                raise ValueError(refusal(batch.bad, " (data.scan=true looks at all files first)"))
            if self.on_bad_image == "skip":
                for reason in set(batch.bad) - self.told:
                    print(f"{reason}; another image of its class stands in for it", file=sys.stderr)
                self.told |= set(batch.bad)
                batch = batch._replace(bad=())
            yield batch

    def _places(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Epoch, step and this process's rows of the training set, batch after batch."""
        first_epoch, first_step = divmod(self.start, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
            for step in range(first_step if epoch == first_epoch else 0, self.steps_per_epoch):
                first = step * self.batch_size + self.rank * self.share
                yield epoch, step, order[first : first + self.share]


def outlive_signals(worker: int) -> None:
    """In a worker. Schedulers send signals to all processes of a job: the main one saves first, with its workers alive,
    and they end with it. A worker of torch's would die of SIGTERM, and take the main process with it.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stream(Dataset["Batch | str"]):
    """What a worker makes of a place in the training: a :class:`Batch`. It keeps nothing from one to the next.

    Args:
        crops: views are cut by it, with random numbers from (seed, epoch, step, row); None: whole images.
    """

    def __init__(self, data: ImageSet, seed: int, crops: Crops | None):
        self.data, self.seed, self.crops = data, seed, crops

    def __getitem__(self, place: tuple[int, int, np.ndarray]) -> Batch | str:
        """A string is an error: raised here, it would arrive with the worker's traceback."""
        epoch, step, rows = place
        bad: dict[str, str] = {}
        try:
            images = default_collate([self._image(epoch, step, int(row), bad) for row in rows])  # into shared memory
        except ValueError as error:
            return str(error)
        index = torch.from_numpy(rows)
        return Batch(images, self.data.labels[index], index, epoch, step, tuple(bad.values()))

    def _image(self, epoch: int, step: int, row: int, bad: dict[str, str]) -> Tensor:
        for candidate in self._candidates(row):
            path = self.data.paths[candidate]
            try:
                if self.crops is None:
                    return decode(path, self.data.size, self.data.fit)
                return self.crops.of(path, self.data.size, np.random.default_rng([self.seed, epoch, step, row, VIEWS]))
            except ValueError as error:
                bad[path] = str(error)
        tried = int((self.data.labels == self.data.labels[row]).sum())
        raise ValueError(f"data.root: none of the {tried} training images of a class can be read; {bad[path]}")

    def _candidates(self, row: int) -> Iterator[int]:
        """The row; then, only if that can't be read, those that may stand in for it."""
        yield row
        alike = (self.data.labels == self.data.labels[row]).nonzero()[:, 0]
        behind = int((alike > row).nonzero()[0]) if alike[-1] > row else len(alike)
        yield from (other for other in alike.roll(-behind).tolist() if other != row)


def check_batch_size(batch_size: int, images: int, world_size: int = 1, mixes: bool = False) -> None:
    """
    Args:
        mixes: whether images are mixed, each with another one of its process.

    Raises:
        ValueError: fewer images than a batch, or a batch that does not divide among the processes.
    """
    if batch_size < 2 or batch_size % world_size:
        raise ValueError(
            f"batch_size: expected at least 2 and a multiple of the {world_size} processes, got {batch_size}"
        )
    if mixes and batch_size < 2 * world_size:
        raise ValueError(
            f"batch_size: {batch_size} is one image for each of {world_size} processes, and mixing takes two; try "
            f"batch_size={2 * world_size}, or mix=none"
        )
    if images < batch_size:
        raise ValueError(
            f"batch_size: {batch_size} is larger than the training set of {images} images; "
            f"try batch_size={max(2, images // 4)}"
        )


def seed_of(*place: int) -> int:
    """A 63-bit seed for a place such as (seed, epoch, step, rank), unrelated to those of its neighbours.

    Zeros at the end are as none: what is drawn for another use of a place ends in a number of its own.
    """
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) >> 1
