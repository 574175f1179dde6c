"""Configuration of gradmix-eval and gradmix-score: every key with its type, default and meaning."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class EvalConfig:
    run: str = MISSING  # folder of a trained run, or of a run with data.split=all
    out: str | None = None  # folder for the results, instead of the run's own
    detectors: list[str] | None = None  # instead of the run's own, NAME or NAME@projections
    detector_options: dict[str, Any] = field(default_factory=dict)  # over the run's own: detector_options.deep_knn.k=10
    root: str | None = None  # where the run's data lies now, if it moved
    unknown_root: str | None = None  # folder of images, any depth: the unknown images, instead of the run's own
    against: str | None = None  # folder of another run: compare the two, on what each said of the same test images
    corruptions: str | None = None  # folder in CIFAR-10-C's or TinyImageNet-C's layout; make: the 15 kinds made here


@dataclass
class ScoreConfig:
    detector: str = MISSING  # a run's detector/ folder
    images: str = MISSING  # an image, a folder or a pattern
    out: str = "scores.csv"  # .csv, or .jsonl for JSON lines
    batch_size: int = 256
    explain: str | None = None  # folder for picture sheets: every image beside its 5 nearest training images
    explain_limit: int = 200  # images on the sheets
