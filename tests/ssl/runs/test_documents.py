"""The one door for structured files: whatever lies there, it is what the schema says, or one line."""

import os
from dataclasses import asdict, dataclass, field
from typing import Annotated

import pytest

from gradmix.ssl.keys import Key
from gradmix.ssl.runs.documents import as_schema, parse_json, read_document, read_regular, read_yaml
from gradmix.ssl.runs.folder import claim, read_config


@dataclass
class Inner:
    side: Annotated[int, Key(at_least=1, at_most=10)]


@dataclass
class Outer:
    name: str
    share: float | None
    inner: Inner
    rows: list[Annotated[int, Key(at_least=0)]]
    either: bool | dict[str, float] = False
    more: dict[str, str] = field(default_factory=dict)


GOOD = '{"name": "a", "share": 1, "inner": {"side": 3}, "rows": [0, 4], "either": {"x": 0.5}}'


def test_a_good_document():
    expected = Outer("a", 1, Inner(3), [0, 4], {"x": 0.5})
    assert parse_json(GOOD, Outer, "file") == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"share": 1, ', "", "share: missing"),
        ('"share": 1', '"shame": 1', "shame: no such field"),
        ('"share": 1', '"share": "1"', "share: expected a number or null, got '1'"),
        ('"share": 1', '"share": true', "share: expected a number or null, got True"),
        ('"share": 1', '"share": NaN', "damaged .NaN is no number"),
        ('"share": 1', '"share": 1e999', "share: expected a number or null, got inf"),
        ('"share": 1', f'"share": 1{"0" * 400}', "share: expected .*, got a number beyond 64 bits"),
        ('"share": 1', f'"share": 1{"0" * 9000}', "damaged"),
        ("[0, 4]", "[0, -4]", r"rows\[1\]: expected at least 0, got -4"),
        ("[0, 4]", "[0, 4.0]", r"rows\[1\]: expected a whole number, got 4.0"),
        ("[0, 4]", "{}", "rows: expected a list, got named fields"),
        ('{"side": 3}', '{"side": 11}', "inner.side: expected 1 to 10, got 11"),
        ('{"side": 3}', "[]", "inner: expected named fields, got a list"),
        ('{"x": 0.5}', '{"x": []}', "either.x: expected a number"),
        ('"a"', '"\\ud800"', "name: .* is no text"),
        (GOOD, "[" * 100_000, "nested too deep"),
        (GOOD, '{"a": ' * 100_000, "nested too deep"),
        (GOOD, "", "damaged"),
        (GOOD, "null", "all of it: expected named fields, got None"),
    ],
)
def test_a_bad_document(old, new, message):
    assert old in GOOD
    with pytest.raises(ValueError, match=f"^file: .*{message}") as caught:
        parse_json(GOOD.replace(old, new), Outer, "file")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


def test_only_regular_files_of_a_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "/dev/zero"):
        with pytest.raises(ValueError, match=r"no regular file|Is a directory"):
            read_regular(tmp_path / name, 100)
    with pytest.raises(ValueError, match="none: missing or damaged"):
        read_document(tmp_path / "none", int)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="bytes, at most"):
        read_document(tmp_path / "large", int)


def test_yaml_that_grows(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a [1]\nb: [*a, *a]\n")
    with pytest.raises(ValueError, match="line 2: aliases are not read"):
        read_yaml(path)
    path.write_text("a: " + "[" * 1000)
    with pytest.raises(ValueError, match="nested more than"):
        read_yaml(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="damaged"):
        read_yaml(path)


@pytest.mark.parametrize(
    "text",
    [
        "data: {root: '${oc.env:HOME}'}",
        "data: {root: '${seed}'}",
        "mix: {options: {a: {b: '${oc.env:HOME}'}}}",
        "mix: {options: {'${oc.env:HOME}': 1}}",
        "data: {known: ['${oc.env:HOME}']}",
        "a0: 1\n" + "".join(f"a{i + 1}: '${{a{i}}}${{a{i}}}'\n" for i in range(60)),
        "seed: -1",
        "knn_temperature: .nan",
        "epochs: !!python/object/apply:os.mkdir [executed]",
    ],
)
def test_a_config_fills_in_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "the secret")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml: .*") as caught:
        read_config(tmp_path)
    assert "secret" not in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_config_of_ours_is_read(tmp_path):
    from gradmix.ssl import config as c

    parts = {"data": "digits", "method": "joint", "mix": "none", "encoder": "resnet18", "optimizer": "adam"}
    kinds = {"data": c.DataConfig, "method": c.MethodConfig, "mix": c.MixConfig, "encoder": c.EncoderConfig}
    kinds["optimizer"] = c.OptimizerConfig
    config = c.Config(run_dir="a", **{key: kinds[key](name=name) for key, name in parts.items()})
    config.mix.options = {"alpha": 1.0, "layers": ["a", "b"]}
    claim(tmp_path, config)
    assert c.flat(asdict(read_config(tmp_path))) == c.flat(asdict(config))


def test_any_value_fits_a_schema_or_is_refused():
    for value in (None, True, 1, -1, 1.5, "a", [], {}, [1], {"a": 1}):
        for schema in (None | int, str, bool, float, list[int], dict[str, float], Inner, Outer):
            try:
                as_schema(value, schema, "x")
            except ValueError as error:
                assert str(error).startswith("x: ")
