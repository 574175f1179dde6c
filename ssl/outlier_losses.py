"""What images of no class are pushed away from: every class, or every image.

As in :mod:`gradmix.ssl.losses`, the mean over processes is the loss of the concatenated batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.ssl.losses import full_precision, in_blocks, positive_temperature
from gradmix.ssl.processes import gather


def uniform_loss(logits: Tensor) -> Tensor:
    """KL divergence of class probabilities from the uniform distribution, which is that of no class; as in ASCOOD.

    Args:
        logits: ``[N, K]`` of outliers.

    Returns:
        Scalar: mean over the rows of this process; 0 where all classes are as likely.

    Raises:
        ValueError: not of that shape.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: expected [N, K], got {tuple(logits.shape)}")
    with torch.autocast(logits.device.type, enabled=False):
        return -full_precision(logits).log_softmax(1).mean() - math.log(logits.shape[1])


def negatives_loss(z: Tensor, outliers: Tensor, temperature: float) -> Tensor:
    """What outliers add to a contrastive loss whose denominators they join as negatives of every row.

    log(1 + sum_o exp(z_r . o / T) / sum_{j != r} exp(z_r . z_j / T)): NT-Xent's and SupCon's denominators with the
    outliers, less those without. Gradients flow to both sides.

    Args:
        z: ``[N, D]``, L2-normalised, of the views.
        outliers: ``[M, D]``, L2-normalised; those of all processes count for every row.
        temperature: T > 0.

    Returns:
        Scalar: mean over the rows of ``z`` of this process.

    Raises:
        ValueError: shapes that do not fit, or a temperature of 0 or less.
    """
    positive_temperature(temperature)
    if z.ndim != 2 or outliers.ndim != 2 or z.shape[1] != outliers.shape[1]:
        raise ValueError(f"outliers: expected [M, D] for z [N, D], got {[*outliers.shape]} for {[*z.shape]}")
    with torch.autocast(z.device.type, enabled=False):
        z, outliers = full_precision(z), full_precision(outliers)
        (everyone, first), (everyones, _) = gather(z), gather(outliers)

        def added(z: Tensor, own: Tensor) -> tuple[Tensor]:
            clean = (z @ everyone.T / temperature).scatter(1, own[:, None], -torch.inf).logsumexp(1)
            return (F.softplus((z @ everyones.T / temperature).logsumexp(1) - clean),)

        (loss,) = in_blocks(added, z, first + torch.arange(len(z), device=z.device))
        return loss.mean()
