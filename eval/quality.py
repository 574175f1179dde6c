"""How good features are before anyone classifies with them: spread, rank, and how tight the classes are."""

import numpy as np

from gradmix.eval.detectors.class_mean import class_means
from gradmix.eval.features.arrays import Array, blocks, check_features, check_labels, unit_rows


def alignment(first: Array, second: Array) -> float:
    """Mean squared distance of L2-normalised features of two views of the same images, both `[N, F]`; lower is closer.

    Wang & Isola, arXiv 2005.10242, alpha = 2.

    Raises:
        ValueError: bad arrays, or two of different shapes.
    """
    first = check_features("first", first)
    second = check_features("second", second, width=first.shape[1])
    if len(first) != len(second):
        raise ValueError(f"second: expected {len(first)} features, got {len(second)}")
    return float(np.square(unit_rows(first) - unit_rows(second)).sum(axis=1, dtype=np.float64).mean())


def uniformity(features: Array, most: int = 4096) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of L2-normalised features `[N, F]`; lower is more spread out.

    Wang & Isola, arXiv 2005.10242, t = 2. Of more than `most` features, evenly spaced ones stand for all.

    Raises:
        ValueError: a bad array, or fewer than two features.
    """
    rows = check_features("features", features)
    if len(rows) < 2:
        raise ValueError(f"features: uniformity needs two, got {len(rows)}")
    unit = unit_rows(rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)]).astype(np.float64)
    kernel = np.exp(4 * (unit @ unit.T) - 4)  # |x - y|^2 = 2 - 2 cos
    pairs = len(unit) * (len(unit) - 1)
    return float(np.log((kernel.sum() - np.trace(kernel)) / pairs))


def effective_rank(features: Array) -> float:
    """exp of the entropy of the singular values of `[N, F]`, from 1 to F. RankMe, Garrido et al., arXiv 2210.02885."""
    rows = check_features("features", features)
    if len(rows) < rows.shape[1]:
        values = np.linalg.svd(np.asarray(rows, np.float64), compute_uv=False)
    else:  # of many rows by their Gram matrix, block by block
        gram = np.zeros((rows.shape[1], rows.shape[1]))
        for block in blocks(rows.shape):
            part = np.asarray(rows[block], np.float64)
            gram += part.T @ part
        values = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0))
    total = values.sum()
    share = values / total if total > 0 else np.eye(1, len(values))[0]
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def class_spread(features: Array, labels: Array) -> float:
    """trace(within-class covariance times pseudo-inverse of the between-class one) / K; 0 when classes are points.

    NC1 of neural collapse, Papyan et al., arXiv 2008.08186. Features `[N, F]`, integer labels `[N]` of K classes.
    Infinite when all class means are one point in float32: there the pseudo-inverse of 0 is 0, and so would be the best
    of all values for features that tell no class from another.

    Raises:
        ValueError: bad arrays, or labels of one class only.
    """
    rows = check_features("features", features)
    labels = check_labels("labels", labels, len(rows))
    classes, positions = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels: class_spread needs two classes, got only {classes[0]}")
    means = class_means(rows, positions, len(classes))
    # the between-class covariance has rank K - 1 at most: its pseudo-inverse from the K means, no [F, F] array
    _, spread, directions = np.linalg.svd((means - means.mean(axis=0)) / np.sqrt(len(classes)), full_matrices=False)
    scale = np.sqrt(sum(np.square(rows[block], dtype=np.float64).sum() for block in blocks(rows.shape)) / len(rows))
    if spread[0] <= np.finfo(np.float32).eps * scale:
        return np.inf
    kept = spread > 1e-10 * spread[0]  # the rest is rounding, which an inverse would blow up
    whitening = directions[kept].T / spread[kept]  # [F, K - 1]
    total = sum(np.square((rows[block] - means[positions[block]]) @ whitening).sum() for block in blocks(rows.shape))
    return float(total / len(rows) / len(classes))
