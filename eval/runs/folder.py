"""What a run's folder holds, read for people: numbers, curves, pictures, features, images. Anything may be missing."""

import shlex
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmix.eval import detectors
from gradmix.eval.detectors import PRIMARY, DeepKNN
from gradmix.eval.detectors.base import Verdict
from gradmix.eval.features.arrays import check_features, check_labels
from gradmix.eval.features.feature_sets import FEATURES
from gradmix.eval.features.mapped import Arrays, map_arrays
from gradmix.eval.runs.foreign import ELSEWHERE
from gradmix.eval.runs.numbers import as_evaluated, read_metrics
from gradmix.eval.scoring.scorer import LARGEST_LIST
from gradmix.ssl.config import Config, flat, register_configs
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.open_set import OpenSetData, load_data
from gradmix.ssl.keys import as_typed, keys_of
from gradmix.ssl.networks.weights import load_weights
from gradmix.ssl.runs.documents import as_schema, read_document
from gradmix.ssl.runs.folder import read_config

Scalars = dict[str, tuple[np.ndarray, np.ndarray]]  # by tag: steps [n] and values [n]
# Config groups: the option's name is the group's .name.
GROUPS = tuple(name.removesuffix(".name") for name in keys_of(Config) if name.endswith(".name"))

UNFINISHED = "has not finished training; repeat the gradmix-pretrain command that began it"


@dataclass
class Run:
    """A run's folder.

    Attributes:
        config: config.yaml, with what gradmix-eval was told otherwise.
        numbers: metrics.json.
        scalars: TensorBoard's, tag to steps ``[n]`` and values ``[n]``.
        pictures: steps and encoded images of TensorBoard's ``mixing``, in order.
        features: ``train``, ``held_out``, ``test``, each ``features`` ``[N, F]`` and ``labels`` ``[N]``, mapped.
        classes: names of the known classes.
        scores: by detector, for every test image: score ``[N]``, and whether its closest class is right ``[N]``.
        images: the image sets behind ``features``; empty when they are not where they were.
        why_no_images: a sentence, when they are not.
    """

    path: Path
    config: Config
    numbers: dict[str, Any]
    scalars: Scalars
    pictures: list[tuple[int, bytes]]
    features: dict[str, Arrays]
    classes: list[str]
    scores: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    images: dict[str, ImageSet] = field(default_factory=dict)
    why_no_images: str = ""

    @cached_property
    def detector(self) -> DeepKNN | None:
        """deep_knn on features, as it was saved; the report explains with it. Its bank is checked as it is loaded, so
        only when somebody asks for it.
        """
        return _detector(self.path / "detector") or _detector(self.path / "detectors" / PRIMARY)

    @cached_property
    def verdict(self) -> Verdict | None:
        """What the detector makes of every test image; None without it, or without test images."""
        if self.detector is None or "test" not in self.features:
            return None
        return self.detector.judge(self.features["test"]["features"])

    def name_of(self, label: int) -> str:
        """The class's name; ``unknown`` for -1, ``image`` where there are no classes."""
        if not self.classes:
            return "image"
        return self.classes[label] if label >= 0 else "unknown"

    def file_name(self, name: str, row: int) -> str:
        """What to call an image: its folder and file, or its row where it never was a file."""
        files = self.images[name].files if self.images else None
        return f"{name} image {row}" if files is None else "/".join(Path(files[row]).parts[-2:])


def read_run(path: Path, data: OpenSetData | None = None, images: bool = True) -> Run:
    """Read a run's folder.

    Args:
        data: the run's images, where the caller has them at hand; else they are looked for where the config says.
        images: False leaves images and pictures out.

    Raises:
        ValueError: the folder is no evaluated run's: config.yaml or metrics.json is missing or damaged.
    """
    config = read_config(path)
    if not (path / "metrics.json").is_file():
        if not (path / "training.json").is_file():
            raise ValueError(f"{path} {UNFINISHED}")
        raise ValueError(f"{path}: not evaluated yet, metrics.json is missing; gradmix-eval run={path} writes it")
    numbers = read_metrics(path / "metrics.json")
    config = as_evaluated(config, numbers)
    scalars, pictures = read_events(path / "tensorboard", images)
    names = [name for name in ("train", "held_out", "test") if (path / f"features/{name}.safetensors").is_file()]
    features = {name: _features(path / f"features/{name}.safetensors") for name in names}
    run = Run(
        path=path,
        config=config,
        numbers=numbers,
        scalars=scalars,
        pictures=pictures,
        features=features,
        classes=_classes(path / "detector" / "scorer.json"),
    )
    run.scores = read_scores(run)
    for name, saved in features.items():
        top = int(saved["labels"].max())
        if run.classes and top >= len(run.classes):
            raise ValueError(f"{path}/features/{name}.safetensors: labels: {top}, of {len(run.classes)} classes")
    if images:
        run.images, run.why_no_images = find_images(run, data)
    return run


