"""Config files that others wrote: the composed config is looked at before Hydra acts on it.

What Hydra does before a command's own work (callbacks, logging, folders, the environment) stands under ``hydra`` in the
composed config, and any config file of a ``--config-dir`` may put something there.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

SAID_BY_HYDRA = ("hydra.overrides", "hydra.runtime", "hydra.job.override_dirname", "hydra.job.name")
CODE = ("_target_", "_partial_", "_args_")  # keys that Hydra reads as "import this and call it"
ESCAPED = re.compile(r"(?<!\\)(?:\\\\)*\\\$\{")  # an odd number of backslashes: not filled in
PLAIN = re.compile(r"\$\{[\w.]+\}")  # the value of another key; ${NAME:...} is a function call
MOST_DEPTH = 20


@contextmanager
def configs_are_checked() -> Iterator[None]:
    """Inside, Hydra composes no config that it may not act on.

    Raises:
        ValueError: out of whatever composes one; see :func:`check_composed`.
    """
    load = ConfigLoaderImpl.load_configuration

    def load_and_check(self: ConfigLoaderImpl, config_name: str, *args: Any, **kwargs: Any) -> DictConfig:
        composed = load(self, config_name, *args, **kwargs)
        check_composed(composed)
        elements = self.config_search_path.get_path()
        ours = [element for element in elements if element.provider != "command-line"]
        if len(ours) < len(elements):
            path = ConfigSearchPathImpl()
            path.config_search_path = ours
            asked, mode = kwargs.get("overrides", args[0] if args else []), kwargs.get("run_mode", *args[1:2])
            own = [override for override in asked if override.startswith("hydra.")]  # Hydra's: a user may give none
            alone = load(ConfigLoaderImpl(path), config_name, own, cast(RunMode, mode))
            check_same_hydra(composed, alone)
        return composed

    ConfigLoaderImpl.load_configuration = load_and_check  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = load  # type: ignore[method-assign]


def check_composed(composed: DictConfig) -> None:
    """
    Raises:
        ValueError: a key that names code, a value that calls a resolver or leads on to another interpolation, or a tree
            deeper than any config of ours.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    plain.pop("hydra", None)
    leaves = dict(_leaves(plain, "", 0))
    for name, value in leaves.items():
        if name.rpartition(".")[2] in CODE:
            raise ValueError(f"{name}: a config names no code to run")
        value = ESCAPED.sub(" ", value) if isinstance(value, str) else value
        if isinstance(value, str) and "${" in value:
            asked = PLAIN.findall(value)
            if len(asked) != value.count("${"):
                raise ValueError(f"{name}: only ${{KEY}}, the value of another key, is filled in, got {value!r}")
            if any("${" in str(leaves.get(one[2:-1], "")) for one in asked):
                raise ValueError(f"{name}: {value!r} leads to a value that is filled in itself; give it in full")


def check_same_hydra(composed: DictConfig, alone: DictConfig) -> None:
    """
    Raises:
        ValueError: a config file from outside changed Hydra's own settings, which can name any function to be called.
    """
    ours, theirs = (
        dict(_leaves({"hydra": OmegaConf.to_container(one.hydra, resolve=False)}, "", 0)) for one in (alone, composed)
    )
    for name in sorted({*ours, *theirs}):
        if not name.startswith(SAID_BY_HYDRA) and ours.get(name, ours) != theirs.get(name, ours):
            raise ValueError(f"{name}: set by a file of --config-dir; Hydra's own settings are fixed")


def _leaves(tree: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Every value by its full name; an empty dict or list is a value too."""
    if depth > MOST_DEPTH:
        raise ValueError(f"{name[:80]}: nested more than {MOST_DEPTH} deep")
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    inner = [(f"{name}.{key}" if name else str(key), value) for key, value in entries]
    if not inner:
        yield name, tree
    for full, value in inner:
        yield from _leaves(value, full, depth + 1)
