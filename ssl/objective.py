"""What a method minimises: a table of weighted losses, all of them asked in the same way."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from gradmix.ssl.config import Config, MethodConfig
from gradmix.ssl.losses import NTXentLoss, SupConLoss
from gradmix.ssl.targets import OrthogonalTargetLoss


class Rows(NamedTuple):
    """What a loss is computed from. With ``p``, it is the mixed term alone."""

    z: Tensor  # [2B, D], projections of the views, L2-normalised
    labels: Tensor  # [2B] int64
    temperature: float  # of this step
    p: Tensor | None = None  # [2B, D], projections of the mixed images
    kept: Tensor | None = None  # [2B], the share of each mixed image that is still itself
    other: Tensor | None = None  # [2B] int64, labels of what was mixed in


Loss = Callable[[Rows], Tensor]  # to a scalar


def supervised(rows: Rows) -> Tensor:
    """SupCon: mixed images draw the anchors of their own class, for the share that is still theirs."""
    return SupConLoss(rows.temperature)(rows.z, rows.labels, rows.p, rows.kept)


def selfsup(rows: Rows) -> Tensor:
    """NT-Xent: mixed images draw the other view of their image, for the share that is still theirs. No labels."""
    return NTXentLoss(rows.temperature)(rows.z, rows.p, rows.kept)


def targets(loss: OrthogonalTargetLoss, rows: Rows) -> Tensor:
    """Class targets: mixed images are drawn to the targets of both their classes."""
    return loss(rows.z if rows.p is None else rows.p, rows.labels, rows.other, rows.kept, rows.temperature)


def losses_of(method: MethodConfig, mixes: bool, target_loss: OrthogonalTargetLoss | None) -> dict[str, Loss]:
    """The losses that a step computes, in the order in which they are added.

    Args:
        mixes: whether a mixer may ask NT-Xent where to look, which it can at weight 0 too.
        target_loss: None for a method without class targets.
    """
    losses: dict[str, Loss] = {}
    if method.supervised:
        losses["supervised"] = supervised
    if method.selfsup or (mixes and method.attribution == "selfsup"):
        losses["selfsup"] = selfsup
    if target_loss is not None:
        losses["targets"] = partial(targets, target_loss)
    return losses


def weights_of(method: MethodConfig) -> dict[str, float]:
    """The losses by name, each with its weight."""
    return {"selfsup": method.selfsup, "supervised": method.supervised, "targets": method.targets}


def check_mixing(method: MethodConfig) -> None:
    """
    Raises:
        ValueError: the mixed images enter a loss, or attribution follows one, that the method does not have.
    """
    has = [name for name, weight in weights_of(method).items() if weight]
    if method.mixed_loss not in has:
        raise ValueError(f"method.mixed_loss: {method.name} has only {' or '.join(has)}, got {method.mixed_loss!r}")
    guides = ["selfsup", *(name for name in has if name != "selfsup")]  # NT-Xent needs no labels: any method can ask it
    guides += ["joint"] if len(guides) > 1 else []
    if method.attribution not in guides:
        raise ValueError(f"method.attribution: {method.name} has {', '.join(guides)}, got {method.attribution!r}")


def build_target_loss(config: Config, classes: int) -> OrthogonalTargetLoss:
    """
    Args:
        classes: of the training images.

    Raises:
        ValueError: more classes than the projections have dimensions.
    """
    dim = config.encoder.head_dim
    if classes > dim:
        raise ValueError(f"encoder.head_dim: {classes} class targets at right angles need {classes} or more, got {dim}")
    return OrthogonalTargetLoss(classes, dim, config.method.temperature, config.method.smoothing)


def temperature_at(method: MethodConfig, done: float) -> float:
    """The temperature when the share ``done`` of the training is over."""
    if method.temperature_end is None:
        return method.temperature
    return method.temperature + (method.temperature_end - method.temperature) * (1 - math.cos(math.pi * done)) / 2
