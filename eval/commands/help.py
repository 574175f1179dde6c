"""--help: every group, option and key of a command with one line each, read from the configs and their schema."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from operator import attrgetter
from textwrap import wrap
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, OmegaConf

from gradmix.ssl.config import TimmEncoders, flat, register_configs
from gradmix.ssl.keys import Key, as_typed, keys_of

FLAGS = {
    "--config-dir=DIR": "another folder with config files (DIR/data/mine.yaml makes data=mine)",
    "--multirun": "one run for each of several values, KEY=A,B",
    "--cfg=job": "show the config that the rest of the command line makes, and stop",
    "--shell-completion": 'eval "$(COMMAND --shell-completion install=bash)"; fish and zsh likewise',
    "--debug": "show where an error comes from",
}
WIDTH = 118
MEANING = 36  # the column where meanings begin


@dataclass(frozen=True)
class Setting:
    """A key of a config: its full name, its default as text, and what is true of it."""

    name: str
    default: str
    key: Key

    @property
    def meaning(self) -> str:
        """With the words that it takes: ``(A | B)``."""
        return f"{self.key.meaning} ({' | '.join(self.key.choices)})" if self.key.choices else self.key.meaning


def help_text(command: str, summary: str, schema: type) -> str:
    """What ``gradmix-COMMAND --help`` prints."""
    register_configs()
    lines = [f"gradmix-{command}: {summary}", ""]
    with initialize_config_module("gradmix.configs", version_base="1.3"):
        found = {group: options(group) for group in _groups()} if command == "pretrain" else {}
        usual = flat(cast(dict[str, Any], OmegaConf.to_container(compose("pretrain")))) if command == "pretrain" else {}
    if found:
        lines += ["Groups, GROUP=OPTION (* is the default):", ""]
    for group, choices in found.items():
        chosen = usual.get(f"{group}.name")
        lines += [
            _line(f"  {group}={name}{' *' if name == chosen else ''}", meaning) for name, meaning in choices.items()
        ]
        lines.append("")
    lines += ["Keys, KEY=VALUE, with the defaults of the code (???: must be given)."]
    if command == "pretrain":
        lines += ["data=, method=, encoder= and experiment= bring others; --cfg=job shows what a command adds up to:"]
    lines += [""]
    for one in settings(schema):
        default = usual.get(one.name, one.default) if one.default == MISSING else one.default
        lines.append(_line(f"  {one.name}={default}", one.meaning))
    flags = [(flag, meaning.replace("COMMAND", f"gradmix-{command}")) for flag, meaning in FLAGS.items()]
    lines += ["", "Flags:", "", *(_line(f"  {flag}", meaning) for flag, meaning in flags)]
    return "\n".join(lines)


def settings(schema: type) -> Iterator[Setting]:
    """Every key of a config dataclass, in order."""
    defaults = schema()
    for name, key in keys_of(schema).items():
        yield Setting(name, as_typed(attrgetter(name)(defaults)), key)


def options(group: str) -> dict[str, str]:
    """A group's options and the first comment of their files. Hydra has to be initialised."""
    found: dict[str, str] = {}
    for source in GlobalHydra.instance().config_loader().get_search_path().get_path():
        if source.path.startswith(TimmEncoders.scheme()) and group == "encoder":
            found["timm/NAME"] = TimmEncoders.__doc__ or ""
        elif source.path.startswith("pkg://") and source.provider != "hydra":
            folder = files(source.path.removeprefix("pkg://")) / group
            for file in sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else ():
                if file.name.endswith(".yaml"):
                    comments = re.findall(r"^# (?!@package)(.*)", file.read_text(encoding="utf-8"), re.M)
                    found.setdefault(file.name.removesuffix(".yaml"), comments[0] if comments else "")
    return found


def _groups() -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    return [group for group in loader.list_groups("") if group not in ("hydra", "recipe")]


def _line(left: str, meaning: str) -> str:
    parts = wrap(meaning, WIDTH - MEANING) or [""]
    head = f"{left:<{MEANING}}" if len(left) < MEANING else f"{left}\n{'':{MEANING}}" if meaning else left
    return (head + f"\n{'':{MEANING}}".join(parts)).rstrip()
