"""What a mixer is: one contract, whole batches, no per-image loop, no host copy.

A batch holds two views of each of B images, view-major: view v of image i is row ``v * B + i`` of ``[2B, C, H, W]``.
A mixer gives every row a partner, the *other* view of *another* image, and says which fraction of the row's own
pixels it kept.

Nothing here should make the host wait for a GPU. Two habits keep it so: no ``torch.where`` with a Python number (it
becomes a tensor on the host, whose copy to the device waits), and sizes multiplied as numbers, not as tensors.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

PARTNER = ("random", "similar", "dissimilar")


@dataclass(frozen=True)
class Mixed:
    """A mixed batch.

    Attributes:
        images: ``[2B, C, H, W]``, dtype and memory format of the input.
        kept: ``[2B]`` float32: fraction of each row's own pixels that are still there (its share, for blends).
        partner: ``[2B]`` int64: the row that was mixed in; the row itself where none was.
        attribution: ``[2B, H, W]`` in [0, 1], or None for mixers that do not look.
        boxes: ``[2B, 4]`` int64 (top, left, bottom, right; ends exclusive), or None for mixers without boxes.
    """

    images: Tensor
    kept: Tensor
    partner: Tensor
    attribution: Tensor | None = None
    boxes: Tensor | None = None


class Mixer:
    """What all mixers share: checks, partners, and where random numbers come from. A mixer implements `_mix`.

    Args:
        partner: ``"random"``, or the most ``"similar"`` or ``"dissimilar"`` other image, measured on the
            ``projections`` given in the call.
    """

    def __init__(self, partner: str = "random"):
        self.partner = one_of("partner", partner, PARTNER)
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        loss: Tensor | None = None,
        generator: torch.Generator | None = None,
        projections: Tensor | None = None,
        attribution: Tensor | None = None,
    ) -> Mixed:
        """Mix a batch of two views.

        Args:
            images: ``[2B, C, H, W]``, floating point, view-major. Not changed.
            loss: the scalar whose gradient guides the mixing; only GradMix uses it, before ``backward()``.
            generator: source of all randomness, on the device of ``images`` (one on the CPU works too, at the
                price of a copy). Without one a private generator is used, seeded from ``torch.initial_seed()``;
                the global RNG is never touched.
            projections: ``[2B, D]``, L2-normalised; only for ``partner="similar" | "dissimilar"``.
            attribution: ``[2B, H, W]``, non-negative: maps to follow instead of the loss's; only GradMix uses them.

        A batch of one image has no partner: images come back as they are, with ``kept`` = 1.

        Raises:
            ValueError: ``images`` not of that form, or something the mixer needs is missing.
        """
        if images.ndim != 4 or images.shape[0] % 2 or not images.numel() or not images.is_floating_point():
            raise ValueError(f"images: expected float [2B, C, H, W], got {images.dtype} {tuple(images.shape)}")
        rows, device = images.shape[0], images.device
        if rows == 2:
            return Mixed(images, torch.ones(2, device=device), torch.arange(2, device=device))
        generator = generator or self._private_generator(device)
        partner = self._partners(rows, device, generator, projections)
        if attribution is None:
            attribution = self.attribute(images, loss)
        elif attribution.shape != (rows, *images.shape[2:]):
            expected = (rows, *images.shape[2:])
            raise ValueError(f"attribution: expected {expected}, got {tuple(attribution.shape)}")
        mixed = self._mix(images, partner, attribution, generator)
        if images.is_contiguous(memory_format=torch.channels_last):
            mixed = replace(mixed, images=mixed.images.contiguous(memory_format=torch.channels_last))
        return mixed

    @property
    def looks(self) -> bool:
        """Whether the mixing follows the gradient of the loss."""
        return False

    def watch(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context manager around the forward pass that is attributed; does nothing for mixers that do not look."""
        return nullcontext()

    def layers_in(self, module: nn.Module) -> list[str]:
        """Names of the submodules that :meth:`watch` looks at."""
        return []

    def attribute(self, images: Tensor, loss: Tensor | None) -> Tensor | None:
        """The maps that the mixing follows, ``[2B, H, W]``; None for mixers that do not look."""
        return None

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        """Mix checked images with the rows ``partner`` ``[2B]``; all randomness from ``generator``."""
        raise NotImplementedError

    def _private_generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(torch.initial_seed())
        return self._generators[device]

    def _partners(
        self, rows: int, device: torch.device, generator: torch.Generator, projections: Tensor | None
    ) -> Tensor:
        """For each row the row of the other view of another image, ``[2B]`` int64."""
        batch = rows // 2
        row = torch.arange(rows, device=device)
        image, other_view = row % batch, 1 - row // batch
        if self.partner == "random":
            step = torch.randint(1, batch, (rows,), generator=generator, device=generator.device)
            return other_view * batch + (image + step.to(device, non_blocking=True)) % batch
        if projections is None or projections.ndim != 2 or projections.shape[0] != rows:
            got = None if projections is None else tuple(projections.shape)
            raise ValueError(f"projections: partner={self.partner!r} needs [{rows}, D] in the call, got {got}")
        with torch.autocast(device.type, enabled=False):  # half precision would make ties
            similarity = projections.float() @ projections.float().T
        if self.partner == "dissimilar":
            similarity = -similarity
        allowed = (image[:, None] != image) & (other_view[:, None] != other_view)
        return similarity.masked_fill(~allowed, -torch.inf).argmax(1)


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """``value``, the argument ``name``; a ValueError unless it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def positive(name: str, value: float) -> float:
    """``value``, the argument ``name``; a ValueError unless it is finite and above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def share_range(name: str, value: Sequence[float]) -> tuple[float, float]:
    """``value``, the argument ``name``; a ValueError unless it is (low, high) with 0 <= low <= high <= 1."""
    if not isinstance(value, Sequence) or len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(f"{name}: expected (low, high) with 0 <= low <= high <= 1, got {value!r}")
    return float(value[0]), float(value[1])
