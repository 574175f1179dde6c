"""Values that make no sense, refused before anything is read. Needs no torch, so it answers at once."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from gradmix.ssl.config import DataConfig
from gradmix.ssl.keys import Key, keys_of

WITHOUT_FOLDER = ("digits",)  # data sets that come with a package: there is no folder to read


def check_values(config: Any, prefix: str = "") -> None:
    """Hold a config against what its keys declare.

    Args:
        config: of any of the commands, or a part of one.
        prefix: the part's name and a dot, for messages.

    Raises:
        ValueError: a value that its key does not take; the message has the key, what it takes, and the value.
    """
    for name, key, value in _given(config):
        expected = key.expected(value)
        if expected is not None:
            raise ValueError(f"{prefix}{name}: expected {expected}, got {value!r}")


def check_root(data: DataConfig, key: str = "data.root") -> None:
    """
    Args:
        key: what the command calls ``root``, for the message.

    Raises:
        ValueError: a folder for a data set that reads none.
    """
    if data.root is not None and data.name in WITHOUT_FOLDER:
        raise ValueError(
            f"{key}: data={data.name} reads no folder; the images in it are meant by data=imagefolder "
            f"data.root={data.root}"
        )


def _given(config: Any) -> Iterator[tuple[str, Key, Any]]:
    """Every value with its key; the parts of a list, and the entries of a dict that are declared, one by one."""
    schema: type = type(config)
    for name, key in keys_of(schema).items():
        value = attrgetter(name)(config)
        if key.is_dict:
            for entry in key.entries.keys() & value.keys():
                several = value[entry] if isinstance(value[entry], list) else [value[entry]]
                yield from ((f"{name}.{entry}", key.entries[entry], one) for one in several)
        elif isinstance(value, list) and not key.pair:
            yield from ((name, key, one) for one in value)
        else:
            yield name, key, value
