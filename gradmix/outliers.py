"""Images of no class, made from images: what a map points at is disrupted, after ASCOOD (arXiv 2411.10794)."""

import torch
from torch import Tensor

from gradmix.draws import uniform
from gradmix.mixer import one_of

HOW = ("shuffle", "shift", "add")


def disrupt(
    images: Tensor,
    attribution: Tensor,
    generator: torch.Generator,
    how: str = "shuffle",
    pixels: float = 0.1,
    amount: float = 1.0,
) -> Tensor:
    """Images whose most attributed pixels no longer show what they showed; all others stay.

    Args:
        images: ``[N, C, H, W]``, floating point. Not changed.
        attribution: ``[N, H, W]``, such as GradMix's maps.
        generator: source of all randomness.
        how: ``"shuffle"`` these pixels among each other; ``"shift"``: each shows the pixel that lies a random way off,
            the same way for a whole image; ``"add"`` the map to them, times ``amount`` deviations of the channel.
        pixels: which share of the image they are, above 0 to 1.
        amount: for ``"add"``.

    Returns:
        ``[N, C, H, W]``, of the dtype and memory format of ``images``.

    Raises:
        ValueError: shapes that do not fit, or an argument out of range.
    """
    one_of("how", how, HOW)
    if not 0 < pixels <= 1:
        raise ValueError(f"pixels: expected a share above 0, at most 1, got {pixels!r}")
    rows, channels, height, width = images.shape
    if attribution.shape != (rows, height, width):
        raise ValueError(f"attribution: expected {(rows, height, width)}, got {tuple(attribution.shape)}")
    count = max(1, round(pixels * height * width))
    chosen = attribution.flatten(1).topk(count, dim=1).indices  # [N, P]
    flat = images.flatten(2)  # [N, C, HW]

    def of_all_channels(index: Tensor) -> Tensor:
        return index[:, None].expand(-1, channels, -1)

    shown = flat.gather(2, of_all_channels(chosen))  # [N, C, P]
    if how == "shuffle":
        order = uniform((rows, count), images.device, generator).argsort(1)
        shown = shown.gather(2, of_all_channels(order))
    elif how == "shift":
        way = (uniform((rows, 1), images.device, generator) * (height * width - 1)).long() + 1  # never 0
        down, right = way // width, way % width
        from_there = (chosen // width + down) % height * width + (chosen % width + right) % width
        shown = flat.gather(2, of_all_channels(from_there))
    else:
        deviation = flat.float().std(2, keepdim=True, correction=0)
        shown = shown + (amount * deviation * attribution.flatten(1).gather(1, chosen)[:, None]).to(images.dtype)
    disrupted = flat.scatter(2, of_all_channels(chosen), shown).view_as(images)
    if images.is_contiguous(memory_format=torch.channels_last):
        disrupted = disrupted.contiguous(memory_format=torch.channels_last)
    return disrupted
