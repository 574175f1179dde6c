"""What is written to the terminal: whatever is in a name, whatever the terminal can show, and even if it is closed."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# Codes that move the cursor or do worse, and those that turn the direction of writing; a progress bar begins with \r.
CODES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]|(?<!^)\r(?!\n)")


class Safe:
    """A text stream on which codes are spelled out, and so is what its encoding lacks; the rest is the stream's own."""

    def __init__(self, stream: TextIO, may_fail: bool = False) -> None:
        self.stream = stream
        self.passed_over = (OSError, ValueError) if may_fail else ()  # closed: what is said is less than the work

    def write(self, text: str) -> int:
        """Write what can be shown; how many letters were given."""
        shown = self.spelled(text)
        with suppress(*self.passed_over):
            self.stream.write(shown)
        return len(text)

    def spelled(self, text: str) -> str:
        """The text, with control codes and letters that the stream's encoding lacks spelled out."""
        text = CODES.sub(lambda code: ascii(code[0])[1:-1], text)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def flush(self) -> None:
        """As the stream's own."""
        with suppress(*self.passed_over):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def safe_terminal() -> Iterator[None]:
    """Inside, ``sys.stdout`` and ``sys.stderr`` are there, and :class:`Safe`."""
    for number in range(3):  # else the next file that is opened would be standard error, and libraries write there
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = (stream or open(os.devnull, "w") for stream in before)
    sys.stdout, sys.stderr = Safe(out), Safe(err, may_fail=True)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
