"""Every key of the commands, by what it declares: bounds are held, paths need no quotes, free keys may change; and that
somebody reads it."""

import ast
import math
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, OmegaConf

from gradmix.eval.calls import configured
from gradmix.eval.commands.command_line import _quoted, checked
from gradmix.eval.commands.trust import check_composed
from gradmix.eval.config import DetectorConfig, EmbedConfig, EvalConfig, ScoreConfig
from gradmix.ssl.checks import check_values
from gradmix.ssl.config import Config, DataConfig, EncoderConfig, MethodConfig, MixConfig, OptimizerConfig, flat
from gradmix.ssl.keys import key as declared
from gradmix.ssl.keys import keys_of
from gradmix.ssl.runs.folder import claim, read_config

SCHEMAS = (Config, EvalConfig, EmbedConfig, ScoreConfig, DetectorConfig)
KEYS = [(schema, name) for schema in SCHEMAS for name in keys_of(schema)]
BOUNDED = [
    (s, n) for s, n in KEYS if any(getattr(keys_of(s)[n], b) is not None for b in ("at_least", "above", "at_most"))
]
CHOOSING = [(schema, name) for schema, name in KEYS if keys_of(schema)[name].choices]


def named(cases):
    return {"argvalues": cases, "ids": [f"{schema.__name__}-{name}" for schema, name in cases]}


def usual(schema):
    """A config in which nothing is wrong."""
    if schema is not Config:
        return schema()
    groups = {
        "data": DataConfig("digits"),
        "method": MethodConfig("simclr"),
        "mix": MixConfig("none"),
        "encoder": EncoderConfig("resnet18"),
    }
    return Config(run_dir="run", optimizer=OptimizerConfig("adam"), **groups)


def changed(config, name, value):
    config = deepcopy(config)
    group, _, last = name.rpartition(".")
    setattr(attrgetter(group)(config) if group else config, last, value)
    return config


def type_of(schema, name):
    *groups, last = name.split(".")
    for group in groups:
        schema = next(field.type for field in fields(schema) if field.name == group)
    return next(field.type for field in fields(schema) if field.name == last)


def just_inside_and_outside(schema, name):
    """Numbers at each bound: those that are taken, and those that are not. Worked out from the declaration alone."""
    key, kind = keys_of(schema)[name], type_of(schema, name)
    whole = int in (kind, *get_args(kind)) and float not in get_args(kind)

    def beside(bound, towards):
        return bound + (1 if towards > bound else -1) if whole else math.nextafter(bound, towards)

    inside, outside = [], [math.nan]
    if key.at_least is not None:
        inside.append(key.at_least)
        outside.append(beside(key.at_least, -math.inf))
    if key.above is not None:
        inside.append(beside(key.above, math.inf))
        outside.append(key.above)
    if key.at_most is not None:
        inside.append(key.at_most)
        outside.append(beside(key.at_most, math.inf))
    else:
        outside.append(math.inf)
    default = attrgetter(name)(usual(schema))
    shaped = (
        (lambda x: [x])
        if isinstance(default, list)
        else (lambda x: [x, x])
        if isinstance(default, tuple)
        else (lambda x: x)
    )
    return [shaped(x) for x in inside], [shaped(x) for x in outside]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_means_something_in_one_line_and_its_default_is_fine(schema):
    for name, key in keys_of(schema).items():
        assert key.meaning.strip() == key.meaning != "" and "\n" not in key.meaning, name
    check_values(usual(schema))


@pytest.mark.parametrize(("schema", "name"), **named(BOUNDED))
def test_bounds_are_held(schema, name):
    inside, outside = just_inside_and_outside(schema, name)
    for value in inside:
        check_values(changed(usual(schema), name, value))
    for value in outside:
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
            check_values(changed(usual(schema), name, value))


@pytest.mark.parametrize(("schema", "name"), **named(CHOOSING))
def test_nothing_but_the_choices_is_taken(schema, name):
    for value in keys_of(schema)[name].choices:
        check_values(changed(usual(schema), name, value))
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got 'something else'$"):
        check_values(changed(usual(schema), name, "something else"))


def test_declared_bounds_are_of_numbers_and_paths_are_text():
    for schema, name in KEYS:
        key, kind = keys_of(schema)[name], type_of(schema, name)
        if (schema, name) in BOUNDED:
            kinds = {part for whole in (kind, *get_args(kind)) for part in (whole, *get_args(whole))}
            assert kinds & {int, float}, name
        if key.path or key.choices:
            assert str in (kind, *get_args(kind)), name


