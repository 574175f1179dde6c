"""Boxes in images, as pure functions: ``[N, 4]`` int64 (top, left, bottom, right), ends exclusive."""

import torch
import torch.nn.functional as F
from torch import Tensor


def boxes_inside(centres: Tensor, share: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes with sides ``share * size`` (rounded) around ``centres`` [N, 2], moved so that nothing is clipped."""
    top, bottom = _span_inside(centres[:, 0], share, size[0])
    left, right = _span_inside(centres[:, 1], share, size[1])
    return torch.stack([top, left, bottom, right], 1)


def _span_inside(centre: Tensor, share: Tensor, length: int) -> tuple[Tensor, Tensor]:
    side = (share * length).round().long()
    start = torch.minimum((centre - side // 2).clamp(min=0), length - side)
    return start, start + side


def kept_fraction(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Fraction of pixels outside each box, ``[N]``."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return 1 - area / (size[0] * size[1])


def paste(images: Tensor, filling: Tensor, boxes: Tensor) -> Tensor:
    """``filling`` inside the boxes, ``images`` outside; both ``[N, C, H, W]``."""
    top, left, bottom, right = boxes[:, :, None].unbind(1)  # each [N, 1]
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    inside_y, inside_x = (y >= top) & (y < bottom), (x >= left) & (x < right)
    return torch.where((inside_y[:, :, None] & inside_x[:, None, :])[:, None], filling, images)


def shift_into(images: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Each image of ``[N, C, H, W]`` moved so that what lies in its box ``source`` lies in ``target``, equally large.

    Where nothing lies any more, border pixels are repeated.
    """
    rows = torch.arange(len(images), device=images.device)[:, None, None]
    y, x = (
        (torch.arange(length, device=images.device) + (source[:, i] - target[:, i])[:, None]).clamp(0, length - 1)
        for i, length in enumerate(images.shape[2:])
    )
    return images.movedim(1, -1)[rows, y[:, :, None], x[:, None, :]].movedim(-1, 1).contiguous()


def inside_rim(maps: Tensor, border: float) -> Tensor:
    """Maps ``[N, H, W]`` that are 0 in the outermost share ``border`` of each side; one pixel is always left."""
    margins = [min(round(border * length), (length - 1) // 2) for length in maps.shape[1:]]
    inner = torch.zeros_like(maps)
    rows, columns = (slice(margin, length - margin) for margin, length in zip(margins, maps.shape[1:], strict=True))
    inner[:, rows, columns] = maps[:, rows, columns]
    return inner


def resize_into(images: Tensor, boxes: Tensor) -> Tensor:
    """Each image of ``[N, C, H, W]`` resized whole into its box (bilinear); undefined outside the box.

    One ``grid_sample`` for the batch: the box's pixel centres are mapped to [-1, 1], which for
    ``align_corners=False`` is exactly ``F.interpolate`` of each image to its own size.
    """
    _, _, height, width = images.shape
    precise = images.to(torch.promote_types(images.dtype, torch.float32))  # half-precision coordinates would blur
    top, left, bottom, right = boxes[:, :, None].to(precise.dtype).unbind(1)  # each [N, 1]
    y = torch.arange(height, device=images.device) + 0.5
    x = torch.arange(width, device=images.device) + 0.5
    grid_y = 2 * (y - top) / (bottom - top).clamp(min=1) - 1  # [N, H]
    grid_x = 2 * (x - left) / (right - left).clamp(min=1) - 1  # [N, W]
    grid = torch.stack([grid_x[:, None].expand(-1, height, -1), grid_y[:, :, None].expand(-1, -1, width)], -1)
    with torch.autocast(images.device.type, enabled=False):
        return F.grid_sample(precise, grid, padding_mode="border", align_corners=False).to(images.dtype)
