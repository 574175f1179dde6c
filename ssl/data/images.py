"""Images as the project sees them: uint8 RGB squares of one size, in memory or decoded on demand."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import InterpolationMode, center_crop, pad, pil_to_tensor, resize

from gradmix.ssl.data.listing import Files
from gradmix.ssl.data.reading import opened_image, orientation

# Mean and deviation per channel. ImageNet's, for every data set: the first BatchNorm absorbs the rest, and ImageNet
# weights fit in. Networks of timm's have their own.
Constants = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSet(Dataset[tuple[Tensor, int, int]]):
    """Images and labels.

    Attributes:
        labels: ``[N]`` int64: 0..K-1, or -1 for unknown classes and for images without a class.
        size: side S of the square that every image becomes.
        images: ``[N, 3, S, S]`` uint8, or None while they are only files.
        files: paths, or None when the images never were files.
        fit: how a file becomes a square, see :func:`to_square`.
        photographs: the files are larger than the square, and training views are cut from them.
        lenient: a file that can't be read is black. So it may be while training; what is measured is looked at before.
    """

    labels: Tensor
    size: int
    images: Tensor | None = None
    files: Sequence[str] | None = None
    fit: str = "crop"
    photographs: bool = False
    lenient: bool = False

    def __post_init__(self) -> None:
        if self.files is not None and not isinstance(self.files, Files):
            object.__setattr__(self, "files", Files(self.files))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """One image ``[3, S, S]`` uint8, its label and its index: what DataLoader workers ask for."""
        index = int(index)
        return self.image(index), int(self.labels[index]), index

    def image(self, index: int) -> Tensor:
        """``[3, S, S]`` uint8.

        Raises:
            ValueError: its file can't be read, and the set is not ``lenient``.
        """
        if self.images is not None:
            return self.images[index]
        try:
            return decode(self.paths[index], self.size, self.fit)
        except ValueError:
            if self.lenient:
                return torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            raise

    @property
    def pixels(self) -> Tensor:
        """``images``, which must be in memory."""
        assert self.images is not None
        return self.images

    @property
    def paths(self) -> Files:
        """``files``, which the images must be."""
        assert isinstance(self.files, Files)
        return self.files

    @property
    def bytes(self) -> int:
        """What the squares take in memory."""
        return len(self) * 3 * self.size**2

    def fingerprint(self) -> str:
        """Changes when images are added, removed, renamed or labelled otherwise; not when their folder moves."""
        names = [os.path.basename(file) for file in self.files or ()]
        return hashlib.sha256(json.dumps([self.labels.tolist(), names]).encode()).hexdigest()

    def select(self, indices: Tensor) -> "ImageSet":
        """The images at ``indices`` (int64), in that order."""
        return replace(
            self,
            labels=self.labels[indices],
            images=None if self.images is None else self.images[indices],
            files=None if self.files is None else self.paths.select(indices),
        )


def decode(path: str | Path, size: int, fit: str = "crop") -> Tensor:
    """An image file as ``[3, size, size]`` uint8 RGB, the whole image as :func:`to_square` has it.

    Raises:
        ValueError: the file is missing or no image that can be read in full; the message names it.
    """
    with opened_image(str(path)) as image:
        return to_square(image, size, fit)


def to_square(image: Image.Image, size: int, fit: str = "crop") -> Tensor:
    """A PIL image as ``[3, size, size]`` uint8 RGB, upright.

    Args:
        fit: ``crop``: the shorter side becomes ``size``, then the middle is cut out; ``pad``: the longer side does,
            and black is put around it; ``squash``: both do.
    """
    image = upright(image)
    if fit == "crop":
        longest = 4 * min(image.size)  # a thin strip would be enlarged to any size, for a square of it
        if max(image.size) > longest:
            image = center_crop(image, [min(image.height, longest), min(image.width, longest)])
    image = rgb(image)
    if image.size == (size, size):
        return pil_to_tensor(image)
    if fit == "crop":
        return pil_to_tensor(center_crop(resize(image, size, InterpolationMode.BILINEAR, antialias=True), size))
    share = size / max(image.size)
    height, width = (size, size) if fit == "squash" else (max(1, round(side * share)) for side in image.size[::-1])
    image = resize(image, [height, width], InterpolationMode.BILINEAR, antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    return pil_to_tensor(pad(image, [left, top, size - width - left, size - height - top]))


def upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says."""
    return image if orientation(image) == 1 else ImageOps.exif_transpose(image)  # unasked it would be copied


def rgb(image: Image.Image) -> Image.Image:
    """To 8 bits of red, green and blue; 16 bits and fractions are scaled, where ``convert("RGB")`` would clip them, and
    what is transparent lies on white, where it would show the colour that the file hides.

    Raises:
        ValueError: the pixels are fractions, and not all of them between 0 and 1.
    """
    if image.mode.startswith("I"):  # 16 bits, see opened_image
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        pixels = np.asarray(image)
        if not 0 <= pixels.min() <= pixels.max() <= 1:  # nor where one is not a number
            raise ValueError(f"pixels from {pixels.min():g} to {pixels.max():g}; floats go from 0 to 1")
        image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turned as EXIF says, and in RGB."""
    return rgb(upright(image))


def from_array(array: np.ndarray, size: int | None) -> Tensor:
    """``[N, H, W]`` or ``[N, H, W, 3]`` uint8 to ``[N, 3, size, size]`` uint8.

    Raises:
        ValueError: no size.
    """
    if size is None:
        raise ValueError("data.image_size: null, chosen by the images, is for image files; give a number")
    images = torch.from_numpy(np.ascontiguousarray(array))
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if images.shape[2:] != (size, size):
        images = resize(images, [size, size], InterpolationMode.BILINEAR, antialias=True)
    return images.contiguous()


def normalize(images: Tensor, constants: Constants = IMAGENET) -> Tensor:
    """uint8, or floats in [0, 1], ``[..., 3, H, W]`` to the backbone's input: float, mean and deviation removed."""
    mean, std = constants
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return (images - _channels(mean, images)) / _channels(std, images)


def denormalize(images: Tensor, constants: Constants = IMAGENET) -> Tensor:
    """The inverse of :func:`normalize`, in [0, 1]; for pictures."""
    mean, std = constants
    return (images * _channels(std, images) + _channels(mean, images)).clamp(0, 1)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.cat([like.new_full((1, 1, 1), value) for value in values])  # torch.tensor's copy makes a GPU wait
