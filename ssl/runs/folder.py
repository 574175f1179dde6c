"""A run's folder: whose it is, what is in it, and what it was made with."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from gradmix.ssl.checks import check_values
from gradmix.ssl.config import Config, OptimizerConfig, flat
from gradmix.ssl.keys import key_of
from gradmix.ssl.runs.documents import read_yaml
from gradmix.ssl.runs.files import write_text
from gradmix.ssl.runs.tensors import read_header

WORK = ("checkpoints/*.ckpt", "head.safetensors", "metrics*.json")  # some of it lies in every run that got anywhere
FILES = ("config.yaml", "backbone.safetensors", "head.safetensors", "training.json", "metrics.json", "report.html")
FOLDERS = ("checkpoints", "tensorboard", "features", "detector", "detectors")


def claim(run_dir: Path, config: Config, key: str = "run_dir") -> None:
    """Make ``run_dir`` this config's folder and write ``config.yaml``, or see that it already is.

    Arguments and errors as :func:`check_free`.
    """
    check_free(run_dir, config, key)
    path = run_dir / "config.yaml"
    if path.exists() and has_begun(run_dir):
        stored = read_config(run_dir)
        if stored.data.on_bad_image != config.data.on_bad_image:  # one went bad on the way; evaluation must know
            stored.data.on_bad_image = config.data.on_bad_image
            write_text(path, OmegaConf.to_yaml(OmegaConf.structured(stored)))
        return
    if path.exists():  # a failed start's
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def check_free(run_dir: Path, config: Config, key: str = "run_dir") -> None:
    """See that ``run_dir`` is free or this config's folder. One that holds only a failed start is free.

    Args:
        key: the setting that names the folder, for messages.

    Raises:
        ValueError: the folder belongs to a run with another config; the message names the differing keys, but for those
            that are free. Or its config.yaml is not one of ours.
    """
    if not (run_dir / "config.yaml").exists():
        return
    stored = read_config(run_dir)
    theirs, ours = flat(asdict(stored)), flat(asdict(config))
    different = [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key) and not key_of(Config, key).free
    ]
    if different and has_begun(run_dir):
        raise ValueError(
            f"{key}: {run_dir} belongs to another config ({'; '.join(different[:4])}); "
            f"choose another {key}=, or delete that folder"
        )


def read_config(run_dir: Path) -> Config:
    """The config a run was made with.

    Raises:
        ValueError: no run there, or its config.yaml is not one of ours.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir}: not a run's folder, config.yaml is missing")
    text = read_yaml(path)
    try:
        loaded = OmegaConf.load(StringIO(text))
        for name, value in flat(cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))).items():
            if any("${" in str(one) for one in (name, value)):
                raise ValueError(f"{name}: ${{...}} is not filled in")
        merged = OmegaConf.merge(OmegaConf.structured(Config), loaded)
        config = cast(Config, OmegaConf.to_object(merged))
        trained_here = config.optimizer.name != "unknown"
        check_values(config if trained_here else replace(config, optimizer=OptimizerConfig("adam")))
    except Exception as error:  # yaml and omegaconf have no common base for what a damaged file raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: not a config of this version ({reason[:300]})") from error
    return config


def check_classes(run_dir: Path, classes: Sequence[str]) -> None:
    """See that images have the classes that a run was trained with. Weights from elsewhere don't say theirs.

    Raises:
        ValueError: classes are missing, extra, renamed or in another order; the message names them.
    """
    trained = read_header(run_dir / "backbone.safetensors").classes
    if trained is None or trained == list(classes):
        return
    missing = [name for name in trained if name not in classes]
    extra = [name for name in classes if name not in trained]
    renamed = []
    if len(trained) == len(classes):  # then a name that is new in the place of one that is gone is the same class
        renamed = [(was, now) for was, now in zip(trained, classes, strict=True) if was in missing and now in extra]
    gone, new = ({pair[side] for pair in renamed} for side in (0, 1))
    parts = {
        "missing": [name for name in missing if name not in gone],
        "extra": [name for name in extra if name not in new],
        "renamed": [f"{was} to {now}" for was, now in renamed],
    }
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    raise ValueError(
        f"data: not the classes that {run_dir} was trained with; {told or 'in another order'}; "
        "data=NAME evaluates a run on other data"
    )


def has_begun(run_dir: Path) -> bool:
    """Whether there is work of an earlier session in a run's folder."""
    return any(any(run_dir.glob(pattern)) for pattern in WORK)


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, revision and hardware, flat, to stand beside every result.

    Args:
        device: where it was computed.
    """
    packages = ["torchvision", "lightly", "faiss-cpu", "pytorch-lightning", "numpy", "gradmix"]
    packages += ["timm"] * (find_spec("timm") is not None)
    threads = torch.get_num_threads()
    places = {"cpu": f"CPU, {threads} thread{'s' * (threads > 1)}", "mps": "Apple's GPU"}
    return {
        "version/torch": torch.__version__,  # with the CUDA build
        **{f"version/{name}": version(name) for name in packages},
        "git/revision": _revision(),
        "hardware": places.get(device.type) or torch.cuda.get_device_name(device),
    }


def _revision() -> str | None:
    """The checkout's commit, with -dirty when it has changes; None for an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
