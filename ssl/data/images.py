"""Images as the project sees them: uint8 RGB squares of one size, in memory or decoded on demand."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize

# Rasters only: for some of its other formats Pillow starts programs (PostScript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = frozenset(extension for extension, kind in Image.registered_extensions().items() if kind in FORMATS)
MAX_PIXELS = 89_478_485  # Pillow's limit, a quarter of a GiB as RGB: more is a decompression bomb
# Mean and deviation per channel. ImageNet's, for every data set: the first BatchNorm absorbs the rest, and ImageNet
# weights fit in. Networks of timm's have their own.
Constants = tuple[tuple[float, float, float], tuple[float, float, float]]
MEAN, STD = IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSet:
    """Images and labels.

    Attributes:
        labels: ``[N]`` int64: 0..K-1, or -1 for unknown classes and for images without a class.
        size: side S of the square that every image becomes.
        images: ``[N, 3, S, S]`` uint8, or None while they are only files.
        files: paths, or None when the images never were files.
    """

    labels: Tensor
    size: int
    images: Tensor | None = None
    files: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """One image ``[3, S, S]`` uint8, its label and its index: what DataLoader workers ask for."""
        index = int(index)
        image = self.images[index] if self.images is not None else decode(self.files[index], self.size)
        return image, int(self.labels[index]), index

    def fingerprint(self) -> str:
        """Changes when images are added, removed, renamed or labelled otherwise; not when their folder moves."""
        names = [Path(file).name for file in self.files or ()]
        return hashlib.sha256(json.dumps([self.labels.tolist(), names]).encode()).hexdigest()

    def select(self, indices: Tensor) -> "ImageSet":
        """The images at ``indices`` (int64), in that order."""
        return ImageSet(
            self.labels[indices],
            self.size,
            None if self.images is None else self.images[indices],
            None if self.files is None else [self.files[i] for i in indices.tolist()],
        )


def decode(path: str | Path, size: int) -> Tensor:
    """An image file as ``[3, size, size]`` uint8 RGB: upright, shorter side scaled to ``size``, centre cropped.

    Raises:
        ValueError: the file is missing or no image that can be read in full; the message names it.
    """
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return to_square(image, size)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path}: not a readable image ({error or type(error).__name__})") from error


def to_square(image: Image.Image, size: int) -> Tensor:
    """A PIL image as ``[3, size, size]`` uint8 RGB."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # without the question it would be copied
        image = ImageOps.exif_transpose(image)
    longest = 4 * min(image.size)  # a thin strip would be enlarged to any size, for a square of it
    if max(image.size) > longest:
        image = center_crop(image, [min(image.height, longest), min(image.width, longest)])
    if image.mode.startswith("I"):  # 16 bit: convert("RGB") would clip everything above 255
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.size != (size, size):
        image = center_crop(resize(image, size, InterpolationMode.BILINEAR, antialias=True), size)
    return pil_to_tensor(image)


def from_array(array: np.ndarray, size: int) -> Tensor:
    """``[N, H, W]`` or ``[N, H, W, 3]`` uint8 to ``[N, 3, size, size]`` uint8."""
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


def list_images(folder: Path) -> list[str]:
    """Image files in ``folder`` and below, by extension, sorted; hidden files are left out."""
    return sorted(
        str(path)
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )
