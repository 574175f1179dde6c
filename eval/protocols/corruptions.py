"""Fifteen corruptions at five severities, after Hendrycks & Dietterich (arXiv 1903.12261).

The kinds are the paper's; the implementations are our own. Every length is a share of the image's side, so that one
table of severities serves 16 x 16 and 224 x 224 images; strengths lie between CIFAR-10-C's and ImageNet-C's. Numbers
measured here compare with each other, not with published ones: for those, read the standard sets
(:mod:`gradmix.eval.protocols.robustness`). Frost is procedural (ridged fractal noise), where the paper overlays
photographs of ice; glass blur takes a random neighbour per pixel, where the paper swaps neighbours one after the other.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupted copies of images.

    Args:
        images: ``[N, 3, S, S]`` uint8.
        kind: key of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: with the kind, decides everything that is random; the five severities share their randomness, so that they
            differ in strength alone.

    Returns:
        ``[N, 3, S, S]`` uint8 on the same device. The same bits for the same arguments.

    Raises:
        ValueError: unknown kind or severity, or images of another shape or type.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind: expected one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: expected 1 to 5, got {severity}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images: expected [N, 3, S, S] uint8, got {list(images.shape)} {images.dtype}")
    function, strengths = CORRUPTIONS[kind]
    words = np.random.SeedSequence([seed, list(CORRUPTIONS).index(kind)]).generate_state(2)
    generator = Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)  # CPU: the same bits with any device
    changed = function(images.cpu().float() / 255, strengths[severity - 1], generator)
    return (changed.clamp(0, 1) * 255).round().byte().to(images.device)


# Noise. x: [N, 3, S, S] in [0, 1], here and below.


def gaussian_noise(x: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Normal noise of this standard deviation."""
    return x + deviation * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, photons: float, generator: Generator) -> Tensor:
    """Poisson noise of a sensor that counts ``photons`` at full brightness."""
    return torch.poisson(x * photons, generator) / photons


def impulse_noise(x: Tensor, share: float, generator: Generator) -> Tensor:
    """A share of all values becomes 0 or 1."""
    draw = torch.rand(x.shape, generator=generator)
    return torch.where(draw < share / 2, torch.zeros(()), torch.where(draw > 1 - share / 2, torch.ones(()), x))


# Blur.


def defocus_blur(x: Tensor, radius: float, generator: Generator) -> Tensor:
    """A disk whose radius is this share of the image's side."""
    return convolve(x, disk(0.5 + radius * x.shape[-1])[None])  # below half a pixel a disk does nothing


def glass_blur(x: Tensor, shift: float, generator: Generator) -> Tensor:
    """Each pixel shows a random one from its surroundings, twice; then a slight blur."""
    n, _, size, _ = x.shape
    reach = 0.5 + shift * size  # a pixel moves when its draw exceeds half a pixel
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for _ in range(2):
        moves = ((2 * torch.rand(2, n, size, size, generator=generator) - 1) * reach).round().long()
        source = (rows + moves[0]).clamp(0, size - 1) * size + (columns + moves[1]).clamp(0, size - 1)
        x = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, 3, -1)).view_as(x)
    return convolve(x, gaussian(0.005 * size)[None])


def motion_blur(x: Tensor, length: float, generator: Generator) -> Tensor:
    """Along a line of an angle of its own, within 45 degrees of horizontal."""
    angles = (torch.rand(len(x), generator=generator) - 0.5) * (torch.pi / 2)
    return convolve(x, line(length * x.shape[-1], angles))


def zoom_blur(x: Tensor, zoom: float, generator: Generator) -> Tensor:
    """The mean of eleven exposures while zooming in."""
    size, total = x.shape[-1], torch.zeros_like(x)
    for factor in torch.linspace(1, zoom, 11).tolist():
        theta = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, [len(x), 3, size, size], align_corners=False)
        total += F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return total / 11


# Weather.


def snow(x: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Falling flakes, and light that takes the colours away. Strength: share of flakes, share of whitening."""
    flakes, white = strength
    size = x.shape[-1]
    cells = min(size, 48)  # flakes grow with the image
    heights = torch.rand(len(x), 1, cells, cells, generator=generator)
    layer = F.interpolate(((heights - 1 + flakes) / flakes).clamp(min=0), (size, size), mode="bilinear")
    angles = torch.pi * (0.25 + 0.5 * torch.rand(len(x), generator=generator))  # falling, not drifting sideways
    layer = convolve(layer, line(0.08 * size, angles))
    grey = x.mul(torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    return (1 - white) * x + white * torch.maximum(x, 0.5 + 0.5 * grey) + layer + layer.flip(2, 3)


def frost(x: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Bluish crystals over a darker image. Strength: what is left of the image, how bright the ice is."""
    left, ice = strength
    ridges = (1 - (2 * plasma(x, 1.4, generator) - 1).abs()) ** 3
    tint = torch.tensor([0.85, 0.93, 1.0])[:, None, None]
    return left * x + ice * ridges * tint


def fog(x: Tensor, strength: tuple[float, float], generator: Generator) -> Tensor:
    """Plasma added to the image, the sum scaled back to the image's range. Strength: density, decay of the octaves."""
    density, decay = strength
    largest = x.amax(dim=(1, 2, 3), keepdim=True)
    return (x + density * plasma(x, decay, generator)) * largest / (largest + density)


def brightness(x: Tensor, added: float, generator: Generator) -> Tensor:
    """HSV's value (the largest channel) raised; hue and saturation stay."""
    value = x.amax(dim=1, keepdim=True)
    raised = (value + added).clamp(max=1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-6), raised)


# Digital.


