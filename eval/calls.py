"""The commands as functions: ``gradmix.pretrain``, ``gradmix.evaluate``, ``gradmix.score``, ``gradmix.embed``;
and ``gradmix.evaluate_features`` for arrays.

Keys have the names of the command line. One with a dot is an entry of a dict, ``encoder={"width": 16}``, or stands in
the mapping that may come first, ``gradmix.pretrain({"encoder.width": 16}, epochs=10)``. ``data="digits"`` and
``data={"name": "digits"}`` choose the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import gradmix
from gradmix.eval.commands import later
from gradmix.eval.commands.command_line import checked, explain, folder_as_data, is_path, literal, not_one_option
from gradmix.eval.commands.waiting import wait_politely
from gradmix.eval.config import EmbedConfig, EvalConfig, ScoreConfig
from gradmix.eval.counted import counted
from gradmix.ssl.config import Config, flat, register_configs
from gradmix.ssl.keys import keys_of

if TYPE_CHECKING:  # torch takes seconds
    from PIL.Image import Image

    from gradmix.eval.features.embeddings import Embeddings
    from gradmix.eval.scoring.scorer import Score
    from gradmix.ssl.networks.backbones import Backbone

SHOWN = 10  # rows of a repr


@dataclass(frozen=True, repr=False)
class Run(Mapping[str, Any]):
    """A run's folder and its numbers: ``run["knn/top1"]``; printed, the table that the commands print.

    Attributes:
        path: the folder of the results.
        numbers: what ``metrics.json`` holds.
        text: the table.
    """

    path: Path
    numbers: dict[str, Any]
    text: str

    @property
    def detector(self) -> Path:
        """Folder of the saved detector, for :func:`score`."""
        return self.path / "detector"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report.html"

    def backbone(self) -> "Backbone":
        """As :func:`gradmix.load` gives it."""
        return gradmix.load(self.path if (self.path / "backbone.safetensors").exists() else self.detector)

    def __getitem__(self, name: str) -> Any:
        return self.numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        return f"{self.path}\n{self.text}"


@dataclass(frozen=True, repr=False)
class Scores(Sequence["Score"]):
    """Scored images, in their order.

    Attributes:
        rows: one for each image.
        threshold: a score above it is unknown; None where none was calibrated. With ``per_class``, a class with enough
            held-out images has its own: ``row.margin`` says how far each image lies above its threshold.
        discovery_limit: with ``false_discovery``, the p-value up to which an image is one of :attr:`discoveries`.
    """

    rows: "list[Score]" = field(default_factory=list)
    threshold: float | None = None
    discovery_limit: float | None = None

    @property
    def scores(self) -> np.ndarray:
        """``[N]`` float64; NaN where the image could not be read."""
        return np.array([np.nan if row.score is None else row.score for row in self.rows])

    @property
    def predictions(self) -> list[str]:
        """The class, or ``unknown``."""
        return [row.prediction for row in self.rows]

    @property
    def discoveries(self) -> np.ndarray:
        """``[N]`` bool: unknown images, of which on average at most the share ``false_discovery`` is known.

        Raises:
            ValueError: ``false_discovery`` was not asked for.
        """
        if self.discovery_limit is None:
            raise ValueError("discoveries: score(..., false_discovery=SHARE) looks for them")
        return np.array([row.p_value is not None and row.p_value <= self.discovery_limit for row in self.rows], bool)

    def __getitem__(self, index: Any) -> Any:
        return replace(self, rows=self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        scored = [(row.score, row.margin) for row in self.rows]
        limits = sorted(score - margin for score, margin in scored if score is not None and margin is not None)
        bound = "no threshold" if self.threshold is None else f"unknown above {self.threshold:.4f}"
        if limits and limits[-1] - limits[0] > 1e-4:  # less is how the numbers were rounded
            bound = f"unknown above {limits[0]:.4f} to {limits[-1]:.4f}, by class"
        lines = [f"{counted(len(self), 'image')}, {self.predictions.count('unknown')} unknown ({bound})"]
        for row in self.rows[:SHOWN]:
            score = "" if row.score is None else f"{row.score:.4f}"
            lines.append(f"  {score:>8}  {row.prediction or row.error or '-':<12}  {row.path}")
        return "\n".join([*lines, f"  ... and {len(self) - SHOWN} more"] if len(self) > SHOWN else lines)


def pretrain(settings: Mapping[str, Any] | None = None, /, **keys: Any) -> Run:
    """Train a backbone, then evaluate it: what ``gradmix-pretrain`` does. A finished run is read.

    Args:
        settings: keys by their full name.
        keys: the same, by name.

    Raises:
        ValueError: bad input, in one line.
    """
    config = configured("pretrain", Config, {**(settings or {}), **keys})
    return Run(*later("pretrain:trained")(config))


def evaluate(run: "str | Path | Run | None" = None, settings: Mapping[str, Any] | None = None, /, **keys: Any) -> Run:
    """Evaluate a run again, or a ``checkpoint=`` trained anywhere: what ``gradmix-eval`` does.

    Args:
        run: its folder, or what :func:`pretrain` gave.
        settings, keys: as in :func:`pretrain`.

    Raises:
        ValueError: bad input, in one line.
    """
    given = {**(settings or {}), **keys} | ({} if run is None else {"run": run.path if isinstance(run, Run) else run})
    config = configured("eval", EvalConfig, given)
    for key in ("against", "export"):
        if getattr(config, key):
            raise ValueError(f"{key}: measures nothing; gradmix-eval run=... {key}=... does it")
    return Run(*later("evaluate:evaluated")(config))


def evaluate_features(
    train_features: Any,
    train_labels: Any = None,
    test_features: Any = None,
    test_labels: Any = None,
    unknown_features: Any = None,
    *,
    settings: Mapping[str, Any] | None = None,
    held_out_features: Any = None,
    held_out_labels: Any = None,
    **keys: Any,
) -> Run:
    """Evaluate features from anywhere, without an image: what ``gradmix-eval features=`` does.

    Args:
        train_features: ``[N, F]``, numpy arrays (memory-mapped ones too) or tensors, as all features.
        train_labels: ``[N]``, names of classes or integers from 0; None: there are no classes.
        test_features, test_labels: classes that only they have are unknown, and so is -1 or an empty name. None: a part
            of each class of the training features (``data.test_fraction``), the rest trains.
        unknown_features: of no known class, added to the test set.
        held_out_features, held_out_labels: of known classes, for the threshold, the labels if there are any; None:
            ``data={"holdout": 0.1}`` takes a tenth of the training features.
        settings, keys: as in :func:`pretrain`; ``out`` is needed.

    Raises:
        ValueError: bad input, in one line.
    """
    config = configured("eval", EvalConfig, {**(settings or {}), **keys})
    arrays = {"train_features": train_features, "train_labels": train_labels}
    arrays |= {"test_features": test_features, "test_labels": test_labels, "unknown_features": unknown_features}
    arrays |= {"held_out_features": held_out_features, "held_out_labels": held_out_labels}
    return Run(*later("evaluate:evaluated_arrays")(config, arrays))


def score(
    detector: str | Path | Run,
    images: "str | Path | Sequence[str | Path | Image | np.ndarray]",
    settings: Mapping[str, Any] | None = None,
    /,
    **keys: Any,
) -> Scores:
    """Score images with a saved detector: what ``gradmix-score`` does. A file is written only where ``out`` says.

    Args:
        detector: a run's ``detector/`` folder, or what :func:`pretrain` gave.
        images: a file, a folder or a pattern; or a list of files, PIL images or arrays (``[H, W]`` or ``[H, W, 3]``,
            uint8).
        settings, keys: as in :func:`pretrain`.

    Raises:
        ValueError: bad input, in one line.
    """
    listed = None if isinstance(images, str | Path) else list(images)
    given = {"images": images if listed is None else "a list", **(settings or {}), **keys}
    given["detector"] = detector.detector if isinstance(detector, Run) else detector
    config = configured("score", ScoreConfig, given)
    return Scores(*later("score:scored")(config, listed, "out" in given))


def embed(
    run: str | Path | Run | None,
    images: "str | Path | Sequence[str | Path | Image | np.ndarray]",
    settings: Mapping[str, Any] | None = None,
    /,
    **keys: Any,
) -> "Embeddings":
    """Features of images: what ``gradmix-embed`` does. A file is written only where ``out`` says.

    Args:
        run: its folder, or what :func:`pretrain` gave; None with ``checkpoint=`` and ``encoder=``.
        images: as in :func:`score`.
        settings, keys: as in :func:`pretrain`.

    Returns:
        ``features`` ``[N, F]``, ``labels`` ``[N]`` that count ``classes`` (-1: none), ``paths``, and ``projections``
        ``[N, D]`` or None. With ``out`` they are mapped from that file, without the images that can't be read.

    Raises:
        ValueError: bad input, in one line; without ``out`` also an image that can't be read.
    """
    listed = None if isinstance(images, str | Path) else list(images)
    given = {"images": images if listed is None else "a list", **(settings or {}), **keys}
    given |= {} if run is None else {"run": run.path if isinstance(run, Run) else run}
    return later("embed:embedded")(configured("embed", EmbedConfig, given), listed, "out" in given)


def configured(name: str, schema: type, given: Mapping[str, Any]) -> Any:
    """The config that a command would compose of these keys.

    Raises:
        ValueError: bad input, in one line.
    """
    wait_politely()
    values = flat({key: _plain(value) for key, value in given.items()})
    register_configs()
    ConfigStore.instance().store(f"{name}_schema", schema)
    try:
        with initialize_config_module("gradmix.configs", version_base="1.3"):
            groups = [group for group in GlobalHydra.instance().config_loader().list_groups("") if group != "hydra"]
            chosen = {group: values.pop(key) for group in groups for key in (f"{group}.name", group) if key in values}
            for group, option in chosen.items():
                if str(option).startswith("["):
                    raise ValueError(f"{group}: {not_one_option(option)}")
            data = str(chosen.get("data", ""))
            if data and not data.isidentifier() and Path(data).expanduser().is_dir():
                raise ValueError(f"data: {folder_as_data(data)}")
            composed = compose(name, [f"{group}={option}" for group, option in chosen.items()])
        dicts = tuple(f"{name}." for name, about in keys_of(schema).items() if about.is_dict)
        for key, value in values.items():
            value = literal(schema, value) if isinstance(value, str) and is_path(schema, key) else value
            OmegaConf.update(composed, key, value, merge=False, force_add=f"{key}.".startswith(dicts))
        return checked(composed, schema)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, schema)) from error


def _plain(value: Any) -> Any:
    """What a config can hold: paths as text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value
