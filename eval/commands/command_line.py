"""A command under Hydra: its arguments, and every error as one line."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from gradmix.eval.commands.errors import in_one_line
from gradmix.eval.commands.help import help_text
from gradmix.eval.commands.trust import configs_are_checked
from gradmix.eval.commands.waiting import wait_politely
from gradmix.eval.commands.words import key_for
from gradmix.eval.config import EvalConfig
from gradmix.registry import nearest
from gradmix.ssl.checks import check_values
from gradmix.ssl.config import Config, register_configs
from gradmix.ssl.keys import keys_of

HYDRA_FLAGS = (
    *("--multirun", "-m", "--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--shell-completion", "-sc"),
    *("--config-dir", "-cd", "--debug", "--version"),
)


def run_command(name: str, summary: str, schema: type, run: Callable[..., object]) -> None:
    """Compose the config, check its values and call ``run`` with it.

    Bad input: one line, exit code 2; --debug shows the traceback.

    Args:
        schema: the config's dataclass; each field is declared with :func:`gradmix.ssl.keys.key`.
    """
    wait_politely()
    debug = "--debug" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(name, summary, schema))
        return
    refuse(name, schema, sys.argv[1:])
    typed = sys.argv
    sys.argv = [typed[0], *(_quoted(schema, argument) for argument in typed[1:] if argument != "--debug")]
    register_configs()
    ConfigStore.instance().store(f"{name}_schema", schema)

    composed: list[DictConfig] = []

    # The work itself is done outside Hydra, which would add a line of its own to every error.
    @hydra.main(config_path="pkg://gradmix.configs", config_name=name, version_base="1.3")
    def compose(config: DictConfig) -> None:
        composed.append(config)

    with in_one_line(f"gradmix-{name}", debug, lambda error: explain(error, schema)):
        with configs_are_checked(), hydra_raises():
            compose()
        sys.argv = typed  # the report shows it
        for one in composed:  # several with --multirun, none with --help
            run(checked(one, schema))


@contextmanager
def hydra_raises() -> Iterator[None]:
    """Hydra raises its errors, which are then said shorter. Processes that training starts would take the variable for
    somebody's wish to see tracebacks: afterwards it is as it was."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def checked(composed: DictConfig, schema: type) -> Any:
    """A composed config as an object of its schema.

    Raises:
        ValueError: a key is missing, or a value makes no sense.
    """
    # Once more into the schema, as plain values: Hydra's + adds any key.
    merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(composed, resolve=False))
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ValueError(f"{missing[0]}: missing; give it as {missing[0]}=VALUE")
    config = OmegaConf.to_object(merged)
    check_values(config)
    return config


def refuse(name: str, schema: type, arguments: list[str]) -> None:
    """Hydra's own settings can name any function to be called, and --experimental-rerun reads a pickle. A flag that
    does not exist Hydra would answer with a page, and an empty path is the folder one stands in."""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if re.match(r"[+~]*hydra([./@:=]|$)|--experimental-rerun", argument):
            wrong = "Hydra's own settings are fixed"
        elif argument.startswith("-") and flag not in HYDRA_FLAGS:
            how = (
                key_for(flag, schema)
                or f"settings are given as {flag.lstrip('-').replace('-', '_') or 'KEY'}=VALUE, --help lists them"
            )
            wrong = f"no such flag; {how}"
        elif equals and not value and is_path(schema, flag):
            wrong = "empty; give a path"
        elif value.startswith("[") and f"{flag}.name" in keys_of(schema):
            wrong = not_one_option(value)
        elif flag == "data" and not value.isidentifier() and Path(value).expanduser().is_dir():
            wrong = folder_as_data(value)  # Hydra would trip over the first blank
        else:
            continue
        print(f"gradmix-{name}: {flag}: {wrong}", file=sys.stderr)
        sys.exit(2)


def not_one_option(value: object) -> str:
    return f"expected the name of one option, got {value}"  # of a list Hydra would say something about its own code


