"""Images as data URIs, so that the page needs no other file."""

import base64
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from gradmix.ssl.data.images import ImageSet

SHARP = 32  # images up to this side are shown with hard pixels, without loss


def data_uri(image: Image.Image, lossless: bool = False) -> str:
    """A picture as WebP inside an address."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=82, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail(images: ImageSet, index: int, side: int) -> Image.Image | None:
    """One image, at most ``side`` wide; None when its file is gone."""
    try:
        pixels = images[index][0]
    except (ValueError, OSError):
        return None
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return image if image.width <= side else image.resize((side, side), Image.Resampling.LANCZOS)


def sheet(images: ImageSet, indices: Sequence[int], columns: int, side: int) -> Image.Image:
    """A grid of thumbnails, row by row, as one picture; black where a file is gone."""
    side = min(side, images.size)
    pixels = np.zeros((-(-len(indices) // columns) * side, columns * side, 3), np.uint8)
    for number, index in enumerate(indices):
        image = thumbnail(images, int(index), side)
        if image is not None:
            top, left = number // columns * side, number % columns * side
            pixels[top : top + side, left : left + side] = np.asarray(image)
    return Image.fromarray(pixels)


def decode(encoded: bytes) -> Image.Image:
    """The picture in an encoded image file."""
    return Image.open(BytesIO(encoded)).convert("RGB")
