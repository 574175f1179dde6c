"""The run's configuration: every key with its type, default and meaning. configs/*.yaml hold only differences.

Hydra composes it, so that types are checked and an unknown key is an error.
"""

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, OmegaConf


@dataclass
class AugmentConfig:
    """The views of an image. Probabilities and strengths; 0 switches a step off."""

    crop: tuple[float, float] = (0.2, 1.0)  # area of the random resized crop
    ratio: tuple[float, float] = (0.75, 1.3333)  # aspect ratio of the crop
    rotate: float = 0.0  # degrees, uniform in +-rotate
    flip: float = 0.5  # probability of a horizontal flip
    jitter: float = 0.8  # probability of the colour jitter
    brightness: float = 0.4  # strength
    contrast: float = 0.4  # strength
    saturation: float = 0.4  # strength
    hue: float = 0.1  # strength, in turns of the colour wheel
    greyscale: float = 0.2  # probability
    blur: float = 0.0  # probability of a Gaussian blur


@dataclass
class DataConfig:
    name: str = MISSING  # data set
    root: str | None = None  # folder of the images; where torchvision's data sets are downloaded to
    image_size: int | None = 32  # side in pixels of every image; null: 32, 64, 128 or 224, by the images
    fit: str = "crop"  # whole images: crop (shorter side to image_size, middle) | pad (longer side, black) | squash
    views: str = "auto"  # training views: cut from files | from squares of image_size; auto: files larger than those
    split: int | str | None = None  # 0-4: the field's open-set splits; all: every one; null: all classes are known
    known: list[Any] | None = None  # known classes by name or index, instead of a split
    pseudo_unknown: int = 0  # to choose settings: the last so many known classes play the unknown, those are left out
    unknown_root: str | None = None  # folder of images, any depth: the unknown images, instead of unknown classes
    holdout: float = 0.1  # share of the known training images kept aside: thresholds, kNN while training
    test_fraction: float = 0.25  # imagefolder without test/: share of the images that becomes the test set
    memory_gib: float = 4.0  # squares that fit are decoded once and kept as uint8; larger sets stream
    workers: int | None = None  # decoder processes, when streaming; null: all CPUs, shared among processes, at most 16
    on_bad_image: str = "error"  # error: stop and name them; skip: leave them out, bad_images.json
    scan: bool = False  # look at all files before the first step; unset: bad ones are found when their turn comes
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class MethodConfig:
    """loss = supervised * SupCon + selfsup * NT-Xent + targets * cross-entropy (+ the mixed term of one of them)."""

    name: str = MISSING  # method
    supervised: float = 0.0  # weight of SupCon
    selfsup: float = 0.0  # weight of NT-Xent
    targets: float = 0.0  # weight of cross-entropy to orthogonal class targets, after SpHOR (arXiv 2503.08049)
    smoothing: float = 0.0  # of the targets' labels
    temperature: float = 0.1  # of all losses
    temperature_end: float | None = None  # half a cosine over the training leads there (after arXiv 2505.18137)
    mixed_loss: str = "selfsup"  # which loss the mixed images enter, at its weight: selfsup | supervised | targets
    attribution: str = "selfsup"  # whose gradient guides GradMix: selfsup | supervised | targets | joint


@dataclass
class MixConfig:
    name: str = MISSING  # mixer
    weight: float = 1.0  # of the mixed term
    probability: float = 1.0  # that a batch is mixed
    attribution_every: int = 1  # steps from one attribution to the next; boxes in between lie at random places
    start_epoch: int = 0  # mix from this epoch on
    end_epoch: int | None = None  # stop mixing at this epoch
    options: dict[str, Any] = field(default_factory=dict)  # the mixer's own arguments


@dataclass
class EncoderConfig:
    name: str = MISSING  # network; timm/NAME: one of timm's, which have no width and stem to set
    width: int | None = 64  # channels of the first stage; null: 64, or init's
    stem: str | None = None  # small: 3x3 stride 1, no max-pool; imagenet; null: by image size (small up to 64), or init
    init: str | None = None  # weights to start from, trained anywhere: safetensors, or a torch checkpoint
    head_dim: int = 128  # of the projections

    def __str__(self) -> str:
        return self.name if self.width is None else f"{self.name} width {self.width}"


@dataclass
class OptimizerConfig:
    name: str = MISSING  # optimizer
    base_lr: float = 1e-3  # for a batch of 256; lr = base_lr * batch_size / 256
    weight_decay: float = 0.0  # on every parameter
    warmup_epochs: float = 0.0  # the learning rate rises linearly over them
    final_lr: float = 0.0  # where the cosine ends, as a share of lr


@dataclass
class SpeedConfig:
    """How fast, not what; benchmarks/throughput.py measures each. They move the last digits, so a run keeps them."""

    channels_last: bool = True  # the layout that convolutions want; very narrow networks stay contiguous
    fused: bool = True  # the optimizer updates all parameters in a few kernels (adam, adamw, sgd)
    tf32: bool = True  # what stays fp32 is multiplied in TensorFloat-32, on GPUs that have it
    compile: bool = False  # torch.compile of the encoder, stage by stage
    micro_batch: int | None = None  # views per forward pass: large batches on small GPUs, for a step 1.4 times as long


@dataclass
class Config:
    seed: int = 0  # everything random follows from it
    epochs: int = 100  # passes over the training images
    batch_size: int = 256  # over all devices
    run_dir: str = MISSING  # folder of the run; the same command with the same folder goes on
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    detectors: list[str] = field(default_factory=lambda: ["deep_knn", "class_knn", "mahalanobis"])  # what is measured
    detector_options: dict[str, Any] = field(default_factory=dict)  # parameters: detector_options.deep_knn.k=10
    knn_k: int = 20  # neighbours that vote
    knn_temperature: float = 0.07  # of their weights, exp(similarity / temperature)
    knn_every: int = 10  # epochs between two kNN checks on the held-out images, 0 for none
    quality_every: int = 0  # epochs between two measurements of feature quality, 0 for none; see eval/quality.py
    pictures_every: int = 25  # epochs between two pictures of views, maps and mixed images, 0 for none
    checkpoint_seconds: float = 30.0  # how much training a killed run may lose
    on_nonfinite: str = "error"  # a loss or gradient that is not finite: error stops the run, skip leaves the step out
    max_skipped_steps: int = 10  # in all, with on_nonfinite=skip; one more is an error
    trainer: dict[str, Any] = field(default_factory=dict)  # handed to Lightning's Trainer


class TimmEncoders(ConfigSource):
    """Any of timm's networks by its name: ViT, ConvNeXt, EfficientNet, ... (pip install 'gradmix[timm]')"""

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
        import timm

        return [f"timm/{name}" for name in timm.list_models()]


class ConfigsFromOutside(SearchPathPlugin):
    """timm's encoders, and packages with config files (``data/NAME.yaml``, ...) that entry points name; ours win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("timm", "timm://")
        for entry in entry_points(group="gradmix.configs"):
            search_path.append(entry.name, f"pkg://{entry.value}")


def register_configs() -> None:
    """Tell Hydra the schema, and where the config files of other packages are."""
    ConfigStore.instance().store("pretrain_schema", Config)
    Plugins.instance().register(TimmEncoders)
    Plugins.instance().register(ConfigsFromOutside)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys; tuples as lists, as YAML has them."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + str(key)] = list(value) if isinstance(value, tuple) else value
    return leaves
