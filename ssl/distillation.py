"""What a student is drawn to that follows a teacher: the same answers, or the same neighbours.

Of a mixed image the teacher is asked about both raw images that went into it, for the share of each.

As in :mod:`gradmix.ssl.losses`, the mean over processes is the loss of the concatenated batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmix.ssl.losses import full_precision, in_blocks, positive_temperature
from gradmix.ssl.processes import gather, mean_over_processes


def correlation_loss(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """How far class probabilities are from rising and falling with the teacher's: D of arXiv 2404.19527.

    One minus the mean Pearson correlation of the two's rows (an image's classes), plus one minus that of their columns
    (a class's images). For the row weights of a mixed batch, both means and the columns' correlations are weighted.

    Args:
        student, teacher: ``[N, K]`` logits; their softmax is compared.
        weight: ``[N]``, non-negative.

    Returns:
        Scalar in 0..4; 0 where no row weighs anything.

    Raises:
        ValueError: shapes that do not fit.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(f"student and teacher: expected twice [N, K], got {[*student.shape]} and {[*teacher.shape]}")
    if weight is not None and weight.shape != student.shape[:1]:
        raise ValueError(f"weight: expected one per row, [{len(student)}], got {tuple(weight.shape)}")
    with torch.autocast(student.device.type, enabled=False):
        s, t = (full_precision(logits).softmax(1) for logits in (student, teacher))
        weight = s.new_ones(len(s)) if weight is None else weight.to(s.dtype)
        mean_weight = mean_over_processes(weight.mean(), s.dtype)
        rows = (weight * (1 - _correlation(s, t, torch.ones_like(s), 1))).mean() / mean_weight.clamp(min=1e-12)
        everyone = gather(s)[0], gather(t)[0], gather(weight)[0][:, None].expand(-1, s.shape[1])
        columns = 1 - _correlation(*everyone, 0).mean()
        return rows + columns * (mean_weight > 0)


def _correlation(a: Tensor, b: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Weighted Pearson correlations of two matrices' rows (``dim=1``) or columns (``dim=0``)."""
    share = weight / weight.sum(dim, keepdim=True).clamp(min=1e-12)
    a, b = ((x - (share * x).sum(dim, keepdim=True)) * share.sqrt() for x in (a, b))
    return (F.normalize(a, dim=dim, eps=1e-8) * F.normalize(b, dim=dim, eps=1e-8)).sum(dim)


def two_hot_loss(
    student: Tensor, labels: Tensor, other: Tensor, kept: Tensor, smoothing: float, rows: Tensor
) -> Tensor:
    """Cross-entropy of mixed images to both their labels, mean over some of the rows: for what a teacher can't tell.

    Args:
        student: ``[N, K]`` logits.
        labels, other: ``[N]`` int64, classes of the image and of what was mixed in.
        kept: ``[N]``, the share of the image itself.
        smoothing: share of each label that is spread evenly over all classes; 0.75 in arXiv 2404.19527.
        rows: ``[N]``, 1 for the rows that count, 0 for the others.

    Returns:
        Scalar; 0 where none counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = full_precision(student)
        kept, rows = kept.to(student.dtype), rows.to(student.dtype)
        share = torch.zeros_like(student).scatter_(1, labels[:, None], kept[:, None])
        share.scatter_add_(1, other[:, None], 1 - kept[:, None])
        loss = F.cross_entropy(student, share, reduction="none", label_smoothing=smoothing)
        return (rows * loss).mean() / mean_over_processes(rows.mean(), student.dtype).clamp(min=1e-12)


def relation_loss(
    student: Tensor,
    keys: Tensor,
    teacher: Tensor,
    teacher_keys: Tensor,
    own: Tensor,
    temperature: float,
    weight: Tensor | None = None,
) -> Tensor:
    """How far the student's neighbours are from the teacher's: their similarities among the batch as soft targets.

    KL divergence of softmax(student_r . keys_j / T) from softmax(teacher_r . teacher_keys_j / T) over the rows j of
    all processes but the query's own. No labels; student and teacher may be of different widths. Kin of SEED
    (arXiv 2101.04731), whose keys are a queue of the teacher's features; here they are the batch's, each network's own.

    Args:
        student: ``[N, D]``, L2-normalised queries, with gradients.
        keys: ``[N, D]``, L2-normalised, of the batch's raw views, with gradients.
        teacher, teacher_keys: ``[N, E]``, the same of the teacher.
        own: ``[N]`` int64, the key that each query is itself or came from, which is left out.
        temperature: T > 0, of both.
        weight: ``[N]``, of each query's divergence.

    Returns:
        Scalar: mean over the queries of this process of weight times divergence.

    Raises:
        ValueError: shapes that do not fit, or a temperature of 0 or less.
    """
    positive_temperature(temperature)
    for name, tensor, like in (("keys", keys, student), ("teacher_keys", teacher_keys, teacher)):
        if tensor.ndim != 2 or tensor.shape != like.shape or len(tensor) != len(student):
            raise ValueError(f"{name}: expected the shape of the queries, {tuple(like.shape)}, got {[*tensor.shape]}")
    with torch.autocast(student.device.type, enabled=False):
        student, keys, teacher, teacher_keys = map(full_precision, (student, keys, teacher, teacher_keys))
        (everyone, first), (their_everyone, _) = gather(keys), gather(teacher_keys)

        def divergence(student: Tensor, teacher: Tensor, own: Tensor) -> tuple[Tensor]:
            ours, theirs = student @ everyone.T / temperature, teacher @ their_everyone.T / temperature
            log_sums = [x.scatter(1, own[:, None], -torch.inf).logsumexp(1) for x in (ours, theirs)]
            target = (theirs - log_sums[1][:, None]).exp().scatter(1, own[:, None], 0.0)  # sums to 1
            return ((target * (theirs - ours)).sum(1) + log_sums[0] - log_sums[1],)

        (loss,) = in_blocks(divergence, student, teacher, first + own)
        return (loss if weight is None else loss * weight.to(loss.dtype)).mean()
