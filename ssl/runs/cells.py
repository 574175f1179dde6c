"""Cells of a CSV file that people open in a spreadsheet."""

import re
from typing import Any

NUMBER = re.compile(r"[+-]\d+(\.\d+)?(e[+-]?\d+)?")  # as text, of a row that was read back
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def guarded(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it, as spreadsheets mark text."""
    if not isinstance(value, str) or not value.startswith(FORMULA) or NUMBER.fullmatch(value):
        return value
    return "'" + value


def unguarded(text: str) -> str:
    """What :func:`guarded` made it of."""
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text
