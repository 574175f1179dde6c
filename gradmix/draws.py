"""Random numbers for mixers, drawn where the generator lives and then moved: one on the CPU serves a GPU's images."""

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(device, non_blocking=True)


def normal(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(device, non_blocking=True)


def random_pixels(count: int, size: tuple[int, int], device: torch.device, generator: torch.Generator) -> Tensor:
    """Pixel positions (row, column), ``[count, 2]`` int64."""
    u = uniform((count, 2), device, generator)
    return torch.stack([u[:, 0] * size[0], u[:, 1] * size[1]], 1).long()


def beta(count: int, alpha: float, device: torch.device, generator: torch.Generator) -> Tensor:
    """Beta(alpha, alpha), ``[count]``; as a two-way Dirichlet, because torch.distributions takes no generator."""
    concentration = torch.full((count, 2), float(alpha), device=generator.device)
    return torch._sample_dirichlet(concentration, generator=generator)[:, 0].to(device, non_blocking=True)


def noise_like(images: Tensor, generator: torch.Generator) -> Tensor:
    deviation, mean = torch.std_mean(images.float(), dim=(2, 3), keepdim=True, correction=0)
    return (mean + deviation * normal(tuple(images.shape), images.device, generator)).to(images.dtype)
