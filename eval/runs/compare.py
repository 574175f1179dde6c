"""Which of two runs is better, on the same test images: paired bootstrap of what each detector said of each image."""

from pathlib import Path

import torch
from torch import Tensor

from gradmix.eval import metrics
from gradmix.eval.catalogue import metric_of
from gradmix.ssl.networks.weights import load_weights


def compare(first: Path, second: Path) -> dict[str, metrics.Interval]:
    """Differences ``first - second`` with 95 % intervals, by ``<detector>/auroc`` and ``<detector>/oscr``.

    Args:
        first, second: folders of two evaluated runs. Every detector that both have is compared.

    Raises:
        ValueError: a run without scores, other test images or other known classes, no known or no unknown test images,
            or no detector in common.
    """
    ours, theirs = load_scores(first), load_scores(second)
    for name, what in (("images", "the test images"), ("labels", "the known classes of the test images")):
        if not torch.equal(ours[name], theirs[name]):
            raise ValueError(
                f"against: {what} of {first} and {second} differ; compare runs with the same data, split and image size"
            )
    known = ours["labels"] >= 0
    for side, absent in (("known", not known.any()), ("unknown", known.all())):
        if absent:
            raise ValueError(
                f"against: the test set of {first} and {second} has no {side} images, so there is nothing to tell apart"
            )
    differences = {}
    for key in ours:
        name, _, part = key.partition("/")
        if part != "score" or not {key, f"{name}/correct"} <= set(ours) & set(theirs):
            continue
        before, after = ((run[key][known], run[key][~known]) for run in (theirs, ours))
        differences[f"{name}/auroc"] = metrics.paired_bootstrap(metrics.auroc, before, after)
        was_right, is_right = (run[f"{name}/correct"][known] for run in (theirs, ours))
        differences[f"{name}/oscr"] = metrics.paired_bootstrap(metrics.oscr, (*before, was_right), (*after, is_right))
    if not differences:
        raise ValueError(f"against: {first} and {second} have no detector in common")
    return differences


def load_scores(run: Path) -> dict[str, Tensor]:
    """A run's scores: ``labels``, ``images``, ``<detector>/score`` and ``<detector>/correct``, all ``[N]``.

    Raises:
        ValueError: missing or damaged.
    """
    path = run / "features" / "scores.safetensors"
    if not path.is_file():
        raise ValueError(f"{run}: no scores of detectors there; gradmix-eval run={run} writes them")
    scores = load_weights(path)
    for name in ("labels", "images"):
        if name not in scores:
            raise ValueError(f"{path}: {name}: missing")
    for name, tensor in scores.items():
        if tensor.shape != scores["labels"].shape or tensor.ndim != 1:
            raise ValueError(f"{path}: {name!a:.60}: expected one number for every test image")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name!a:.60}: non-finite values")
    return scores


def comparison_table(first: Path, second: Path, differences: dict[str, metrics.Interval]) -> str:
    """The differences as text, in percentage points."""
    lines = [
        "",
        f"{first} minus {second}, percentage points, with 95 % intervals (paired bootstrap over the test images)",
    ]
    for key, (value, low, high) in differences.items():
        name, _ = key.split("/")
        label = f"{'deep_knn on pixels' if name == 'pixels' else name} {metric_of(f'osr/{key}').title}"
        lines.append(f"  {label:<32}{100 * value:>+8.2f} [{100 * low:+.2f}, {100 * high:+.2f}]")
    lines.append(
        "the interval is over the test images of these two trainings; "
        "other seeds may turn it round: gradmix-compare over five seeds"
    )
    return "\n".join(lines)
