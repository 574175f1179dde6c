"""How large image files are, from the headers of a sample: what decides how a folder is treated."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gradmix.ssl.data.reading import opened_image
from gradmix.ssl.machine import usable_cpus

SAMPLE = 512  # files, evenly spread over the list
IMAGE_SIZES = (32, 64, 128, 224)


def sample_sizes(files: Sequence[str]) -> np.ndarray:
    """Width and height ``[n, 2]`` of up to ``SAMPLE`` files; those that can't be read are left out."""
    rows = np.unique(np.linspace(0, len(files) - 1, min(len(files), SAMPLE)).astype(int))

    def size_of(row: int) -> tuple[int, int] | None:
        try:
            with opened_image(files[row]) as image:
                return image.size
        except ValueError:
            return None

    with ThreadPoolExecutor(usable_cpus()) as pool:
        return np.array([size for size in pool.map(size_of, rows) if size is not None]).reshape(-1, 2)


def usual_image_size(sizes: np.ndarray) -> int:
    """The largest of ``IMAGE_SIZES`` that half of the images have on their shorter side; the smallest if none."""
    side = np.median(sizes.min(axis=1)) if len(sizes) else 0
    return max((size for size in IMAGE_SIZES if size <= side), default=IMAGE_SIZES[0])
