"""Contrastive losses on L2-normalised projections, gathered across processes, with an optional mixed term.

Every process computes the loss of its own rows against the rows of all; the mean over processes (what
DistributedDataParallel takes of the gradients) is then the loss of the concatenated batch, and its gradient.

NT-Xent is SupCon with each image as its own class, mixed and weighted too (a test holds it), but has a form of its own:
an anchor's one positive is a product of two rows, not of two matrices. Through SupCon the mixed term takes two to three
times as long (``benchmarks/loss_memory.py --supcon``: 256 to 2,048 images, forward and backward, one CPU thread), and
labels, mixed rows and weights of all processes would have to be gathered, where the clean rows are enough.

Memory grows with the batch, not with its square: beyond ``BLOCK`` rows, similarities are computed for that many
anchors at a time, and once more in the backward pass.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradmix.ssl.processes import gather, mean_over_processes, world_size

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
BLOCK = 2048  # anchors whose similarities are in memory at once; 128 MiB in fp32 against 16,384 rows


class NTXentLoss(nn.Module):
    """NT-Xent, the loss of SimCLR (arXiv 2002.05709), and the mixed term of GradMix (arXiv 2505.12803).

    Args:
        temperature: T > 0 in ``similarity / T``.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = positive_temperature(temperature)

    def forward(self, z: Tensor, positives: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """
        Args:
            z: ``[2B, D]``, L2-normalised, view-major: rows r and (r + B) mod 2B are views of one image. From two
                tensors, as other libraries' losses take them: ``torch.cat([z0, z1])``.
            positives: ``[2B, D]``, projections of the mixed images; row r belongs to row r of ``z``. With them
                the mixed term alone is returned: anchor r is drawn to the *other* view's mixed row; the
                denominator stays that of the clean rows.
            weight: ``[2B]``, the share of each mixed row that is still itself; pairs with ``positives``.

        Returns:
            Scalar: mean over the 2B anchors of this process.

        Raises:
            ValueError: shapes that do not fit.
        """
        _check(z, positives, weight)
        if z.shape[0] % 2:
            raise ValueError(f"z: expected two views per image, got {z.shape[0]} rows")
        with torch.autocast(z.device.type, enabled=False):
            z, positives, weight = full_precision(z), full_precision(positives), full_precision(weight)
            everyone, first = gather(z)
            own = first + torch.arange(len(z), device=z.device)

            def log_denominator(z: Tensor, own: Tensor) -> tuple[Tensor]:
                similarity = z @ everyone.T / self.temperature  # [rows, all rows]
                return (similarity.scatter(1, own[:, None], -torch.inf).logsumexp(1),)

            (denominator,) = in_blocks(log_denominator, z, own)
            half = len(z) // 2
            partner = (z if positives is None else positives).roll(half, 0)  # the other view's row
            loss = denominator - (z * partner).sum(1) / self.temperature
            if weight is not None:
                loss = loss * weight.roll(half, 0)
            return loss.mean()


class SupConLoss(nn.Module):
    """Supervised contrastive loss, the variant L_out (sum outside the logarithm) of arXiv 2004.11362.

    Args:
        temperature: T > 0 in ``similarity / T``.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = positive_temperature(temperature)

    def forward(
        self, z: Tensor, labels: Tensor, positives: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            z: ``[N, D]``, L2-normalised.
            labels: ``[N]`` int64, one per row of ``z``.
            positives: ``[N, D]``, projections of the mixed images. With them the mixed term alone is returned:
                an anchor is drawn to the mixed rows of its class, its own left out; the denominator stays that
                of the clean rows.
            weight: ``[N]``, the share of each mixed row that is still itself; pairs with ``positives``.

        Returns:
            Scalar: mean over the anchors that have a positive (over all processes); 0 if none has.

        Raises:
            ValueError: shapes that do not fit.
        """
        _check(z, positives, weight)
        if labels.shape != z.shape[:1]:
            raise ValueError(f"labels: expected one per row of z, [{len(z)}], got {tuple(labels.shape)}")
        if labels.is_floating_point():
            raise ValueError(f"labels: expected integers, got {labels.dtype}")
        with torch.autocast(z.device.type, enabled=False):
            z, positives, weight = full_precision(z), full_precision(positives), full_precision(weight)
            everyone, first = gather(z)
            everyones_labels, _ = gather(labels)
            everyones_positives = None if positives is None else gather(positives)[0]
            everyones_weight = None if weight is None else gather(weight)[0]
            own = first + torch.arange(len(z), device=z.device)

            def anchor_losses(z: Tensor, labels: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
                own = own[:, None]
                similarity = z @ everyone.T / self.temperature  # [rows, all rows]
                denominator = similarity.scatter(1, own, -torch.inf).logsumexp(1)
                same = (labels[:, None] == everyones_labels[None]).scatter(1, own, False)
                count = same.sum(1)
                if everyones_positives is not None:
                    similarity = z @ everyones_positives.T / self.temperature
                pair_loss = denominator[:, None] - similarity
                if everyones_weight is not None:
                    pair_loss = pair_loss * everyones_weight[None]
                return pair_loss.masked_fill(~same, 0).sum(1) / count.clamp(min=1), count > 0

            loss, has_positive = in_blocks(anchor_losses, z, labels, own)
            return loss.sum() / mean_over_processes(has_positive.sum()).clamp(min=1 / world_size())


def in_blocks(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
    """``function`` of rows, which it treats one by one; beyond ``BLOCK`` of them in blocks, recomputed when needed."""
    if len(rows[0]) <= BLOCK:
        return function(*rows)
    blocks = zip(*(tensor.split(BLOCK) for tensor in rows), strict=True)
    parts = [checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def full_precision(tensor: MaybeTensor) -> MaybeTensor:
    """Half precision cannot hold exp(1 / 0.05); float64 stays as it is."""
    return tensor.float() if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check(z: Tensor, positives: Tensor | None, weight: Tensor | None) -> None:
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"z: expected [N, D] with at least 2 rows, got {tuple(z.shape)}")
    if positives is not None and positives.shape != z.shape:
        raise ValueError(f"positives: expected the shape of z, {tuple(z.shape)}, got {tuple(positives.shape)}")
    if weight is not None and positives is None:
        raise ValueError("weight: belongs to positives, but there are none")
    if weight is not None and weight.shape != z.shape[:1]:
        raise ValueError(f"weight: expected one per row, [{len(z)}], got {tuple(weight.shape)}")


def positive_temperature(temperature: float) -> float:
    """The temperature of a loss.

    Raises:
        ValueError: not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
    return float(temperature)
