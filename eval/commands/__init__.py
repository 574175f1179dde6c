"""The commands, one file each, and what they share: the command line and its help. What they do is in ``work/``."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any


def later(name: str) -> Callable[..., Any]:
    """A function of ``work/``, ``MODULE:FUNCTION``, imported when it is called: --help and wrong keys are quick."""
    return lambda *arguments: resolve_name(f"{__name__}.work.{name}")(*arguments)
