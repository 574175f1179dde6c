"""Which of two runs is better, on the same test images: paired bootstrap of what each detector said of each image."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gradmix.eval import metrics
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.reading import content


def image_hashes(images: ImageSet) -> Tensor:
    """Which images these are, ``[N]`` int64: of the file's bytes, or of the pixels where there never was a file."""
    if images.files is not None:
        contents = map(content, images.files)
    else:
        contents = (image.numpy().tobytes() for image in images.images)
    return torch.tensor([int.from_bytes(hashlib.sha256(c).digest()[:8], "big", signed=True) for c in contents])


def compare(first: Path, second: Path) -> dict[str, metrics.Interval]:
    """Differences ``first - second`` with 95 % intervals, by ``<detector>/auroc`` and ``<detector>/oscr``.

    Args:
        first, second: folders of two evaluated runs. Every detector that both have is compared.

    Raises:
        ValueError: a run without scores, other test images or other known classes, or no detector in common.
    """
    ours, theirs = load_scores(first), load_scores(second)
    for name, what in (("images", "the test images"), ("labels", "the known classes of the test images")):
        if not torch.equal(ours[name], theirs[name]):
            raise ValueError(
                f"against: {what} of {first} and {second} differ; compare runs with the same data, split and image size"
            )
    known = ours["labels"] >= 0
    differences = {}
    for key in ours:
        name, _, part = key.partition("/")
        if part != "score" or key not in theirs:
            continue
        sides = [(run[key][known], run[key][~known]) for run in (theirs, ours)]
        correct = [run[f"{name}/correct"][known] for run in (theirs, ours)]
        differences[f"{name}/auroc"] = metrics.paired_bootstrap(metrics.auroc, *sides)
        with_correct = [(*side, right) for side, right in zip(sides, correct, strict=True)]
        differences[f"{name}/oscr"] = metrics.paired_bootstrap(metrics.oscr, *with_correct)
    if not differences:
        raise ValueError(f"against: {first} and {second} have no detector in common")
    return differences


def load_scores(run: Path) -> dict[str, Tensor]:
    """A run's scores: ``labels``, ``images``, ``<detector>/score`` and ``<detector>/correct``, all ``[N]``."""
    path = run / "features" / "scores.safetensors"
    if not path.is_file():
        raise ValueError(f"{run}: no scores of an open-set evaluation there; gradmix-eval run={run} writes them")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def comparison_table(first: Path, second: Path, differences: dict[str, metrics.Interval]) -> str:
    """The differences as text, in percentage points."""
    lines = [
        "",
        f"{first} minus {second}, percentage points, with 95 % intervals (paired bootstrap over the test images)",
    ]
    for key, (value, low, high) in differences.items():
        name, metric = key.split("/")
        label = f"{'deep_knn on pixels' if name == 'pixels' else name} {metric.upper()}"
        lines.append(f"  {label:<32}{100 * value:>+8.2f} [{100 * low:+.2f}, {100 * high:+.2f}]")
    return "\n".join(lines)
