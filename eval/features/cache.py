"""What a network's features depend on, as keys; the features of a key; and a watch that the network stays as it was."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmix.eval.features.mapped import Arrays, map_arrays, write_arrays
from gradmix.ssl.data.images import Constants, ImageSet
from gradmix.ssl.data.reading import content, stamp


def weights_key(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, by name, type, shape and bits."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def images_key(images: ImageSet, constants: Constants) -> str:
    """SHA-256 of the pixels, or where there are files of their names, sizes and times; of the labels; the transform."""
    mean, std = constants
    fit = "" if images.fit == "crop" else f" {images.fit}"
    digest = hashlib.sha256(f"{images.size} {mean} {std}{fit}".encode())
    digest.update(images.labels.numpy().data)
    if images.files is None:
        digest.update(images.pixels.numpy().data)
    for name in images.files or ():
        size, changed = stamp(name)
        digest.update(f"{name} {size} {changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def image_hashes(images: ImageSet, read: bool = True) -> Tensor:
    """Which images these are, ``[N]`` int64: of the file's bytes, or of the pixels where there never was a file.

    Args:
        read: False where there are no images: of the paths, or only the row.
    """
    if not read:
        names = range(len(images)) if images.files is None else images.files
        contents: Iterable[bytes] = (str(name).encode(errors="surrogateescape") for name in names)
    elif images.files is not None:
        contents = map(content, images.files)
    else:
        contents = (image.numpy().tobytes() for image in images.pixels)
    return torch.tensor([int.from_bytes(hashlib.sha256(c).digest()[:8], "big", signed=True) for c in contents])


def cached_arrays(path: Path, key: str) -> Arrays | None:
    """The arrays of a file with this key, mapped; writing to them does not reach the file. None: there is no such."""
    try:
        metadata, arrays = map_arrays(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, damaged or of another version: it is made again
    return arrays if metadata.get("key") == key else None


def kept_arrays(
    path: Path, key: str, shapes: Mapping[str, tuple[str, tuple[int, ...]]], fill: Callable[[Arrays], None]
) -> Arrays:
    """As :func:`cached_arrays`, of a file that is written first where there is no such; see :func:`write_arrays`."""
    arrays = cached_arrays(path, key)
    if arrays is None:
        write_arrays(path, shapes, fill, {"key": key})
        arrays = map_arrays(path)[1]
    return arrays


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network in eval mode; afterwards every part of it is in the mode that it had.

    Raises:
        RuntimeError: a bit of its weights or of BatchNorm's statistics changed meanwhile.
    """
    before, modes = weights_key(network), {module: module.training for module in network.modules()}
    network.eval()
    yield
    if weights_key(network) != before:
        raise RuntimeError("the evaluation changed weights or BatchNorm statistics of a network that must be frozen")
    for module, training in modes.items():
        module.training = training
