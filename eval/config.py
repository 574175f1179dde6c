"""Configuration of gradmix-eval, -embed, -score and -detector: every key, and all that is true of it."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from gradmix.ssl.config import FITS, DataConfig
from gradmix.ssl.keys import key

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass
class EncoderName:
    """Which network a checkpoint is of."""

    name: str = key("", "of the checkpoint's network")
    width: int | None = key(None, "null: read off conv1", at_least=1)
    stem: str | None = key(
        None, "null: read off conv1; padded: solo-learn's for CIFAR, which looks like small in the file"
    )
    part: str | None = key(None, "of a file with several networks, such as student; null: the teacher, or the first")


@dataclass
class ProbeConfig:
    """Training on augmented images, for protocols=[augmented] and [finetune]."""

    optimizer: str = key("sgd", "sgd has Nesterov momentum 0.9", choices=("sgd", "lars"))
    epochs: int = key(90, "passes over the training images", at_least=1)
    batch_size: int = key(256, "images of a step", at_least=2)
    base_lr: float | None = key(None, "for a batch of 256; null: 0.1 augmented, 0.02 finetune", at_least=0)
    weight_decay: float = key(0.0, "on every parameter", at_least=0)


@dataclass
class EvalConfig:
    """The keys of gradmix-eval."""

    run: str | None = key(None, "folder of a trained run, or of a run with data.split=all", path=True)
    checkpoint: str | None = key(
        None,
        "instead of a run, weights trained anywhere, or pretrained: timm's own; needs encoder=, data= and out=",
        path=True,
    )
    features: str | None = key(
        None,
        "instead of a run, features from anywhere, without an image: what gradmix-embed writes, or an .npz file with "
        "train_features, train_labels, test_features, ...; needs out=",
        path=True,
    )
    test_features: str | None = key(None, "of features=: the test set; null: a part of features=", path=True)
    unknown_features: str | None = key(None, "of features=: rows of no known class, added to the test set", path=True)
    encoder: EncoderName = field(default_factory=EncoderName)
    # other data than the run's own: features trained there, evaluated here
    data: DataConfig = field(default_factory=lambda: DataConfig(name="", holdout=0.0))
    out: str | None = key(
        None, "folder for the results, instead of the run's own (with data=: RUN/transfer-DATA)", path=True
    )
    detectors: list[str] | None = key(None, "instead of the run's own, NAME or NAME@projections")
    primary: str | None = key(None, "what detector/ holds; null: the run's own")
    accept: float | None = key(None, "known images that detectors accept; null: the run's own", above=0, at_most=1)
    per_class: bool | None = key(None, "thresholds by class; null: the run's own")
    detector_options: dict[str, Any] = key({}, "over the run's own: detector_options.deep_knn.k=10")
    root: str | None = key(None, "where the run's data lies now, if it moved", path=True)
    unknown_root: str | None = key(
        None, "folder of images, any depth: the unknown images, instead of the run's own", path=True
    )
    unknown_roots: dict[str, Any] = key({}, "several such folders by name, {near: A, far: B}", path=True)
    knn_k: list[int] = key([], "beside the run's own k: one search, many answers", at_least=1)
    knn_temperature: list[float] = key([], "beside the run's own; every k with every temperature", above=0)
    protocols: list[str] = key([], "beside the cached probe: augmented, finetune")
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    device: str = key("auto", "where network and probes run; auto: CUDA's GPU, else the CPU", choices=DEVICES)
    measures: list[str] = key([], "beside the usual: those of other packages, by name")
    few_labels: list[Any] = key([], "probes on few labels: 1%, 10%, or images per class")
    export: list[str] = key([], "instead of evaluating: safetensors, onnx, torch_export")
    against: str | None = key(
        None, "folder of another run: compare the two, on what each said of the same test images", path=True
    )
    corruptions: str | None = key(
        None, "folder in CIFAR-10-C's or TinyImageNet-C's layout; make: the 15 kinds made here", path=True
    )


@dataclass
class EmbedConfig:
    run: str | None = key(None, "folder of a trained run, or a detector/ folder: its network", path=True)
    checkpoint: str | None = key(
        None, "instead of a run, weights trained anywhere, or pretrained: timm's own; needs encoder=", path=True
    )
    encoder: EncoderName = field(default_factory=EncoderName)
    image_size: int | None = key(
        None,
        "of a checkpoint: side in pixels of every image; null: by the images, of timm's own weights timm's size",
        at_least=1,
    )
    fit: str = key(
        "crop",
        "of a checkpoint: the middle of an image, with black borders, or squashed",
        choices=FITS,
    )
    images: str = key(MISSING, "an image, a folder or a pattern", path=True)
    out: str = key("features.npy", ".npy (paths and labels in a .csv beside it), .safetensors or .parquet", path=True)
    batch_size: int = key(256, "images per forward pass", at_least=1)
    device: str = key("auto", "where the network runs; auto: the GPU, where there is one", choices=DEVICES)


@dataclass
class ScoreConfig:
    """The keys of gradmix-score."""

    detector: str = key(MISSING, "a run's detector/ folder, or one in its detectors/", path=True)
    images: str | None = key(None, "an image, a folder or a pattern", path=True)
    features: str | None = key(None, "instead of images, a file that gradmix-embed writes, or .npy", path=True)
    out: str = key("scores.csv", ".csv, or .jsonl for JSON lines", path=True)
    batch_size: int = key(256, "images per forward pass", at_least=1)
    device: str = key("auto", "where the network runs; auto: the GPU, where there is one", choices=DEVICES)
    accept: float | None = key(
        None, "share of known images to accept, by the detector's held-out scores; null: its own", above=0, at_most=1
    )
    per_class: bool | None = key(None, "thresholds by class, where a class has enough held-out images; null: its own")
    false_discovery: float | None = key(
        None, "a column discovery: unknown images, of which on average at most this share is known", above=0, at_most=1
    )
    explain: str | None = key(
        None, "folder for picture sheets: every image beside its 5 nearest training images", path=True
    )
    explain_limit: int = key(200, "images on the sheets", at_least=1)


@dataclass
class DetectorConfig:
    action: str = key("info", "what to do; the first word says it", choices=("info", "add", "remove", "export"))
    detector: str = key(MISSING, "a run's detector/ folder, or one in its detectors/; the second word", path=True)
    out: str | None = key(None, "the changed detector's folder, new or its own; export: a file.onnx", path=True)
    class_name: str | None = key(None, "add: the images' class, new or not; remove: the one to leave out; class=")
    images: str | None = key(None, "add: an image, a folder or a pattern", path=True)
    holdout: float = key(0.1, "add: share of the images kept aside, for the threshold", at_least=0, at_most=1)
    seed: int = key(0, "draws them, and is the seed of a detector's own probe", at_least=0, at_most=2**32 - 1)
    accept: float | None = key(None, "share of known images to accept; null: the detector's own", above=0, at_most=1)
    per_class: bool | None = key(None, "thresholds by class; null: the detector's own")
    batch_size: int = key(256, "images per forward pass", at_least=1)
    device: str = key("auto", "where the network runs; auto: the GPU, where there is one", choices=DEVICES)
