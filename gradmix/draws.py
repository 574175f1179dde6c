"""Random numbers for mixers, drawn where the generator lives and then moved: one on the CPU serves a GPU's images."""

import torch
from torch import Tensor

SMALL_ALPHA = 0.1  # below it both Gammas of a Dirichlet may be 0 (float32 on a GPU), and it answers 1/2


def uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """In [0, 1), float32, on ``device``."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device, non_blocking=True)


def normal(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Standard normal, float32, on ``device``."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device, non_blocking=True)


def random_pixels(count: int, size: tuple[int, int], device: torch.device, generator: torch.Generator) -> Tensor:
    """Pixel positions (row, column), ``[count, 2]`` int64."""
    u = uniform((count, 2), device, generator)
    return torch.stack([u[:, 0] * size[0], u[:, 1] * size[1]], 1).long()


def beta(count: int, alpha: float, device: torch.device, generator: torch.Generator) -> Tensor:
    """Beta(alpha, alpha), ``[count]`` float32 in [0, 1], for any alpha > 0."""
    if alpha >= SMALL_ALPHA:
        return _dirichlet(count, alpha, generator).to(device, non_blocking=True)
    # Gamma(alpha) is Gamma(alpha + 1) * U ** (1 / alpha), Beta(alpha, alpha) is G / (G + G'). As logarithms, nothing
    # underflows: what is left of the two Gammas of alpha + 1 is the odds of a Beta(alpha + 1, alpha + 1).
    odds = _dirichlet(count, alpha + 1, generator).logit()
    powers = torch.log1p(-torch.rand((2, count), generator=generator, device=generator.device)) / alpha
    return torch.sigmoid(odds + powers[0] - powers[1]).to(device, non_blocking=True)


def _dirichlet(count: int, alpha: float, generator: torch.Generator) -> Tensor:
    # A private function of torch's, because no public one takes a generator: torch.distributions draws from the global
    # one only, whose state would have to be swapped for every call (on a GPU, waiting for it).
    concentration = torch.full((count, 2), float(alpha), device=generator.device)
    return torch._sample_dirichlet(concentration, generator=generator)[:, 0]


def noise_like(images: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise ``[N, C, H, W]`` with each image's own mean and deviation per channel."""
    deviation, mean = torch.std_mean(images.float(), dim=(2, 3), keepdim=True, correction=0)
    return (mean + deviation * normal(tuple(images.shape), images.device, generator)).to(images.dtype)
