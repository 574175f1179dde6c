"""The mixers that GradMix is compared with, and all mixers by name."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gradmix.boxes import kept_fraction, paste, resize_into
from gradmix.draws import beta, normal, random_pixels, uniform
from gradmix.gradmix import GradMix
from gradmix.mixer import Mixed, Mixer, positive, share_range
from gradmix.registry import Registry


class CutMix(Mixer):
    """A box at a uniformly random place is cut from the partner (arXiv 1905.04899), per-image lam ~ Beta(alpha, alpha).

    The box is clipped at the border, as in the paper; ``kept`` counts the pixels after clipping.
    """

    def __init__(self, alpha: float = 1.0, partner: str = "random"):
        super().__init__(partner)
        self.alpha = positive("alpha", alpha)

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        rows, _, height, width = images.shape
        share = (1 - beta(rows, self.alpha, images.device, generator)).sqrt()
        centres = random_pixels(rows, (height, width), images.device, generator)
        sides = torch.stack([share * height, share * width], 1).long()
        start = centres - sides // 2
        bottom, right = (start + sides).unbind(1)
        end = torch.stack([bottom.clamp(max=height), right.clamp(max=width)], 1)
        boxes = torch.cat([start.clamp(min=0), end], 1)
        kept = kept_fraction(boxes, (height, width))
        return Mixed(paste(images, images[partner], boxes), kept, partner, boxes=boxes)


class ResizeMix(Mixer):
    """The whole partner, shrunk to a random share of the sides, at a random place (arXiv 2012.11101).

    Args:
        scale: smallest and largest share of the image's sides that the pasted partner takes.
    """

    def __init__(self, scale: tuple[float, float] = (0.1, 0.8), partner: str = "random"):
        super().__init__(partner)
        self.scale = share_range("scale", scale)

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        rows, _, height, width = images.shape
        low, high = self.scale
        share = low + (high - low) * uniform((rows,), images.device, generator)
        sides = torch.stack([share * height, share * width], 1).round()
        room = torch.stack([height - sides[:, 0], width - sides[:, 1]], 1) + 1
        start = (uniform((rows, 2), images.device, generator) * room).long()
        boxes = torch.cat([start, start + sides.long()], 1)
        filling = resize_into(images[partner], boxes)
        return Mixed(paste(images, filling, boxes), kept_fraction(boxes, (height, width)), partner, boxes=boxes)


class MixUp(Mixer):
    """Each image is blended with its partner (arXiv 1710.09412); ``kept`` is its share lam ~ Beta(alpha, alpha)."""

    def __init__(self, alpha: float = 1.0, partner: str = "random"):
        super().__init__(partner)
        self.alpha = positive("alpha", alpha)

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        lam = beta(images.shape[0], self.alpha, images.device, generator).to(images.dtype)  # as the blend has it
        return Mixed(torch.lerp(images[partner], images, lam[:, None, None, None]), lam.float(), partner)


class FMix(Mixer):
    """A mask thresholded from low-frequency noise decides pixel by pixel (arXiv 2002.12047).

    Args:
        alpha: lam ~ Beta(alpha, alpha) per image is the share of pixels kept.
        decay: power with which the noise's spectrum falls; larger gives larger blobs.
    """

    def __init__(self, alpha: float = 1.0, decay: float = 3.0, partner: str = "random"):
        super().__init__(partner)
        self.alpha = positive("alpha", alpha)
        self.decay = positive("decay", decay)

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        rows, _, height, width = images.shape
        device = images.device
        frequency = torch.hypot(
            torch.fft.fftfreq(height, device=device)[:, None], torch.fft.rfftfreq(width, device=device)
        ).clamp(min=1 / max(height, width))
        spectrum = torch.view_as_complex(normal((rows, *frequency.shape, 2), device, generator))
        noise = torch.fft.irfft2(spectrum / frequency**self.decay, s=(height, width))
        keep = (beta(rows, self.alpha, device, generator) * height * width).round()  # pixels
        rank = noise.flatten(1).argsort(1, descending=True).argsort(1).view_as(noise)
        mask = (rank < keep[:, None, None])[:, None]
        return Mixed(torch.where(mask, images, images[partner]), keep / (height * width), partner)


class ExtraView(Mixer):
    """The control of equal compute: nothing is mixed in. The images to give it are two more views of the same."""

    def __init__(self) -> None:
        super().__init__()

    def _mix(self, images: Tensor, partner: Tensor, attribution: Tensor | None, generator: torch.Generator) -> Mixed:
        rows = len(images)
        return Mixed(images, torch.ones(rows, device=images.device), torch.arange(rows, device=images.device))


MIXERS: Registry[Callable[..., Mixer]] = Registry(
    "gradmix.mixers",
    {
        "gradmix": GradMix,
        "random_box": partial(GradMix, centre="random"),
        "noise_box": partial(GradMix, paste="noise"),
        "cutmix": CutMix,
        "mixup": MixUp,
        "resizemix": ResizeMix,
        "fmix": FMix,
        "extra_view": ExtraView,
    },
)