def explain(error: Exception, schema: type) -> str:
    """An exception in one line, with the nearest key where a key is unknown."""
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return f"{error.override}: can't be read; {key_for(key, schema) or 'expected KEY=VALUE'}"
        hint = f"in quotes a value is taken as it is: '{key}=\"{value}\"'"
        return f"{error.override}: can't be read; {hint}"
    hides = isinstance(error, HydraException) and error.__cause__ is not None
    text = str(error.__cause__ if hides else error)  # Hydra says that it failed, OmegaConf why
    if text.startswith("Caught "):  # in a DataLoader worker, whose traceback is the message
        text = text.splitlines()[-1].partition(": ")[2]
    several = re.match(r"\s*Ambiguous value for argument '([^=]+)=", text)
    if several:
        brackets = f"a list needs brackets, {several[1]}=[A,B]"
        return f"{several[1]}: several values need --multirun; {brackets}; quote a value that has a comma"
    unknown = re.search(r"Key '[^']+' (?:is )?not in .*\s+full_key: (\S+)", text)
    if unknown:
        wrong = unknown.group(1)
        return f"{wrong}: no such key; {key_for(wrong, schema) or nearest(wrong, _names(schema))}"
    missing_option = re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\n((?:\t.*\n)+)", text)
    if missing_option:
        asked, group, options = missing_option.groups()
        options = options.partition("Config search path")[0]
        name = asked.removeprefix(f"{group}/")
        if group == "data" and Path(name).is_dir():
            return f"data: {folder_as_data(name)}"
        return f"{group}: no option {name!r}; {nearest(name, options.split())}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = re.search(r"full_key: (\S+)", text)
    if found and "is not a ListConfig" in text:
        return f"{found[1]}: expected a list, {found[1]}=[A,B]"
    if found and re.match(r"Cannot assign \w+ to Dict", text):
        return f"{found[1]}: expected {found[1]}.NAME=VALUE"
    return (f"{found[1]}: " if found else "") + (
        lines[0] if lines else type(error.__cause__ if hides else error).__name__
    )


def folder_as_data(folder: str) -> str:
    """What to say to someone who gave a folder as ``data``."""
    return f"{folder} is a folder; say data=imagefolder {shlex.quote(f'data.root={folder}')}"


def _names(schema: type) -> list[str]:
    """Of every key and of every group of keys, in order."""
    parts = [name.split(".") for name in keys_of(schema)]
    return list(dict.fromkeys(".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)))


def is_path(schema: type, name: str) -> bool:
    about = keys_of(schema).get(name)
    return about is not None and about.path and not about.is_dict


def _quoted(schema: type, argument: str) -> str:
    """Hydra's grammar reads blanks, commas, brackets and umlauts in values; a path or a class has to be quoted to
    survive it. Any argument of Lightning's Trainer may be given, also one that configs/pretrain.yaml does not list."""
    key, equals, value = argument.partition("=")
    if equals and is_path(schema, key.lstrip("+")) and not value.startswith(("'", '"')) and value != "null":
        return f"{key}={quote(literal(schema, value))}"
    if key == "data.known" and value.startswith("[") and not {"'", '"'} & set(value):
        names = r"(?<=[\[,])(?!\d+[\],])[^\[\],]+"  # but no indices
        return "data.known=" + re.sub(names, lambda name: quote(name[0].strip()), value)
    for name, about in keys_of(schema).items():
        if about.is_dict and key == name and value.startswith("{"):
            return f"++{argument}"
        if equals and about.is_dict and key.startswith(f"{name}."):
            bare = about.path and not value.startswith(("'", '"'))
            return f"++{key}={quote(value)}" if bare else f"++{argument}"
    return argument


def literal(schema: type, path: str) -> str:
    """A path for a config: ``${`` is two letters of it, but in the commands whose folders are named after other keys,
    ``run_dir=runs/${mix.name}``, and whose config.yaml holds none."""
    return path if schema in (Config, EvalConfig) else re.sub(r"(\\*)\$\{", r"\1\1\\${", path)


def quote(value: str) -> str:
    """Hydra takes a backslash as it is, unless a quote follows."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"
