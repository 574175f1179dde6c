"""The one door for structured files, which anyone may have written: size, depth, types and ranges, or one line.

A schema is a type: a dataclass whose fields are typed, ``dict[str, T]``, ``list[T]``, ``T | None``, ``str``, ``bool``,
``int``, ``float``, and ``Annotated[T, Key(at_least=1)]`` for bounds. Nothing is executed, filled in or resolved, every
number is finite, and what a schema does not name is refused.
"""

import json
import math
import os
import stat
import types
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from gradmix.ssl.keys import Key

MEBIBYTE = 2**20
DEEPEST = 32  # lists and dicts inside each other, in YAML
LARGEST_INT = 2**63
WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", types.NoneType: "null"}


def read_document(path: Path, schema: Any, limit: int = 16 * MEBIBYTE) -> Any:
    """A JSON file as its schema has it.

    Args:
        limit: bytes that it may have.

    Raises:
        ValueError: missing, no regular file, too large, no JSON, or not what the schema says; names file and field.
    """
    return parse_json(read_regular(path, limit), schema, str(path))


def parse_json(content: bytes | str, schema: Any, where: str) -> Any:
    """JSON text as its schema has it; ``where`` it was read begins the message of the ValueError."""
    try:
        value = json.loads(content, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"{where}: damaged, nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: damaged ({error})") from error
    return as_schema(value, schema, where)


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; of anything else (a pipe would wait for ever) nothing is read.

    Raises:
        ValueError: missing, no regular file, or larger than ``limit`` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise ValueError(f"{path}: no regular file")
            if state.st_size > limit:
                raise ValueError(f"{path}: {state.st_size} bytes, at most {limit} are read")
            return file.read(limit)
    except OSError as error:
        raise ValueError(f"{path}: missing or damaged ({error.strerror})") from error


def as_schema(value: Any, schema: Any, where: str) -> Any:
    """A value as its schema has it, dicts as dataclasses.

    Raises:
        ValueError: it is something else; begins with ``where`` and the field.
    """
    return _fit(value, schema, where + ": ", "", Key())


def read_yaml(path: Path, limit: int = MEBIBYTE) -> str:
    """The text of a YAML file that is no deeper than ours are, and names nothing twice (``&``, ``*``: a few lines of
    them make any number of values).

    Raises:
        ValueError: it is anything else.
    """
    try:
        text, depth = read_regular(path, limit).decode(), 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{path}: line {event.start_mark.line + 1}: aliases are not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"{path}: nested more than {DEEPEST} deep")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]})") from error
    return text


def _fit(value: Any, schema: Any, where: str, name: str, facts: Key) -> Any:
    origin, args = get_origin(schema), get_args(schema)
    if schema is Any:
        return value
    if origin is Annotated:
        return _fit(value, args[0], where, name, args[1])
    if origin in (Union, types.UnionType):
        kind = next((one for one in args if _is(value, one)), None)
        return _wrong(value, args, where, name) if kind is None else _fit(value, kind, where, name, facts)
    if not _is(value, schema):
        _wrong(value, (schema,), where, name)
    if is_dataclass(schema):
        return _fit_dataclass(value, schema, where, name)
    if origin is dict:
        return {
            _text(key, where, name): _fit(one, args[1], where, _join(name, key), facts) for key, one in value.items()
        }
    if origin is list:
        return [_fit(one, args[0], where, f"{name}[{row}]", facts) for row, one in enumerate(value)]
    if schema is str:
        _text(value, where, name)
    expected = facts.expected(value)
    if expected is not None:
        raise ValueError(f"{where}{name}: expected {expected}, got {_short(value)}")
    return value


def _fit_dataclass(value: dict[str, Any], schema: Any, where: str, name: str) -> Any:
    types_of, known = get_type_hints(schema, include_extras=True), [one for one in fields(schema) if one.init]
    needed = [one.name for one in known if one.default is MISSING and one.default_factory is MISSING]
    for wrong, what in (({*value} - {one.name for one in known}, "no such field"), ({*needed} - {*value}, "missing")):
        if wrong:
            field = _join(name, min(wrong))
            raise ValueError(f"{where}{field if field.isprintable() and len(field) < 80 else _short(field)}: {what}")
    return schema(**{key: _fit(one, types_of[key], where, _join(name, key), Key()) for key, one in value.items()})


def _is(value: Any, schema: Any) -> bool:
    """Whether it is of the kind, whatever is inside."""
    origin = get_origin(schema) or schema
    if origin is Annotated:
        return _is(value, get_args(schema)[0])
    if is_dataclass(origin) or origin is dict:
        return isinstance(value, dict)
    if origin is float:
        return _is(value, int) or (type(value) is float and math.isfinite(value))
    if origin is int:
        return type(value) is int and abs(value) < LARGEST_INT
    return type(value) is origin


def _wrong(value: Any, kinds: tuple[Any, ...], where: str, name: str) -> NoReturn:
    words = [
        WORDS.get(kind) or ("a list" if get_origin(kind) is list else "named fields") for kind in map(_bare, kinds)
    ]
    raise ValueError(f"{where}{name or 'all of it'}: expected {' or '.join(words)}, got {_short(value)}")


def _bare(schema: Any) -> Any:
    return get_args(schema)[0] if get_origin(schema) is Annotated else schema


def _text(value: str, where: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}{name}: {_short(value)} is no text (not UTF-8)") from error
    return value


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _short(value: Any) -> str:
    """How it looks, in ASCII and not for ever."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "named fields"
    if type(value) is int and abs(value) >= LARGEST_INT:
        return "a number beyond 64 bits"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
