"""Cross-entropy to one fixed point per class on the sphere, all at right angles: SpHOR's loss without its learning."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.ssl.losses import full_precision, positive_temperature


class OrthogonalTargetLoss(nn.Module):
    """Draws every projection to its class's target, after SpHOR (arXiv 2503.08049).

    SpHOR learns one embedding per class under a penalty whose minimum is embeddings at right angles; here they are
    there from the start, so that nothing is learned beside the network. Its mixup is ``other`` and ``kept``, which
    also take the images of any other mixer, and its label smoothing is ``smoothing``.

    Args:
        classes: K, at most ``dim``.
        dim: D, of the projections.
        temperature: T > 0 in ``similarity / T``; 1 / T is the concentration of the von Mises-Fisher distributions.
        smoothing: share of each label that is spread evenly over all classes.

    Attributes:
        targets: ``[K, D]``, orthonormal; the same for the same K and D.

    Raises:
        ValueError: more classes than dimensions, or a temperature or smoothing out of range.
    """

    targets: Tensor

    def __init__(self, classes: int, dim: int, temperature: float = 0.1, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 1 <= classes <= dim:
            raise ValueError(f"classes: {classes} targets at right angles need as many dimensions, got dim={dim}")
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing: expected 0 to 1, got {smoothing!r}")
        self.temperature, self.smoothing = positive_temperature(temperature), smoothing
        drawn = torch.randn(dim, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.register_buffer("targets", torch.linalg.qr(drawn).Q.T.float().contiguous())

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        other: Tensor | None = None,
        kept: Tensor | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        """
        Args:
            z: ``[N, D]``, L2-normalised.
            labels: ``[N]`` int64 in 0..K-1.
            other: ``[N]``, for mixed images: labels of what was mixed in.
            kept: ``[N]``, with ``other``: the share of each image that is still itself.
            temperature: of this call, where it changes while training.

        Returns:
            Scalar: mean over the rows of this process.

        Raises:
            ValueError: shapes that do not fit, one of ``other`` and ``kept`` without its pair, or a temperature of 0
                or less.
        """
        check_rows(z, self.targets.shape[1], labels, other, kept)
        temperature = self.temperature if temperature is None else positive_temperature(temperature)
        with torch.autocast(z.device.type, enabled=False):
            z = full_precision(z)
            logits = self.logits(z, temperature)
            kept = z.new_ones(len(z)) if kept is None else kept.to(z.dtype)
            share = torch.zeros_like(logits).scatter_(1, labels[:, None], kept[:, None])
            if other is not None:
                share.scatter_add_(1, other[:, None], 1 - kept[:, None])
            return F.cross_entropy(logits, share, label_smoothing=self.smoothing)

    def logits(self, z: Tensor, temperature: float | None = None) -> Tensor:
        """Similarities ``[N, K]`` of L2-normalised ``z`` ``[N, D]`` to the targets, by the temperature."""
        with torch.autocast(z.device.type, enabled=False):
            z = full_precision(z)
            return z @ self.targets.T.to(z.dtype) / (self.temperature if temperature is None else temperature)


def check_rows(z: Tensor, dim: int, labels: Tensor, other: Tensor | None, kept: Tensor | None) -> None:
    """
    Raises:
        ValueError: ``z`` is not ``[N, dim]``, the others are not ``[N]``, or one of ``other`` and ``kept`` has no pair.
    """
    if z.ndim != 2 or z.shape[1] != dim:
        raise ValueError(f"z: expected [N, {dim}], got {tuple(z.shape)}")
    if (other is None) != (kept is None):
        raise ValueError("other and kept: give both or neither")
    for name, rows in {"labels": labels, "other": other, "kept": kept}.items():
        if rows is not None and rows.shape != z.shape[:1]:
            raise ValueError(f"{name}: expected one per row of z, [{len(z)}], got {tuple(rows.shape)}")
