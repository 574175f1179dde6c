"""Feature arrays: checked, normalised, and cut into blocks so that memory stays bounded whatever N is.

Features are `[N, F]`: numpy arrays, memory-mapped ones too, or tensors on any device.
"""

import numpy as np
import numpy.typing as npt
import torch

from gradmix.eval.counted import counted

Array = np.ndarray | torch.Tensor
BLOCK = 2**23  # values per block: 32 MiB in float32, 16,384 rows of 512


def check_features(name: str, features: Array, width: int | None = None) -> np.ndarray:
    """Features as a numpy array `[N, F]` of any number type, without a copy where that is possible.

    Raises ValueError, with `name` and the value in it, unless they are two-dimensional, non-empty, finite in
    float32 and `width` wide.
    """
    if isinstance(features, torch.Tensor):
        features = to_numpy(features.float() if features.is_floating_point() else features)
    if not isinstance(features, np.memmap):
        features = np.asarray(features)
    if features.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected numbers, got {features.dtype}")
    columns = "F" if width is None else width
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        raise ValueError(f"{name}: expected [N, {columns}], got shape {features.shape}")
    if features.size == 0:
        raise ValueError(f"{name}: empty, shape {features.shape}")
    if features.dtype.kind == "f":
        _check_finite(name, features)
    return features


def to_numpy(values: torch.Tensor) -> np.ndarray:
    """On the host; bfloat16, which numpy does not have, as float32."""
    values = values.detach().cpu()
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()


def _check_finite(name: str, features: np.ndarray) -> None:
    count, first = 0, None
    for rows in blocks(features.shape):
        bad = ~np.isfinite(float32(features[rows]))
        if bad.any():
            count += int(bad.sum())
            first = rows.start + int(bad.any(axis=1).argmax()) if first is None else first
    if count:
        raise ValueError(f"{name}: {counted(count, 'non-finite value')}, first in row {first}")


def check_labels(name: str, labels: Array, count: int) -> np.ndarray:
    """Integer labels `[count]` as numpy int64. Raises ValueError otherwise."""
    labels = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"{name}: expected one for each of {count} features, got shape {labels.shape}")
    return labels.astype(np.int64)


def check_k(k: int, count: int) -> None:
    """Raises ValueError unless k is a whole number, 1 <= k <= count."""
    if k < 1:
        raise ValueError(f"k={k} is smaller than 1")
    if k != int(k):
        raise ValueError(f"k={k} is no whole number")
    if k > count:
        raise ValueError(f"k={k} is larger than the number of reference features, {count}")


def like(values: np.ndarray, reference: Array) -> Array:
    """Numpy `values` as what `reference` is: numpy, or a tensor on the same device."""
    if isinstance(reference, torch.Tensor):
        return torch.from_numpy(values).to(reference.device)
    return values


def blocks(shape: tuple[int, ...]) -> list[slice]:
    """Slices that cut `shape[0]` rows into blocks of at most `BLOCK` values."""
    step = max(1, BLOCK // shape[1])
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32. A row of zeros stays zero: its cosine with everything is 0."""
    unit = np.empty(features.shape, np.float32)
    for rows in blocks(features.shape):
        block = np.asarray(features[rows])
        # in float64, because squares of float32 values overflow float32; cast piece by piece, without a copy
        norm = np.sqrt(np.einsum("nf,nf->n", block, block, dtype=np.float64))[:, None]
        np.divide(block, np.where(norm == 0, 1, norm), out=unit[rows], casting="same_kind")
    return unit


def float32(values: npt.ArrayLike) -> np.ndarray:
    """As contiguous float32; what is too large for it becomes infinite."""
    with np.errstate(over="ignore"):  # what doesn't fit becomes infinite, which is then reported
        return np.ascontiguousarray(values, dtype=np.float32)
