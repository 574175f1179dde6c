"""gradmix-compare: many runs beside each other, over splits and seeds; differences are paired where runs share both."""

import argparse
from pathlib import Path

from gradmix.eval.commands import later
from gradmix.eval.commands.errors import in_one_line


def main() -> None:
    """gradmix-compare."""
    parser = argparse.ArgumentParser(
        prog="gradmix-compare",
        usage="gradmix-compare RUN [RUN ...] [out=PAGE]",
        description="Compare runs: mean, standard deviation and paired differences over splits and seeds.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs at any depth")
    parser.add_argument("out=PAGE", nargs="?", help="the page with the curves (default: out=compare.html)")
    words = parser.parse_args().runs
    runs = [word for word in words if not word.startswith("out=")]
    pages = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    with in_one_line("gradmix-compare"):
        if not runs or not all(pages):
            raise ValueError("expected one run at least, and a page after out=: gradmix-compare RUN RUN out=PAGE")
        later("compare:run_compare")(runs, Path(["compare.html", *pages][-1]).expanduser())
