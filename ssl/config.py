"""The run's configuration: every key, and all that is true of it. configs/*.yaml hold only differences.

Hydra composes it, so that types are checked and an unknown key is an error.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, OmegaConf

from gradmix.ssl.keys import Key, key

FITS = ("crop", "pad", "squash")  # how an image of any size becomes a square


@dataclass
class AugmentConfig:
    """The views of an image. Probabilities and strengths; 0 switches a step off."""

    crop: tuple[float, float] = key((0.2, 1.0), "area of the random resized crop", above=0, at_most=1)
    ratio: tuple[float, float] = key((0.75, 1.3333), "aspect ratio of the crop", above=0)
    rotate: float = key(0.0, "degrees, uniform in +-rotate", at_least=0)
    flip: float = key(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    jitter: float = key(0.8, "probability of the colour jitter", at_least=0, at_most=1)
    brightness: float = key(0.4, "strength", at_least=0)
    contrast: float = key(0.4, "strength", at_least=0)
    saturation: float = key(0.4, "strength", at_least=0)
    hue: float = key(0.1, "strength, in turns of the colour wheel", at_least=0, at_most=0.5)
    greyscale: float = key(0.2, "probability", at_least=0, at_most=1)
    blur: float = key(0.0, "probability of a Gaussian blur", at_least=0, at_most=1)


@dataclass
class DataConfig:
    """Which images, and what is made of them."""

    name: str = key(MISSING, "data set", role="data")
    root: str | None = key(None, "folder of the images, or where torchvision downloads them to", path=True, free=True)
    image_size: int | None = key(
        32, "side in pixels of every image; null: 32, 64, 128 or 224, by the images", at_least=1, role="data"
    )
    fit: str = key(
        "crop",
        "how a whole image becomes a square: its middle, with black borders, or squashed",
        choices=FITS,
        role="data",
    )
    views: str = key(
        "auto",
        "training views are cut from the files, or from squares of image_size; auto: from files larger than those",
        choices=("auto", "files", "squares"),
    )
    split: int | str | None = key(
        None, "0-4: the field's splits; all: every one; null: all classes are known", role="unit"
    )
    known: list[Any] | None = key(None, "known classes by name or index, instead of a split", role="unit")
    pseudo_unknown: int = key(
        0,
        "to choose settings: the last N known classes test as unknown ones, the real ones are left out",
        at_least=0,
        role="data",
    )
    unknown_root: str | None = key(
        None, "folder, any depth: the unknown images, instead of unknown classes", path=True, free=True, role="data"
    )
    unknown_roots: dict[str, Any] = key(
        {}, "several such folders, each measured by itself too: {near: A, far: B}", path=True, free=True, role="data"
    )
    holdout: float = key(
        0.1,
        "share of the training images kept aside, for thresholds and kNN checks",
        at_least=0,
        at_most=1,
        role="data",
    )
    test_fraction: float = key(
        0.25, "imagefolder without test/: share of images for the test set", at_least=0, at_most=1, role="data"
    )
    memory_gib: float = key(
        4.0,
        "GiB for decoded images, at most half of the free memory; what does not fit is read from disk in every epoch",
        at_least=0,
        free=True,
    )
    workers: int | None = key(
        None, "decoder processes, when streaming; null: all CPUs, shared, at most 16", at_least=0, free=True
    )
    on_bad_image: str = key(
        "error",
        "a file that can't be read: stop and name it, or leave it out",
        choices=("error", "skip"),
        free=True,
    )
    scan: bool = key(
        False, "look at all files before the first step; else bad ones are found when their turn comes", free=True
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class PrototypeConfig:
    """The prototypes of method=palm and method=cider (arXiv 2402.02653, 2203.04450)."""

    per_class: int = key(6, "prototypes of each class", at_least=1)
    neighbours: int | None = key(5, "prototypes of its class that an image is assigned to; null: all", at_least=1)
    momentum: float = key(0.99, "momentum of the prototypes' moving average", at_least=0, at_most=1)
    sharpness: float = key(0.05, "temperature of the assignment; smaller is nearer to one prototype each", above=0)
    contrast: float = key(1.0, "weight of the prototypes' own contrastive loss, against the likelihood's", at_least=0)
    contrast_temperature: float = key(0.5, "temperature of that contrastive loss", above=0)


@dataclass
class MethodConfig:
    """loss = supervised * SupCon + selfsup * NT-Xent + targets * cross-entropy + prototypes * PALM (+ the mixed term of
    one of them)."""

    name: str = key(MISSING, "method")
    supervised: float = key(0.0, "weight of SupCon", at_least=0)
    selfsup: float = key(0.0, "weight of NT-Xent", at_least=0)
    targets: float = key(
        0.0, "weight of cross-entropy to orthogonal class targets, after SpHOR (arXiv 2503.08049)", at_least=0
    )
    prototypes: float = key(0.0, "weight of PALM's likelihood and contrast (arXiv 2402.02653)", at_least=0)
    prototype: PrototypeConfig = field(default_factory=PrototypeConfig)
    smoothing: float = key(0.0, "label smoothing of the class targets", at_least=0, at_most=1)
    temperature: float = key(0.1, "temperature of all losses", above=0)
    temperature_end: float | None = key(
        None, "temperature at the end, reached along half a cosine (arXiv 2505.18137)", above=0
    )
    mixed_loss: str = key(
        "selfsup",
        "which loss the mixed images enter, at its weight",
        choices=("selfsup", "supervised", "targets", "prototypes"),
    )
    attribution: str = key(
        "selfsup",
        "whose gradient guides GradMix",
        choices=("selfsup", "supervised", "targets", "prototypes", "joint"),
    )


@dataclass
class MixConfig:
    """What images are mixed with, when, and how much the mixed term weighs."""

    name: str = key(MISSING, "mixer")
    weight: float = key(1.0, "weight of the mixed images' loss", at_least=0)
    probability: float = key(1.0, "chance that a batch is mixed", at_least=0, at_most=1)
    attribution_every: int = key(
        1, "steps from one attribution to the next; boxes in between lie at random places", at_least=1
    )
    start_epoch: int = key(0, "mix from this epoch on", at_least=0)
    end_epoch: int | None = key(None, "stop mixing at this epoch", at_least=0)
    options: dict[str, Any] = key({}, "the mixer's own arguments")


@dataclass
class DistillConfig:
    """loss += weight * (how far the student is from its teacher, on raw views and on mixed ones)."""

    name: str = key("none", "who teaches: nobody, the moving average, another run", choices=("none", "ema", "run"))
    form: str = key(
        "relations",
        "what is followed: similarities among the batch, or class logits (arXiv 2404.19527; method=sphor)",
        choices=("relations", "logits"),
    )
    weight: float = key(1.0, "weight of following the teacher on raw views", at_least=0)
    mixed: float = key(1.0, "weight of following it on mixed images, by its view of both raw images", at_least=0)
    space: str = key("features", "where relations are taken", choices=("features", "projections"))
    temperature: float = key(0.1, "temperature of relations, the student's and the teacher's", above=0)
    smoothing: float = key(
        0.75, "form=logits: label smoothing of mixed images on which the teacher is unsure", at_least=0, at_most=1
    )
    momentum: float = key(0.99, "momentum of the moving average, for distill=ema", at_least=0, at_most=1)
    teacher: str | None = key(
        None, "distill=run: another run's folder, or a file with weights trained anywhere", path=True
    )
    encoder: str | None = key(None, "network of the teacher's file; null: the student's")


@dataclass
class OutlierConfig:
    """loss += weight * (how much images of no class are like those of one)."""

    name: str = key(
        "none",
        "images of no class: none, those whose attributed pixels are disrupted (arXiv 2411.10794), the mixed ones",
        choices=("none", "attribution", "mixed"),
    )
    weight: float = key(1.0, "weight of the outliers' loss", at_least=0)
    form: str = key(
        "auto",
        "no class is likelier, or negatives of all views; auto: uniform where the method has class logits",
        choices=("auto", "uniform", "negatives"),
    )
    share: float = key(0.125, "share of the views that are made into outliers", above=0, at_most=1)
    how: str = key("shuffle", "what happens to attributed pixels", choices=("shuffle", "shift", "add"))
    pixels: float = key(0.1, "share of the image that is disrupted, where attribution is highest", above=0, at_most=1)
    amount: float = key(1.0, "how=add: strength of the map, in deviations of the image's channels", at_least=0)


@dataclass
class EncoderConfig:
    """The network, and the weights that it starts from."""

    name: str = key(MISSING, "network; timm/NAME: one of timm's, which have no width and stem to set")
    width: int | None = key(64, "channels of the first stage; null: 64, or init's", at_least=1)
    stem: str | None = key(
        None, "small: 3x3 stride 1, no max-pool; imagenet; null: by image size (small up to 64), or init"
    )
    init: str | None = key(
        None,
        "weights to start from, trained anywhere: safetensors or torch checkpoint; pretrained: timm's own of timm/NAME",
        path=True,
    )
    part: str | None = key(
        None, "which network of a file with several, such as student; null: the teacher, or the first"
    )
    head_dim: int = key(128, "dimensions of the projections", at_least=1)

    def __str__(self) -> str:
        return self.name if self.width is None else f"{self.name} width {self.width}"


@dataclass
class OptimizerConfig:
    """The optimizer and its learning rate."""

    name: str = key(MISSING, "optimizer", choices=("adam", "adamw", "sgd", "lars"))
    base_lr: float = key(1e-3, "for a batch of 256; lr = base_lr * batch_size / 256", at_least=0)
    weight_decay: float = key(0.0, "on weights; none on biases and normalisation", at_least=0)
    warmup_epochs: float = key(0.0, "the learning rate rises linearly over them", at_least=0)
    final_lr: float = key(0.0, "where the cosine ends, as a share of lr", at_least=0)


@dataclass
class SpeedConfig:
    """How fast, not what; benchmarks/switches.py measures them. They move the last digits, so a run keeps them."""

    channels_last: bool = key(True, "the layout that convolutions want; very narrow networks stay contiguous")
    fused: bool = key(True, "the optimizer updates all parameters in a few kernels (adam, adamw, sgd)")
    tf32: bool = key(True, "what stays fp32 is multiplied in TensorFloat-32, on GPUs that have it")
    compile: bool = key(False, "torch.compile of the encoder, stage by stage")
    micro_batch: int | None = key(
        None,
        "views per forward pass: large batches on small GPUs, for a step 1.4 times as long",
        at_least=2,
        because="BatchNorm has nothing to compare one with",
    )


# What of the Trainer's a training step works with: float32 weights, all of them in every process.
TRAINER = {
    "precision": Key(choices=("auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16"), free=True, role="none"),
    "strategy": Key(
        choices=("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"),
        free=True,
        role="none",
    ),
    "accumulate_grad_batches": Key(at_least=1),
    "num_nodes": Key(at_least=1, free=True, role="none"),
    "gradient_clip_val": Key(at_least=0),
    "gradient_clip_algorithm": Key(choices=("norm", "value")),
    "logger": Key(
        meaning="beside TensorBoard; several as [A,B]",
        choices=("tensorboard", "wandb", "mlflow", "csv"),
        free=True,
        role="none",
    ),
}


@dataclass
class Config:
    """The keys of gradmix-pretrain."""

    seed: int = key(0, "everything random follows from it", at_least=0, at_most=2**32 - 1, role="unit")
    epochs: int = key(100, "passes over the training images", at_least=1)
    batch_size: int = key(256, "images of a step, over all devices", at_least=1)
    run_dir: str = key(MISSING, "the run's folder; the same command with the same folder goes on", path=True, free=True)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    outliers: OutlierConfig = field(default_factory=OutlierConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    detectors: list[str] = key(
        ["deep_knn", "class_knn", "mahalanobis"], "detectors that are evaluated and saved", free=True
    )
    primary: str = key(
        "deep_knn",
        "detector in detector/, NAME or NAME@projections; the others are in detectors/",
        free=True,
        role="none",
    )
    accept: float = key(
        0.95,
        "share of known images that detectors accept; needs 19 held-out images for 0.95, 99 for 0.99",
        above=0,
        at_most=1,
        free=True,
        role="none",
    )
    per_class: bool = key(
        False, "a threshold of its own for each class that enough held-out images look like", free=True, role="none"
    )
    detector_options: dict[str, Any] = key({}, "parameters: detector_options.deep_knn.k=10", free=True, role="setting")
    knn_k: int = key(20, "neighbours that vote", at_least=1)
    knn_temperature: float = key(0.07, "temperature of their votes, exp(similarity / temperature)", above=0)
    knn_every: int = key(10, "epochs between two kNN checks on held-out images, 0 for none", at_least=0, role="none")
    test_every: int = key(
        0, "epochs between two looks at the test images, 0 for none: curves only", at_least=0, free=True
    )
    quality_every: int = key(
        0, "epochs between two looks at feature quality (eval/quality.py), 0 for none", at_least=0, role="none"
    )
    pictures_every: int = key(25, "epochs between pictures of views and mixing, 0 for none", at_least=0, role="none")
    checkpoint_seconds: float = key(30.0, "how much training a killed run may lose", at_least=0, free=True)
    on_nonfinite: str = key(
        "error", "a loss or gradient is not finite: stop, or leave the step out", choices=("error", "skip"), free=True
    )
    max_skipped_steps: int = key(10, "in all, with on_nonfinite=skip; one more is an error", at_least=0, free=True)
    trainer: dict[str, Any] = key({}, "handed to Lightning's Trainer", free=True, entries=TRAINER)


class TimmEncoders(ConfigSource):
    """Any of timm's networks by its name: ViT, ConvNeXt, EfficientNet, ... (pip install timm)"""

    @staticmethod
    def scheme() -> str:
        return "timm"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", "encoder")

    def is_config(self, config_path: str) -> bool:
        return config_path.startswith("encoder/timm/")

    def load_config(self, config_path: str) -> ConfigResult:
        encoder = OmegaConf.create({"name": config_path.removeprefix("encoder/"), "width": None})
        return ConfigResult(self.provider, self.full_path(), encoder, {"package": None})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path != "encoder" or results_filter == ObjectType.GROUP or not find_spec("timm"):
            return []
        import timm  # only here: it takes seconds, and only --help and Tab ask for the names

        return [f"timm/{name}" for name in timm.list_models()]


class ConfigsFromOutside(SearchPathPlugin):
    """timm's encoders, and packages with config files (``data/NAME.yaml``, ...) that entry points name; ours win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("timm", "timm://")
        for entry in entry_points(group="gradmix.configs"):
            search_path.append(entry.name, f"pkg://{entry.value}")


@cache
def scratch() -> "TemporaryDirectory[str]":
    """For the file that Hydra writes with --multirun, its own settings; gone at the end of the process."""
    return TemporaryDirectory(prefix="gradmix-")


def register_configs() -> None:
    """Tell Hydra the schema, and where the config files of other packages are."""
    ConfigStore.instance().store("pretrain_schema", Config)
    OmegaConf.register_new_resolver("scratch", lambda: scratch().name, replace=True)
    Plugins.instance().register(TimmEncoders)
    Plugins.instance().register(ConfigsFromOutside)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys; tuples as lists, as YAML has them."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + str(name)] = list(value) if isinstance(value, tuple) else value
    return leaves