def read_events(folder: Path, images: bool = True) -> tuple[Scalars, list[tuple[int, bytes]]]:
    """TensorBoard's scalars and ``mixing`` pictures; where a resumed run wrote a step twice, the later one.

    Raises:
        ValueError: damaged.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return {}, []
    keep = {"scalars": 0, "images": 0 if images else 1}  # 0: all of them
    for file in folder.glob("*tfevents*"):
        if not file.is_file():
            raise ValueError(f"{file}: no regular file")
    try:
        return _events(EventAccumulator(str(folder), size_guidance=keep).Reload(), images)
    except Exception as error:  # TensorBoard has no base for what a damaged file raises
        raise ValueError(f"{folder}: damaged ({type(error).__name__}: {error})") from error


def _events(events: EventAccumulator, images: bool) -> tuple[Scalars, list[tuple[int, bytes]]]:
    tags = events.Tags()
    scalars: Scalars = {}
    for tag in tags["scalars"]:
        values = {event.step: event.value for event in events.Scalars(tag)}
        steps = np.array(sorted(values))
        scalars[tag] = steps, np.array([values[step] for step in steps])
    mixing = events.Images("mixing") if images and "mixing" in tags["images"] else []
    return scalars, sorted({event.step: event.encoded_image_string for event in mixing}.items())


def read_scores(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every detector's scores, as the evaluation saved them; where it did not, the reference's, computed again."""
    path, labels = run.path / "features/scores.safetensors", np.zeros(0)
    if "test" in run.features:
        labels = run.features["test"]["labels"]
    if not (labels >= 0).any() or not (labels < 0).any():
        return {}
    if path.is_file():
        saved = _tensors(path)
        names = [key.removesuffix("/score") for key in saved if key.endswith("/score")]
        names = [name for name in names if f"{name}/correct" in saved]
        scores = {name: (saved[f"{name}/score"], saved[f"{name}/correct"].astype(bool)) for name in names}
        if all(score.shape == right.shape == labels.shape for score, right in scores.values()):
            return dict(sorted(scores.items(), key=lambda item: (item[0] != PRIMARY, item[0] == "pixels", item[0])))
    verdict = run.verdict
    if verdict is None or verdict.closest is None:
        return {}
    return {PRIMARY: (verdict.score, verdict.closest == labels)}


def find_images(run: Run, data: OpenSetData | None) -> tuple[dict[str, ImageSet], str]:
    """The images behind the saved features, or why they can't be shown."""
    if run.config.data.name == FEATURES:
        return {}, "There are features, and no images."
    if data is None:
        try:
            data = load_data(run.config.data, run.config.seed, look=True, pixels=False)
        except (ValueError, OSError) as error:
            return {}, f"The images are not where they were ({str(error).splitlines()[0]})."
    sets = {"train": data.train, "held_out": data.held_out, "test": data.test}
    for name, saved in run.features.items():
        if not np.array_equal(sets[name].labels.numpy(), saved["labels"]):
            return {}, f"The {name} images found now are not those of the saved features."
    return {name: sets[name] for name in run.features}, ""


@cache
def defaults(groups: tuple[str, ...]) -> dict[str, Any]:
    """The config, flat, that these options of ``GROUPS`` alone give; of a group that had a config file of its own
    (``--config-dir``) the usual option.
    """
    register_configs()
    with initialize_config_module("gradmix.configs", version_base="1.3"):
        sources = GlobalHydra.instance().config_loader().get_sources()
        chosen = [f"{group}/{name}" for group, name in zip(GROUPS, groups, strict=True)]
        ours = [path for path in chosen if any(source.is_config(path) for source in sources)]
        composed = compose("pretrain", [path.replace("/", "=", 1) for path in ours])
    return flat(asdict(cast(Config, OmegaConf.to_object(composed))))


def differences(config: Config) -> list[tuple[str, Any, Any]]:
    """Key, default and value of what was set beside the groups."""
    usual = defaults(tuple(getattr(config, group).name for group in GROUPS))
    return [(key, usual.get(key), value) for key, value in flat(asdict(config)).items() if usual.get(key) != value]


def command(config: Config, changed: list[tuple[str, Any, Any]]) -> str:
    """The command that makes this run, as far as the config tells: `gradmix-pretrain data=... epochs=...`.

    Args:
        changed: `differences(config)`.
    """
    if config.data.name == FEATURES:
        return ""  # arrays of a call, perhaps
    if config.method.name == ELSEWHERE:
        parts = {"checkpoint": config.encoder.init, "encoder": config.encoder.name, "data": config.data.name}
        given = {"encoder.part": config.encoder.part, "data.root": config.data.root}
        given = {key: value for key, value in given.items() if value is not None}
        named = {**parts, "encoder.stem": config.encoder.stem, **given, "out": config.run_dir}
        return shlex.join(["gradmix-eval", *(f"{key}={value}" for key, value in named.items())])
    groups = [f"{group}={getattr(config, group).name}" for group in GROUPS]
    others = [f"{key}={as_typed(value)}" for key, _, value in changed]
    return shlex.join(["gradmix-pretrain", *groups, *others])


def _tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_weights(path).items()}


def _features(path: Path) -> Arrays:
    arrays = map_arrays(path)[1]
    for name in ("features", "labels"):
        if name not in arrays:
            raise ValueError(f"{path}: {name}: missing")
    features, labels = check_features(f"{path}: features", arrays["features"]), arrays["labels"]
    check_labels(f"{path}: labels", labels, len(features))
    return arrays


def _detector(folder: Path) -> DeepKNN | None:
    """The detector there, if it is the one that the report explains with: deep_knn on features."""
    try:
        said = read_document(folder / "scorer.json", dict[str, Any], LARGEST_LIST)
        detector = detectors.load(folder, mmap=True)
    except (ValueError, OSError):
        return None
    return detector if isinstance(detector, DeepKNN) and said.get("space", "features") == "features" else None


def _classes(path: Path) -> list[str]:
    if not path.exists():
        return []
    said = read_document(path, dict[str, Any], LARGEST_LIST)
    return as_schema(said.get("classes"), list[str], f"{path}: classes")
