"""Configuration of gradmix-eval and gradmix-score: every key with its type, default and meaning."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class EvalConfig:
    run: str = MISSING  # folder of a trained run
    detectors: list[str] | None = None  # instead of the run's own, NAME or NAME@projections
    root: str | None = None  # where the run's data lies now, if it moved


@dataclass
class ScoreConfig:
    detector: str = MISSING  # a run's detector/ folder
    images: str = MISSING  # an image, a folder or a pattern
    out: str = "scores.csv"  # .csv, or .jsonl for JSON lines
    batch_size: int = 256
