"""The signals that stop a process, and how a few steps are done without one in between."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# What people send, what systems send, a terminal that is closed, and what schedulers send before they preempt (Windows
# has few of them).
SIGNALS = tuple(getattr(signal, x) for x in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, x))


@contextmanager
def signals_wait() -> Iterator[None]:
    """Around a few quick steps that belong together: a signal that would stop the process comes after them."""
    if threading.current_thread() is not threading.main_thread():  # Python hands them to the main one alone
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