def other_than(value, key):
    """Another value of the same kind."""
    if key.choices:
        return next(choice for choice in key.choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (value[0], value[1] + 1)
    if isinstance(value, dict):
        return {**value, "devices": 3}
    return ["3"] if isinstance(value, list) else "3"


def another(name):
    value, kind = attrgetter(name)(usual(Config)), type_of(Config, name)
    if value is None:
        first = get_args(kind)[0]
        value = first() if first in (int, float, str) else []
    return other_than(value, keys_of(Config)[name])


@pytest.mark.parametrize("name", keys_of(Config))
def test_a_run_goes_on_with_other_free_keys_only(tmp_path, name):
    config = usual(Config)
    claim(tmp_path, config)
    (tmp_path / "head.safetensors").touch()
    claim(tmp_path, config)
    now = changed(config, name, another(name))
    if keys_of(Config)[name].free:
        claim(tmp_path, now)
    else:
        with pytest.raises(ValueError, match=f"belongs to another config \\({name}[. ]"):
            claim(tmp_path, now)
    expected = now if name == "data.on_bad_image" else config  # of which evaluation must know too; else the first stays
    assert flat(asdict(read_config(tmp_path))) == flat(asdict(expected))


def test_a_config_from_before_a_key_was_there_is_read(tmp_path):
    """What it does not say is the default."""
    tree = OmegaConf.to_container(OmegaConf.structured(usual(Config)))
    for name in keys_of(Config):
        *groups, last = name.split(".")
        here = deepcopy(tree)
        part = here
        for group in groups:
            part = part[group]
        del part[last]
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(here))
        if attrgetter(name)(Config()) != MISSING:
            read, default = (flat(asdict(one)).get(name) for one in (read_config(tmp_path), Config()))
            assert read == default, name


@pytest.mark.parametrize("schema", SCHEMAS)
def test_paths_with_blanks_and_brackets_need_no_quotes_and_others_stay_as_they_are(schema):
    for name, key in keys_of(schema).items():
        typed = f"{name}=my photos (1), [a]"
        plain = key.path and not key.is_dict
        assert (_quoted(schema, typed) == f"{name}='my photos (1), [a]'") == plain, name
        if key.is_dict:
            assert _quoted(schema, f"{name}.x=1") == (f"++{name}.x='1'" if key.path else f"++{name}.x=1")
            assert _quoted(schema, f"{name}={{x: 1}}") == f"++{name}={{x: 1}}"


@pytest.mark.parametrize(
    "path", ["odd ${x} [1]", "${images}", "a\\b", "a\\${seed}", "a\\\\${oc.env:HOME}", "it's a\\", "$${", "\\'"]
)
def test_a_path_is_what_stands_there(path, command, tmp_path):
    """Also to whoever composes and resolves configs."""
    typed = OverridesParser.create().parse_override(_quoted(EmbedConfig, f"images={path}")).value()
    composed = OmegaConf.create({"images": str(typed)})
    check_composed(composed)
    assert checked(composed, EmbedConfig).images == path
    assert configured("embed", EmbedConfig, {"images": path}).images == path
    result = command("score", "detector=x", f"images={path}/x.png")
    assert result.code == 2 and f"images: {path}/x.png names no image file" in result.err, result.err


def test_a_runs_folder_is_named_after_its_keys():
    given = {"data": "digits", "run_dir": "runs/${mix.name}-${seed}", "seed": 3}
    assert configured("pretrain", Config, given).run_dir == "runs/gradmix-3"
    with pytest.raises(ValueError, match=r"only .* is filled in"):
        check_composed(OmegaConf.create({"a": "\\${seed} \\\\${oc.env:HOME}"}))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("pretrain", "run_dir="), ("pretrain", "encoder.init="), ("eval", "checkpoint="), ("score", "explain=")],
)
def test_an_empty_path_is_refused(command, name, arguments):
    result = command(name, arguments)
    assert (result.code, result.err) == (2, f"gradmix-{name}: {arguments[:-1]}: empty; give a path\n")


@cache
def attributes_read():
    """The names of attributes that code reads, declarations of keys left out."""
    root = Path(__file__).parent.parent
    declared = [root / name for name in ("ssl/config.py", "ssl/keys.py", "eval/config.py")]
    paths = {path for room in ("ssl", "eval") for path in (root / room).rglob("*.py")} - set(declared)
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def nobody_reads(schema):
    """Keys that no code asks for; one that shares its name with something else escapes."""
    return [name for name in keys_of(schema) if name.rpartition(".")[2] not in attributes_read()]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_somebody_reads_every_key(schema):
    assert nobody_reads(schema) == []


def test_a_key_that_nobody_reads_is_found():
    @dataclass
    class Mix(MixConfig):
        sparkle: float = declared(0.0, "read by nobody")

    @dataclass
    class More(Config):
        glitter: int = declared(0, "read by nobody", at_least=0)
        mix: Mix = field(default_factory=lambda: Mix("none"))

    assert sorted(nobody_reads(More)) == ["glitter", "mix.sparkle"]
