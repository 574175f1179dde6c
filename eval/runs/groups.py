"""Runs of one kind: the same data and settings, over splits and seeds; differences between kinds, paired."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradmix.eval.catalogue import match
from gradmix.eval.runs.folder import Run
from gradmix.ssl.config import Config, flat
from gradmix.ssl.keys import Role, key_of, keys_of

UNIT = [name for name, key in keys_of(Config).items() if key.role == "unit"]
UNIT.sort(key=lambda name: "." not in name)  # data.split, data.known, seed
Unit = tuple[Any, ...]  # their values
Values = tuple[tuple[str, Any], ...]  # of keys by name, as a key of a dict


@dataclass
class Group:
    """Runs of one data set that differ in split and seed only.

    Attributes:
        label: what sets the group apart from the others.
        runs: by split, known classes and seed; several where the same was run again.
    """

    label: str
    runs: dict[Unit, list[Run]]

    def values(self, key: str) -> dict[Unit, float]:
        """A number by unit; the mean where a unit was run several times."""
        values = {unit: [run.numbers[key] for run in runs if key in run.numbers] for unit, runs in self.runs.items()}
        return {unit: float(np.mean(of_unit)) for unit, of_unit in values.items() if of_unit}

    def images(self, unit: Unit) -> set[str]:
        """Fingerprints of the images that a unit's runs were trained on, as far as they say so."""
        return {run.numbers["train/images"] for run in self.runs[unit] if "train/images" in run.numbers}

    @property
    def thresholds(self) -> set[tuple[float, bool]]:
        """``accept`` and ``per_class`` of the runs."""
        return {(run.config.accept, run.config.per_class) for runs in self.runs.values() for run in runs}


@dataclass
class Difference:
    """A group minus the first one, over the units that both have: mean and standard error, which needs two pairs."""

    mean: float
    error: float | None
    higher: int
    lower: int
    pairs: int


def find_runs(where: Sequence[str | Path]) -> list[Path]:
    """Evaluated runs in these folders, in the order given, each once.

    Raises:
        ValueError: a folder holds none.
    """
    by_place: dict[Path, Path] = {}
    for folder in map(Path, where):
        folder = folder.expanduser()
        inner = [
            path.parent for path in sorted(folder.rglob("config.yaml")) if (path.parent / "metrics.json").is_file()
        ]
        runs = [folder] if (folder / "config.yaml").is_file() else inner
        if not runs:
            raise ValueError(f"{folder}: no evaluated run there; a run's folder holds config.yaml and metrics.json")
        by_place |= {path.resolve(): path for path in runs}
    return list(by_place.values())


def group_runs(runs: Sequence[Run]) -> dict[str, list[Group]]:
    """Runs by data set, and within it by their settings: every key says which of these it is (``role``)."""
    sets: dict[Values, dict[Values, list[tuple[Run, dict[str, Any]]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        config = _config(run)
        data = _with_role("data", config)
        if config["data.name"] == "imagefolder":
            data["data.root"] = run.numbers.get("data", {}).get("root", config["data.root"])  # whole, not as typed
        sets[tuple(data.items())][tuple(_with_role("setting", config).items())].append((run, config))
    names = _labels([dict(data) for data in sets], ("data.name",))
    result: dict[str, list[Group]] = {}
    for name, groups in zip(names, sets.values(), strict=True):
        labels = _labels([dict(apart) for apart in groups], ("method.name", "mix.name"))
        result[name] = []
        for label, members in zip(labels, groups.values(), strict=True):
            units = defaultdict(list)
            for run, config in members:
                units[tuple(config[key] for key in UNIT)].append(run)
            result[name].append(Group(label, dict(units)))
    return result


def shared(group: Group, reference: Group) -> tuple[list[Unit], list[Unit]]:
    """The splits and seeds that both have: those of the same training images, which are pairs, and the others."""
    both = [unit for unit in group.runs if unit in reference.runs]
    pairs = [unit for unit in both if len(group.images(unit) | reference.images(unit)) < 2]
    return pairs, [unit for unit in both if unit not in pairs]


def difference(group: Group, reference: Group, key: str) -> Difference | None:
    """``group`` minus ``reference``, paired by split and seed; None where there is no pair, or where it would be one of
    the thresholds that were asked for.
    """
    found = match(key)
    if found is not None and found[0].threshold and len(group.thresholds | reference.thresholds) > 1:
        return None
    ours, theirs = group.values(key), reference.values(key)
    pairs = [unit for unit in shared(group, reference)[0] if unit in ours and unit in theirs]
    values = np.array([ours[unit] - theirs[unit] for unit in pairs])
    if not len(values):
        return None
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return Difference(float(values.mean()), error, int((values > 0).sum()), int((values < 0).sum()), len(values))


def _labels(configs: list[dict[str, Any]], alone: Sequence[str]) -> list[str]:
    """What sets each config apart from the others; the keys ``alone`` where there is nothing."""
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    names = [key for key in differing if key.endswith(".name")]
    # method=joint says all that its weights would; unless two groups then have the same label.
    short = [key for key in differing if key in names or key.split(".")[0] + ".name" not in names]
    for shown in (short, differing):
        labels = [
            ", ".join(f"{key.removesuffix('.name')}={config.get(key, 'default')}" for key in shown or alone)
            for config in configs
        ]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels)]


def _config(run: Run) -> dict[str, Any]:
    """A run's config, flat."""
    return {key: _frozen(value) for key, value in flat(asdict(run.config)).items()}


def _with_role(role: Role, config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if key_of(Config, name).role == role}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
