"""Two random views of every image, whole batches on the device (kornia).

Parameters are drawn for each view by itself; only the order of the jitter's four steps is one for the whole batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import kornia.augmentation as K
import torch
from kornia.augmentation.random_generator import CropGenerator, ResizedCropGenerator
from torch import Tensor, nn

from gradmix.ssl.config import AugmentConfig
from gradmix.ssl.data.images import IMAGENET, Constants, normalize


class TwoViews(nn.Module):
    """uint8 ``[B, 3, S, S]`` to normalised float views ``[2B, 3, S, S]``, view-major; or another number of views.

    Of ``[B, V, 3, S, S]``, views that were cut from photographs, the first two are taken as they are, without a crop.

    Crop, rotation, flip, colour jitter, greyscale, blur: SimCLR's (arXiv 2002.05709), as far as the config has them.
    """

    def __init__(self, config: AugmentConfig, size: int, views: int = 2, constants: Constants = IMAGENET):
        super().__init__()
        self.views, self.constants = views, constants
        c = config
        # Resampling through grid_sample crops the whole batch at once; "slice" would go image by image.
        area, ratio = (c.crop[0], c.crop[1]), (c.ratio[0], c.ratio[1])  # a list, out of a file
        self.crop = K.RandomResizedCrop((size, size), area, ratio, cropping_mode="resample")
        self.crop._param_generator = CropSizes((size, size), area, ratio)
        steps: list[nn.Module] = []
        if c.rotate:
            steps.append(K.RandomRotation(c.rotate, p=1.0))
        if c.flip:
            steps.append(K.RandomHorizontalFlip(p=c.flip))
        if c.jitter and (c.brightness or c.contrast or c.saturation or c.hue):
            steps.append(K.ColorJitter(c.brightness, c.contrast, c.saturation, c.hue, p=c.jitter))
        if c.greyscale:
            steps.append(K.RandomGrayscale(p=c.greyscale))
        if c.blur:
            kernel = max(3, size // 10 // 2 * 2 + 1)  # a tenth of the image, odd
            steps.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=c.blur))
        self.steps = nn.Sequential(*steps)

    @torch.no_grad()
    def forward(self, images: Tensor, seed: int) -> Tensor:
        """See the class.

        Args:
            images: uint8, on any device.
            seed: everything random follows from it; the global RNG is as before.
        """
        cut = images.ndim == 5
        images = images[:, : self.views].transpose(0, 1).flatten(0, 1) if cut else images
        views = images.float().div(255)
        # In half precision, kornia's crops lie beside their places, with dark rims.
        with forked_rng(seed, images.device), torch.autocast(images.device.type, enabled=False):
            views = self.steps(views if cut else self.crop(views.repeat(self.views, 1, 1, 1)))
        return normalize(views.clamp(0, 1), self.constants)


class CropSizes(ResizedCropGenerator):
    """Areas and ratios as torchvision's RandomResizedCrop draws them: the first of ten that fit, or as much as fits.

    So does kornia from 0.9 on, with the same random numbers. Before (and Python 3.10 gets no 0.9), it takes no crop as
    wide or as high as the image, exchanges height and width, and stretches what it takes instead.
    """

    def forward(self, batch_shape: tuple[int, ...], same_on_batch: bool = False) -> dict[str, Tensor]:
        """As kornia's: the parameters of one crop for each image."""
        (height, width), (low, high) = batch_shape[-2:], self.scale
        area = (self.rand_sampler.rsample((batch_shape[0], 10)) * (high - low) + low) * height * width
        ratio = self.log_ratio_sampler.rsample((batch_shape[0], 10)).exp()
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # [B, 10]
        fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
        first = fits.int().argmax(dim=1, keepdim=True)  # of equal ones the first
        least, most = self.ratio
        whole_h, whole_w = min(height, round(width / least)), min(width, round(height * most))
        h = torch.where(fits.any(1), h.gather(1, first)[:, 0], whole_h)
        w = torch.where(fits.any(1), w.gather(1, first)[:, 0], whole_w)
        self.size = torch.stack([h, w], dim=1)
        return CropGenerator.forward(self, batch_shape, same_on_batch)


@contextmanager
def forked_rng(seed: int, device: torch.device) -> Iterator[None]:
    """The global RNG, seeded, inside; as if nothing had been drawn, outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