def contrast(x: Tensor, kept: float, generator: Generator) -> Tensor:
    """Distance to the mean of each channel scaled by ``kept``."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * kept + mean


def elastic_transform(x: Tensor, shift: float, generator: Generator) -> Tensor:
    """A smooth random displacement, deviation ``shift`` of the side, from six control points per side."""
    n, _, size, _ = x.shape
    field = F.interpolate(
        torch.randn(n, 2, 6, 6, generator=generator), (size, size), mode="bicubic", align_corners=True
    )
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 3, size, size], align_corners=False)
    moved = grid + 2 * shift * field.permute(0, 2, 3, 1)  # grid coordinates run from -1 to 1
    return F.grid_sample(x, moved, padding_mode="reflection", align_corners=False)


def pixelate(x: Tensor, scale: float, generator: Generator) -> Tensor:
    """Pillow's BOX down and up again, as in the paper: every pixel is in one block (area interpolation's overlap)."""
    size = x.shape[-1]
    few = max(1, round(scale * size))

    def in_blocks(image: Image.Image) -> Image.Image:
        return image.resize((few, few), Image.Resampling.BOX).resize((size, size), Image.Resampling.BOX)

    return through_pillow(x, in_blocks)


def jpeg_compression(x: Tensor, quality: int, generator: Generator) -> Tensor:
    """JPEG of this quality, there and back."""

    def through_jpeg(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return through_pillow(x, through_jpeg)


# By kind: what makes it, and its strength at the five severities; a strength is what that function takes.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, Any, Generator], Tensor], tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.09, 0.13, 0.18)),
    "shot_noise": (shot_noise, (300, 150, 80, 50, 30)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.04, 0.07, 0.11)),
    "defocus_blur": (defocus_blur, (0.01, 0.016, 0.024, 0.034, 0.045)),
    "glass_blur": (glass_blur, (0.005, 0.01, 0.015, 0.02, 0.03)),
    "motion_blur": (motion_blur, (0.08, 0.12, 0.16, 0.21, 0.27)),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (snow, ((0.03, 0.1), (0.06, 0.2), (0.1, 0.3), (0.14, 0.4), (0.2, 0.5))),
    "frost": (frost, ((1.0, 0.2), (0.95, 0.3), (0.9, 0.4), (0.8, 0.5), (0.7, 0.6))),
    "fog": (fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (elastic_transform, (0.01, 0.016, 0.022, 0.03, 0.04)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg_compression, (60, 45, 30, 20, 12)),
}


def through_pillow(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """``[N, 3, S, S]`` floats in [0, 1], each changed as a Pillow image of 8 bits."""
    images = [pil_to_tensor(change(to_pil_image(image))) for image in (x * 255).round().byte()]
    return torch.stack(images).float() / 255


def convolve(x: Tensor, kernels: Tensor) -> Tensor:
    """``[N, C, S, S]`` with one kernel ``[1, k, k]`` for all images or one each ``[N, k, k]``; edges are repeated."""
    n, channels, size, _ = x.shape
    reach = kernels.shape[-1] // 2
    padded = F.pad(x, (reach,) * 4, mode="replicate").reshape(1, n * channels, *(size + 2 * reach,) * 2)
    weight = kernels.expand(n, -1, -1).repeat_interleave(channels, dim=0)[:, None]
    return F.conv2d(padded, weight, groups=n * channels).view_as(x)


def disk(radius: float) -> Tensor:
    """Kernel ``[k, k]`` of sum 1: the share of each pixel that a disk around the middle one's centre covers."""
    reach, fine = int(np.ceil(radius)), 16
    steps = (torch.arange((2 * reach + 1) * fine) + 0.5) / fine - (reach + 0.5)
    inside = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    kernel = F.avg_pool2d(inside[None, None], fine)[0, 0]
    return kernel / kernel.sum()


def gaussian(deviation: float) -> Tensor:
    """Kernel ``[k, k]`` of sum 1."""
    reach = max(1, int(np.ceil(3 * deviation)))
    steps = torch.arange(-reach, reach + 1)
    profile = torch.exp(-(steps**2) / (2 * deviation**2))
    kernel = profile[:, None] * profile
    return kernel / kernel.sum()


def line(length: float, angles: Tensor) -> Tensor:
    """Kernels ``[N, k, k]`` of sum 1: a segment through the middle, ``length`` pixels, at ``angles`` in radians."""
    reach = int(np.ceil(length / 2)) + 1
    side = 2 * reach + 1
    along = torch.linspace(-length / 2, length / 2, 4 * side)
    points = reach + torch.stack(
        [angles.sin()[:, None] * along, angles.cos()[:, None] * along]
    )  # [2, N, P], row, column
    low = points.floor()
    kernels = torch.zeros(len(angles), side * side)
    for row in (0, 1):  # each point is shared among its four pixels
        for column in (0, 1):
            corner = low + torch.tensor([row, column])[:, None, None]
            share = (1 - (points - corner).abs()).prod(dim=0)
            kernels.scatter_add_(1, (corner[0] * side + corner[1]).long(), share)
    return (kernels / kernels.sum(dim=1, keepdim=True)).view(-1, side, side)


def plasma(x: Tensor, decay: float, generator: Generator) -> Tensor:
    """Fractal noise ``[N, 1, S, S]`` in [0, 1]: octaves of random grids, each finer one ``decay`` times weaker."""
    n, _, size, _ = x.shape
    total, weight, cells = torch.zeros(n, 1, size, size), 1.0, 2
    while cells <= size:
        octave = torch.rand(n, 1, cells, cells, generator=generator)
        total += weight * F.interpolate(octave, (size, size), mode="bicubic", align_corners=True)
        weight, cells = weight / decay, 2 * cells
    low, high = total.amin(dim=(2, 3), keepdim=True), total.amax(dim=(2, 3), keepdim=True)
    return (total - low) / (high - low).clamp(min=1e-6)
