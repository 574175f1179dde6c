"""What a method minimises: a table of weighted losses, all of them asked in the same way."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.ssl.config import Config, DistillConfig, MethodConfig
from gradmix.ssl.distillation import correlation_loss, relation_loss, two_hot_loss
from gradmix.ssl.losses import NTXentLoss, SupConLoss
from gradmix.ssl.outlier_losses import negatives_loss, uniform_loss
from gradmix.ssl.processes import mean_over_processes
from gradmix.ssl.prototypes import PrototypeLoss
from gradmix.ssl.targets import OrthogonalTargetLoss


class Taught(NamedTuple):
    """What a teacher makes of views; without gradients."""

    features: Tensor  # [N, E], of its backbone, L2-normalised
    z: Tensor | None  # [N, D], projections, L2-normalised; None without a head
    logits: Tensor | None  # [N, K], None without class targets


class Rows(NamedTuple):
    """What a loss is computed from. With ``p``, it is the mixed term alone."""

    z: Tensor  # [2B, D], projections of the views, L2-normalised
    labels: Tensor  # [2B] int64
    temperature: float  # of this step
    p: Tensor | None = None  # [2B, D], projections of the mixed images
    kept: Tensor | None = None  # [2B], the share of each mixed image that is still itself
    other: Tensor | None = None  # [2B] int64, labels of what was mixed in
    partner: Tensor | None = None  # [2B] int64, rows of what was mixed in
    features: Tensor | None = None  # [2B, F], the backbone's, of the views
    mixed_features: Tensor | None = None  # [2B, F], of the mixed images
    taught: Taught | None = None  # the teacher's, of the views
    taught_mixed: Taught | None = None  # the teacher's, of the mixed images
    outliers: Tensor | None = None  # [M, D], projections of images of no class


Loss = Callable[[Rows], Tensor]  # to a scalar
ClassLoss = OrthogonalTargetLoss | PrototypeLoss  # gives class logits

# The losses that a method can have, in the order in which they are added; ``method.NAME`` is the weight of each.
OWN = ("supervised", "selfsup", "targets", "prototypes")


def supervised(rows: Rows) -> Tensor:
    """SupCon: mixed images draw the anchors of their own class, for the share that is still theirs."""
    return SupConLoss(rows.temperature)(rows.z, rows.labels, rows.p, rows.kept)


def selfsup(rows: Rows) -> Tensor:
    """NT-Xent: mixed images draw the other view of their image, for the share that is still theirs. No labels."""
    return NTXentLoss(rows.temperature)(rows.z, rows.p, rows.kept)


def of_classes(loss: ClassLoss, rows: Rows) -> Tensor:
    """Class targets or prototypes: mixed images are drawn to those of both their classes, and move no prototype."""
    return loss(rows.z if rows.p is None else rows.p, rows.labels, rows.other, rows.kept, rows.temperature)


def relations(distill: DistillConfig, rows: Rows) -> Tensor:
    """Distillation of similarities: mixed images have the teacher's neighbours of both raw images."""
    assert rows.taught is not None and rows.features is not None
    if distill.space == "features":
        student, teacher = F.normalize(rows.features.float(), dim=1), rows.taught.features
        mixed = None if rows.mixed_features is None else F.normalize(rows.mixed_features.float(), dim=1)
    else:
        assert rows.taught.z is not None
        student, teacher, mixed = rows.z, rows.taught.z, rows.p
    own = torch.arange(len(student), device=student.device)
    if mixed is None:
        return relation_loss(student, student, teacher, teacher, own, distill.temperature)
    assert rows.partner is not None and rows.kept is not None
    of_its_own = relation_loss(mixed, student, teacher, teacher, own, distill.temperature, rows.kept)
    theirs = teacher[rows.partner]
    return of_its_own + relation_loss(mixed, student, theirs, teacher, rows.partner, distill.temperature, 1 - rows.kept)


def correlations(distill: DistillConfig, target_loss: OrthogonalTargetLoss, rows: Rows) -> Tensor:
    """Distillation of class logits (arXiv 2404.19527).

    Mixed images follow the teacher on both raw images. One that the teacher takes for one of its two classes follows it
    on its own image once more; any other has both labels.
    """
    assert rows.taught is not None and rows.taught.logits is not None
    teacher = rows.taught.logits
    if rows.p is None:
        return correlation_loss(target_loss.logits(rows.z, rows.temperature), teacher)
    assert rows.taught_mixed is not None and rows.taught_mixed.logits is not None
    assert rows.kept is not None and rows.other is not None and rows.partner is not None
    student, guess = target_loss.logits(rows.p, rows.temperature), rows.taught_mixed.logits.argmax(1)
    sure = ((guess == rows.labels) | (guess == rows.other)).to(student.dtype)
    kept = mean_over_processes(rows.kept.mean())
    told = correlation_loss(student, teacher, sure)
    labelled = two_hot_loss(student, rows.labels, rows.other, rows.kept, distill.smoothing, 1 - sure)
    of_its_own = kept * correlation_loss(student, teacher, rows.kept)
    of_its_partner = (1 - kept) * correlation_loss(student, teacher[rows.partner], 1 - rows.kept)
    return told + labelled + of_its_own + of_its_partner


