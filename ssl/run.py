"""A run's folder: whose it is, what is in it, and what it was made with."""

import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from gradmix.ssl.config import Config
from gradmix.ssl.files import write_text

# Where and how fast a run computes, not what: these may differ when a run goes on.
FREE_KEYS = (
    *("run_dir", "trainer", "checkpoint_seconds", "data.workers", "data.root", "data.memory_gib"),
    *("on_nonfinite", "max_skipped_steps"),
    *("detectors", "detector_options", "data.unknown_root"),
)


def claim(run_dir: Path, config: Config) -> None:
    """Make ``run_dir`` this config's folder and write ``config.yaml``, or see that it already is.

    Raises:
        ValueError: the folder belongs to a run with another config; the message names the differing keys.
    """
    path = run_dir / "config.yaml"
    if not path.exists():
        write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))
        return
    theirs, ours = flat(asdict(read_config(run_dir))), flat(asdict(config))
    different = [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted({*theirs, *ours})
        if theirs.get(key) != ours.get(key) and not any(key == k or key.startswith(k + ".") for k in FREE_KEYS)
    ]
    if different:
        raise ValueError(
            f"run_dir: {run_dir} belongs to another config ({'; '.join(different[:4])}); "
            "choose another run_dir=, or delete that folder"
        )


def read_config(run_dir: Path) -> Config:
    """The config a run was made with.

    Raises:
        ValueError: no run there, or its config.yaml is not one of ours.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_dir}: not a run's folder, config.yaml is missing")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except Exception as error:  # yaml and omegaconf have no common base for what a damaged file raises
        raise ValueError(f"{path}: not a config of this version ({str(error).splitlines()[0]})") from error


def provenance() -> dict[str, Any]:
    """Versions, revision and hardware, flat, to stand beside every result."""
    packages = ("torchvision", "lightly", "faiss-cpu", "pytorch-lightning", "numpy", "gradmix")
    cuda = torch.cuda.is_available()
    return {
        "version/torch": torch.__version__,  # with the CUDA build
        **{f"version/{name}": version(name) for name in packages},
        "git/revision": _revision(),
        "hardware": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
    }


def _revision() -> str | None:
    """The checkout's commit, with -dirty when it has changes; None for an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys; tuples as lists, as YAML has them."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + str(key)] = list(value) if isinstance(value, tuple) else value
    return leaves
