"""Configuration of gradmix-eval and gradmix-score: every key with its type, default and meaning."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gradmix.ssl.config import DataConfig


@dataclass
class EncoderName:
    """Which network a checkpoint is of."""

    name: str = ""  # of the checkpoint's network
    width: int | None = None  # null: read off conv1
    stem: str | None = None  # null: read off conv1; padded: solo-learn's for CIFAR, which looks like small in the file


@dataclass
class TrainedProbe:
    """Training on augmented images, for protocols=[augmented] and [finetune]."""

    optimizer: str = "sgd"  # sgd (Nesterov momentum 0.9) or lars
    epochs: int = 90
    batch_size: int = 256
    base_lr: float | None = None  # for a batch of 256; null: 0.1 augmented, 0.02 finetune
    weight_decay: float = 0.0


@dataclass
class EvalConfig:
    run: str | None = None  # folder of a trained run, or of a run with data.split=all
    checkpoint: str | None = None  # instead of a run, weights trained anywhere; needs encoder=, data= and out=
    encoder: EncoderName = field(default_factory=EncoderName)
    # other data than the run's own: features trained there, evaluated here
    data: DataConfig = field(default_factory=lambda: DataConfig(name="", holdout=0.0))
    out: str | None = None  # folder for the results, instead of the run's own (with data=: RUN/transfer-DATA)
    detectors: list[str] | None = None  # instead of the run's own, NAME or NAME@projections
    detector_options: dict[str, Any] = field(default_factory=dict)  # over the run's own: detector_options.deep_knn.k=10
    root: str | None = None  # where the run's data lies now, if it moved
    unknown_root: str | None = None  # folder of images, any depth: the unknown images, instead of the run's own
    knn_k: list[int] = field(default_factory=list)  # beside the run's own k: one search, many answers
    knn_temperature: list[float] = field(default_factory=list)  # beside the run's own; every k with every temperature
    protocols: list[str] = field(default_factory=list)  # beside the cached probe: augmented, finetune
    probe: TrainedProbe = field(default_factory=TrainedProbe)
    measures: list[str] = field(default_factory=list)  # beside the usual: those of other packages, by name
    few_labels: list[Any] = field(default_factory=list)  # probes on few labels: 1%, 10%, or images per class
    export: list[str] = field(default_factory=list)  # instead of evaluating: safetensors, onnx, torch_export
    against: str | None = None  # folder of another run: compare the two, on what each said of the same test images
    corruptions: str | None = None  # folder in CIFAR-10-C's or TinyImageNet-C's layout; make: the 15 kinds made here


@dataclass
class ScoreConfig:
    detector: str = MISSING  # a run's detector/ folder
    images: str = MISSING  # an image, a folder or a pattern
    out: str = "scores.csv"  # .csv, or .jsonl for JSON lines
    batch_size: int = 256  # images per forward pass
    explain: str | None = None  # folder for picture sheets: every image beside its 5 nearest training images
    explain_limit: int = 200  # images on the sheets
