"""What a command does with errors and signals: what a file, an argument or the system causes is one line, exit code 2.

Only a mistake of this project's own shows a traceback.
"""

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from gradmix.eval.commands.terminal import safe_terminal
from gradmix.ssl.runs.signals import SIGNALS

NOT_OURS = (ValueError, OSError, FloatingPointError, MemoryError, HydraException, OmegaConfBaseException)
NO_MEMORY = ("can't allocate memory", "out of memory")  # torch says so in a RuntimeError


@contextmanager
def in_one_line(name: str, debug: bool = False, explain: Callable[[Exception], str] = str) -> Iterator[None]:
    """Around a command's work: errors, signals, and a terminal that can show everything.

    Args:
        debug: errors keep their tracebacks.
        explain: an error's text, of which the first line is shown.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata; what can't be read is said by name
    with safe_terminal():
        # While training, Guard listens instead. What nohup ignores stays ignored.
        ours = [number for number in SIGNALS if number != signal.SIGINT]  # for which Python has an exception
        numbers = [number for number in ours if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, lambda number, frame: sys.exit(128 + number)) for number in numbers}
        try:
            yield
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            no_memory = isinstance(error, MemoryError | RuntimeError) and _no_memory(error)
            if debug or not (no_memory or isinstance(error, NOT_OURS)):
                raise
            text = "not enough memory" if no_memory else explain(error)
            print(f"{name}: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
            sys.exit(2)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _no_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(word in str(error) for word in NO_MEMORY)