def outliers_uniform(loss: ClassLoss, rows: Rows) -> Tensor:
    """Outliers: every class target, or every prototype, is as likely."""
    assert rows.outliers is not None
    return uniform_loss(loss.logits(rows.outliers, rows.temperature))


def outliers_as_negatives(rows: Rows) -> Tensor:
    """Outliers: negatives of every view, in the denominators of NT-Xent or SupCon."""
    assert rows.outliers is not None
    return negatives_loss(rows.z, rows.outliers, rows.temperature)


def losses_in(method: MethodConfig) -> list[str]:
    """The names of the losses that a method has, which are those that weigh something."""
    return [name for name in OWN if getattr(method, name)]


def may_look(config: Config) -> bool:
    """Whether a loss may be asked where its gradient points."""
    return config.mix.name != "none" or config.outliers.name == "attribution"


def losses_of(
    config: Config, target_loss: OrthogonalTargetLoss | None, prototype_loss: PrototypeLoss | None
) -> dict[str, Loss]:
    """The losses that a step computes, in the order in which they are added: the method's own, then the teacher's.

    Args:
        target_loss: None for a method without class targets.
        prototype_loss: None for a method without prototypes.
    """
    method, distill = config.method, config.distill
    losses: dict[str, Loss] = {}
    if method.supervised:
        losses["supervised"] = supervised
    if method.selfsup or (may_look(config) and method.attribution == "selfsup"):  # at weight 0 it only says where
        losses["selfsup"] = selfsup
    if target_loss is not None:
        losses["targets"] = partial(of_classes, target_loss)
    if prototype_loss is not None:
        losses["prototypes"] = partial(of_classes, prototype_loss)
    if distill.name != "none" and distill.form == "relations":
        losses["distill"] = partial(relations, distill)
    elif distill.name != "none":
        assert target_loss is not None  # check_teacher has seen to it
        losses["distill"] = partial(correlations, distill, target_loss)
    return losses


def outlier_loss_of(config: Config, classes: ClassLoss | None) -> Loss:
    """
    Args:
        classes: what gives class logits; None for a method without.

    Raises:
        ValueError: ``outliers.form=uniform`` without class logits.
    """
    form = config.outliers.form
    if form == "negatives" or (form == "auto" and classes is None):
        return outliers_as_negatives
    if classes is None:
        raise ValueError(
            f"outliers.form: uniform is over class targets or prototypes, which method={config.method.name} has not; "
            "outliers.form=negatives needs none"
        )
    return partial(outliers_uniform, classes)


def weights_of(config: Config) -> dict[str, float]:
    """What each loss of a step weighs, by name; ``mixed`` and ``distill_mixed`` are those of mixed images."""
    method, distill = config.method, config.distill
    return {
        **{name: getattr(method, name) for name in OWN},
        "distill": distill.weight,
        "mixed": config.mix.weight * getattr(method, method.mixed_loss),
        "distill_mixed": distill.mixed,
        "outliers": config.outliers.weight,
    }


def check_losses(config: Config) -> None:
    """
    Raises:
        ValueError: no loss weighs anything, or mixed images enter one, or attribution follows one, that the method does
            not have.
    """
    method, has = config.method, losses_in(config.method)
    if not has:
        raise ValueError(f"method: {', '.join(OWN)} are all 0, nothing would be learned")
    if config.mix.name != "none" and method.mixed_loss not in has:
        raise ValueError(f"method.mixed_loss: {method.name} has only {' or '.join(has)}, got {method.mixed_loss!r}")
    guides = ["selfsup", *(name for name in has if name != "selfsup")]  # NT-Xent needs no labels: any method can ask it
    guides += ["joint"] if len(guides) > 1 else []
    if may_look(config) and method.attribution not in guides:
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


def build_prototype_loss(config: Config, classes: int) -> PrototypeLoss:
    """
    Args:
        classes: of the training images.
    """
    asked = config.method.prototype
    return PrototypeLoss(
        classes,
        config.encoder.head_dim,
        asked.per_class,
        config.method.temperature,
        asked.neighbours,
        asked.momentum,
        asked.sharpness,
        asked.contrast,
        asked.contrast_temperature,
    )


def temperature_at(method: MethodConfig, done: float) -> float:
    """The temperature when the share ``done`` of the training is over."""
    if method.temperature_end is None:
        return method.temperature
    return method.temperature + (method.temperature_end - method.temperature) * (1 - math.cos(math.pi * done)) / 2
