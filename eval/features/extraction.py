"""Features of a frozen network: of a run's images, extracted once; of any images, batch after batch."""

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from gradmix.eval.features.cache import cached_arrays, frozen, images_key, kept_arrays, weights_key
from gradmix.eval.features.mapped import Arrays
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.machine import decoders, usable_cpus
from gradmix.ssl.networks.backbones import Backbone, load_backbone
from gradmix.ssl.networks.heads import read_head
from gradmix.ssl.processes import gather, world_size
from gradmix.ssl.runs.files import write_atomically

BATCH = 256  # images at a time
T = TypeVar("T")
R = TypeVar("R")


class Model:
    """A run's frozen backbone, and its projection head where it has one.

    Args:
        run_dir: folder with ``backbone.safetensors`` and ``head.safetensors``.

    Attributes:
        widths: of what it makes of an image, ``features`` and with a head ``projections``.
    """

    def __init__(self, run_dir: Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.backbone: Backbone = load_backbone(run_dir).to(device)
        self.widths = {"features": self.backbone.num_features}
        self.head: nn.Module | None = None
        if not (run_dir / "head.safetensors").is_file():  # a checkpoint from elsewhere
            return
        head = read_head(run_dir / "head.safetensors", self.backbone.num_features)
        self.widths["projections"] = cast(nn.Linear, head[-1]).out_features
        self.head = head.eval().requires_grad_(False).to(device)

    def features(
        self, images: ImageSet, path: Path, others: Sequence[Path] = (), workers: int | None = 0, limit: int = 2**62
    ) -> dict[str, Tensor | np.memmap]:
        """``features`` [N, F], ``projections`` [N, D] (L2-normalised; with a head) and ``labels`` [N], in order.

        They are on the CPU, mapped from the file at ``path``. It is written unless it, or one of the files ``others``,
        already is of these weights, images and labels.

        Args:
            limit: ``features`` of more bytes are an ``np.memmap``, which kNN, probe and detectors read in blocks.
        """
        parts = [self.backbone, *([] if self.head is None else [self.head])]
        key = " ".join([*map(weights_key, parts), images_key(images, self.backbone.encoder.constants)])
        for other in others:
            if cached_arrays(path, key) is None and cached_arrays(other, key) is not None:
                write_atomically(path, partial(shutil.copyfile, other))
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {"labels": ("I64", (len(images),))}
        shapes |= {name: ("F32", (len(images), width)) for name, width in self.widths.items()}
        arrays = kept_arrays(path, key, shapes, partial(self.fill, images, workers))
        result: dict[str, Tensor | np.memmap] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return result if arrays["features"].nbytes <= limit else result | {"features": arrays["features"]}

    @torch.inference_mode()
    def fill(self, images: ImageSet, workers: int | None, arrays: Arrays | None) -> None:
        """Write what :meth:`features` returns into ``arrays``.

        In a distributed run all processes must call it with the same images: they take turns, batch after batch. The
        one with ``arrays`` writes.
        """
        processes = world_size()
        if processes > 1:
            turns = torch.arange(len(images)).split(BATCH)[torch.distributed.get_rank() :: processes]
            mine = images.select(torch.cat([torch.empty(0, dtype=torch.long), *turns]))
        else:
            mine = images
        if arrays is not None:
            arrays["labels"][:] = images.labels.numpy()
        with frozen(self.backbone):
            parts = batches(self.backbone, mine, self.device, workers)
            for first in range(0, len(images), BATCH * processes):
                part = next(parts, torch.empty(0, self.backbone.num_features, device=self.device))
                everyone, _ = gather(F.pad(part, (0, 0, 0, BATCH - len(part))))
                if arrays is not None:
                    everyone = everyone[: len(images) - first]
                    rows = slice(first, first + len(everyone))
                    arrays["features"][rows] = everyone.cpu().numpy()
                    if self.head is not None:
                        arrays["projections"][rows] = F.normalize(self.head(everyone), dim=1).cpu().numpy()


def extract_together(run_dir: Path, sets: dict[str, ImageSet], device: str, workers: int | None = 0) -> None:
    """All processes of a distributed run extract features; the first writes them to ``features/NAME.safetensors``."""
    model = Model(run_dir, device)
    for name, images in sets.items():
        if torch.distributed.get_rank() == 0:
            path = run_dir / "features" / f"{name}.safetensors"
            path.unlink(missing_ok=True)  # else there might be nothing to do for it, and the others would wait
            model.features(images, path, workers=workers)
        else:
            model.fill(images, workers, None)


@torch.inference_mode()
def extract(
    backbone: Callable[[Tensor], Tensor], images: ImageSet, device: torch.device, workers: int | None = 0
) -> Tensor:
    """Features ``[N, F]`` float32 on the CPU, in the order of ``images``; see :func:`batches`."""
    return torch.cat([part.cpu() for part in batches(backbone, images, device, workers)])


def batches(
    backbone: Callable[[Tensor], Tensor], images: ImageSet, device: torch.device, workers: int | None = 0
) -> Iterator[Tensor]:
    """Features ``[n, F]`` float32 on the device, batch after batch.

    Args:
        backbone: uint8 images ``[n, 3, S, S]`` to features, in eval mode.
        workers: decoder processes for images that are still files; None: what the machine has.

    Raises:
        FloatingPointError: a feature is not finite.
    """
    if images.images is not None:
        parts: Iterable[Tensor] = images.images.split(BATCH)
    else:
        loader = DataLoader(images, batch_size=BATCH, num_workers=decoders(workers, world_size()))
        parts = (batch for batch, _, _ in loader)
    total = math.ceil(len(images) / BATCH)
    hidden = True if total < 20 else None  # None: where the output is no terminal
    for batch in tqdm(parts, desc="features", total=total, disable=hidden, leave=False):
        features = backbone(batch.to(device)).float()
        if not features.isfinite().all():
            raise FloatingPointError(
                "the network's features are not finite, though all of its weights are; a training that came to this "
                "has diverged: train again, in another run_dir=, with a lower optimizer.base_lr"
            )
        yield features


def looked_at(
    images: Sequence[Any],
    decode: Callable[[Any], Tensor | str],
    look: Callable[[Tensor], Tensor],
    batch_size: int,
    progress: bool = False,
) -> Iterator[tuple[list[Tensor | str], Tensor | None]]:
    """Batch after batch, in order: what became of each image, and the features of those that could be read (or None).

    While the caller is at a batch, the network is at the next one, and the files of up to three more are decoded, so
    memory stays flat. How far they get changes no bit of a feature.

    Args:
        decode: an image to ``[3, S, S]`` uint8, or to the reason why it can't be read.
        look: ``[n, 3, S, S]`` uint8 to what is wanted of them, ``[n, F]``.
    """
    hidden = None if progress else True  # None: where the output is no terminal
    files, network = ThreadPoolExecutor(usable_cpus()), ThreadPoolExecutor(1)

    def look_at(batch: list[Tensor | str]) -> tuple[list[Tensor | str], Tensor | None]:
        readable = [image for image in batch if isinstance(image, Tensor)]
        return batch, look(torch.stack(readable)) if readable else None

    try:
        decoded = ahead(files, decode, images, 2 * batch_size)
        in_batches = iter(lambda: list(islice(decoded, batch_size)), [])
        with tqdm(total=len(images), unit="image", disable=hidden) as bar:
            for batch, features in ahead(network, look_at, in_batches, 1):
                yield batch, features
                bar.update(len(batch))
    finally:
        for pool in (network, files):
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


def raw_pixels_bytes(images: ImageSet) -> int:
    """What :func:`raw_pixels` takes."""
    return len(images) * 3 * min(images.size, 32) ** 2 * 4


def raw_pixels(images: ImageSet, path: Path | None = None, limit: int = 2**62) -> Tensor | np.memmap:
    """The baseline that needs no learning: pixels ``[N, P]`` in [0, 1], images above 32 x 32 averaged down to that.

    Args:
        path: where to write more than ``limit`` bytes, which are then mapped from there, as features are.
    """
    shape = len(images), 3 * min(images.size, 32) ** 2
    if path is None or raw_pixels_bytes(images) <= limit:
        pixels = torch.empty(shape)
        fill_pixels(images, pixels.numpy())
        return pixels
    key = "raw pixels " + images_key(images, ((0, 0, 0), (1, 1, 1)))
    arrays = kept_arrays(path, key, {"pixels": ("F32", shape)}, lambda new: fill_pixels(images, new["pixels"]))
    return arrays["pixels"]


def fill_pixels(images: ImageSet, pixels: np.ndarray) -> None:
    """Write what :func:`raw_pixels` returns into ``pixels`` ``[N, P]``."""
    with ThreadPoolExecutor(usable_cpus()) as pool:  # Pillow decodes outside Python's lock
        for first in range(0, len(images), 1024):
            last = min(first + 1024, len(images))
            if images.images is not None:
                batch = images.images[first:last].float() / 255
            else:
                batch = torch.stack(list(pool.map(lambda i: images[i][0], range(first, last)))).float() / 255
            if batch.shape[-1] > 32:
                batch = F.interpolate(batch, size=(32, 32), mode="area")
            pixels[first:last] = batch.flatten(1)
