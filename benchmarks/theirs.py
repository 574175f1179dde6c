"""Two sets of rules side by side, on one batch: ours, and those of the GradMix authors' published code.

Written from a description of what their code does, not from the code; docs/authors-code.md has the list. Called by
inside.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.attribution import default_layers, record, still
from gradmix.boxes import boxes_inside, kept_fraction
from gradmix.draws import beta
from gradmix.ssl.losses import NTXentLoss

KEEP = (0.5, 0.9)
DRAWS = 2000  # batches, for what happens seldom


def against_theirs(backbone: nn.Module, head: nn.Module, views: Tensor) -> dict:
    """Shares of images, or of batches, for which the rules differ. ``views`` are one batch ``[2B, C, H, W]``."""
    size = (views.shape[2], views.shape[3])
    per_image, per_batch = maps_by_both_rules(backbone, head, views)
    ours, theirs = (flat_peaks(m) for m in (per_image, per_batch))
    same = (ours == theirs).all(1)
    apart = (ours - theirs).double().norm(dim=1)[~same]
    generator = torch.Generator().manual_seed(0)
    low, high = KEEP
    lam = low + (high - low) * beta(len(views), 1.0, views.device, generator)
    share = (1 - lam).sqrt()
    inside = boxes_inside(ours, share, size)
    clipped, whole = floored(ours, share, size)
    kept = kept_fraction(clipped, size)
    wrong = kept - (1 - whole.double() / (size[0] * size[1]))
    cut = clipped_at_all(ours, share, size)
    moved = boxes_overlap(boxes_inside(ours, share, size), boxes_inside(theirs, share, size))
    return {
        "rows": len(views),
        "same peak, maps scaled per image and per batch": share_error(same),
        "pixels between the peaks where they differ, median": apart.median().item() if len(apart) else 0.0,
        "overlap of the boxes (intersection over union), mean": round(moved.mean().item(), 3),
        "boxes clipped at the border by their rule": share_error(cut),
        "hidden share, boxes moved inside": round(1 - kept_fraction(inside, size).mean().item(), 4),
        "hidden share, boxes floored and clipped": round(1 - kept.mean().item(), 4),
        "their weight below what is really kept, mean": round(wrong.mean().item(), 4),
        "the same, among clipped boxes": round(wrong[cut].mean().item(), 4),
        "the same, largest": round(wrong.max().item(), 4),
        "their weight over the share lam, mean": round(((1 - whole / (size[0] * size[1])) - lam).mean().item(), 4),
        **of_draws(len(views) // 2),
    }


def maps_by_both_rules(backbone: nn.Module, head: nn.Module, views: Tensor) -> tuple[Tensor, Tensor]:
    """LayerCAM of NT-Xent, evidence "loss", each stage scaled to [0, 1] per image, and over the whole batch."""
    seen: list[Tensor] = []
    backbone.train().requires_grad_(True)
    with still(backbone), record(backbone, default_layers(backbone, 3), seen):
        z = F.normalize(head(backbone(views)), dim=1)
    gradients = torch.autograd.grad(NTXentLoss(0.1)(z) * 1024, seen)
    maps: tuple[list[Tensor], list[Tensor]] = ([], [])
    for activation, gradient in zip(seen, gradients, strict=True):
        cam = (activation * gradient.clamp(min=0)).sum(1, keepdim=True).detach()
        for scaled, over in zip(maps, ((2, 3), (0, 2, 3)), strict=True):
            low, high = cam.amin(over, keepdim=True), cam.amax(over, keepdim=True)
            cam_scaled = (cam - low) / (high - low).clamp(min=1e-30)
            scaled.append(F.interpolate(cam_scaled, views.shape[2:], mode="bilinear", align_corners=False)[:, 0])
    return torch.stack(maps[0]).mean(0), torch.stack(maps[1]).mean(0)


def flat_peaks(maps: Tensor) -> Tensor:
    flat = maps.flatten(1).argmax(1)
    return torch.stack([flat // maps.shape[2], flat % maps.shape[2]], 1)


def floored(centres: Tensor, share: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes with sides rounded down, clipped at the border, and their pixels before clipping."""
    sides = (share[:, None] * torch.tensor(size)).long()
    start = centres - sides // 2
    end = start + sides
    limit = torch.tensor(size)
    return torch.cat([start.clamp(min=0), torch.minimum(end, limit)], 1), sides.prod(1)


def clipped_at_all(centres: Tensor, share: Tensor, size: tuple[int, int]) -> Tensor:
    boxes, whole = floored(centres, share, size)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) < whole


def boxes_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``[N, 4]``."""
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    both = sides.prod(1)
    return both / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - both)


def of_draws(batch: int) -> dict:
    """What a shuffled batch as partners, and one ratio for all of a batch, do over many batches."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(batch, generator=generator) == torch.arange(batch) for _ in range(DRAWS)])
    low, high = KEEP
    one = low + (high - low) * torch.rand(DRAWS, generator=generator)  # Beta(1, 1)
    own = low + (high - low) * torch.rand((DRAWS, 2 * batch), generator=generator)
    return {
        "batches in which an image is its own partner": share_error(rows.any(1)),
        "images that are their own partner": round(rows.double().mean().item(), 5),
        "deviation of a batch's mean ratio, one per batch": round(one.std().item(), 4),
        "deviation of a batch's mean ratio, one per image": round(own.mean(1).std().item(), 4),
    }


def share_error(yes: Tensor) -> list[float]:
    share = yes.double().mean().item()
    return [round(share, 4), round((share * (1 - share) / len(yes)) ** 0.5, 4)]
