"""What is true of a configuration key, declared where the key is:

    knn_k: int = key(20, "neighbours that vote", at_least=1)

--help, the documentation's tables, the checks, paths on the command line, which keys may change when a run goes on, and
which runs are compared are all read from there.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from math import inf
from typing import Any, Literal

Role = Literal["setting", "unit", "data", "none"]


@dataclass(frozen=True, kw_only=True)
class Key:
    """Everything about one key but its name, type and default.

    Attributes:
        meaning: what --help says.
        at_least, above, at_most: bounds of a number, or of every number of a list; without an upper one it is finite.
        because: why, where a bound needs a reason: "for ..." follows it in the message.
        choices: the words it takes.
        entries: of a dict, what is true of some of its entries; the others are free.
        path: a file or folder; on the command line it needs no quotes.
        free: where and how a run computes, not what: it may change when the run goes on.
        role: when runs are compared, runs with another value are another group ("setting"), stay in their group and are
            what is paired ("unit"), are of another data set ("data"), or are no different ("none").
        pair: a low and a high number.
        is_dict: it has entries, KEY.NAME=VALUE.
    """

    meaning: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    because: str = ""
    choices: tuple[str, ...] = ()
    entries: Mapping[str, "Key"] = field(default_factory=dict, hash=False)
    path: bool = False
    free: bool = False
    role: Role = "setting"
    pair: bool = False
    is_dict: bool = False

    @property
    def values(self) -> str:
        """The values it takes, in words; nothing where its type says all."""
        low, high = self.at_least if self.above is None else self.above, self.at_most
        if self.choices:
            words = " or ".join(self.choices) if len(self.choices) == 2 else f"one of {', '.join(self.choices)}"
        elif low is None and high is None:
            words = ""
        elif self.pair:
            sign = "<=" if self.above is None else "<"
            words = f"[LOW,HIGH] with {low} {sign} LOW <= HIGH" + ("" if high is None else f" <= {high}")
        elif self.above is not None:
            words = f"a number above {low}" + ("" if high is None else f", at most {high}")
        elif low is not None:
            words = f"at least {low}" if high is None else f"{low} to {high}"
        else:
            words = f"at most {high}"
        return f"{words}, for {self.because}" if self.because else words

    def expected(self, value: Any) -> str | None:
        """What the value should have been; None where it is. Text and null have no bounds."""
        if self.choices:
            return None if str(value) in self.choices else self.values
        if self.pair and not (len(value) == 2 and value[0] <= value[1]):
            return self.values
        numbers = [one for one in (value if self.pair else [value]) if isinstance(one, int | float)]
        bounded = self.at_least is not None or self.above is not None
        if bounded and self.at_most is None and inf in numbers:
            return "finite numbers" if self.pair else "a finite number"
        return None if all(map(self._within, numbers)) else self.values

    def _within(self, number: float) -> bool:
        """False for NaN, where there are bounds."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
        )


def key(default: Any, meaning: str, *, role: Role | None = None, **facts: Any) -> Any:
    """A dataclass field that is a configuration key.

    Args:
        default: its value; every config gets a copy of a list or dict.
        meaning: one line for --help.
        role: see :class:`Key`; "none" for a free key, else "setting", unless told.
        facts: what else is true of it; see :class:`Key`.
    """
    role = role or ("none" if facts.get("free") else "setting")
    about = Key(meaning=meaning, role=role, pair=isinstance(default, tuple), is_dict=isinstance(default, dict), **facts)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: deepcopy(default), metadata={"key": about})
    return field(default=default, metadata={"key": about})


@cache
def keys_of(schema: type) -> Mapping[str, Key]:
    """Every key of a config dataclass by its full name, in order: ``epochs``, ``data.root``, ...

    Raises:
        TypeError: a field that was not declared with :func:`key`, nor is a group of keys.
    """
    return dict(_keys_of(schema, ""))


def _keys_of(schema: type, prefix: str) -> Iterator[tuple[str, Key]]:
    for one in fields(schema):
        if isinstance(one.type, type) and is_dataclass(one.type):
            yield from _keys_of(one.type, f"{prefix}{one.name}.")
        elif "key" in one.metadata:
            yield prefix + one.name, one.metadata["key"]
        else:
            raise TypeError(
                f"{schema.__name__}.{one.name}: say what it means, {one.name}: TYPE = key(DEFAULT, MEANING)"
            )


def key_of(schema: type, name: str) -> Key:
    """The key that a full name belongs to: itself, a declared entry of a dict (``trainer.precision``), or else the dict
    (``trainer.devices``: ``trainer``).

    Raises:
        KeyError: no such key.
    """
    known, asked = keys_of(schema), name
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return known[name].entries.get(asked.removeprefix(f"{name}."), known[name])


def as_typed(value: Any) -> str:
    """A value as the command line has it: ``null``, ``true``, ``[0.2,1.0]``."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
