"""gradmix-compare: many runs beside each other, over splits and seeds; differences are paired where runs share both."""

import argparse
from pathlib import Path

from gradmix.eval.commands import later
from gradmix.eval.commands.errors import in_one_line


def main() -> None:
    """gradmix-compare."""
    parser = argparse.ArgumentParser(
        prog="gradmix-compare",
        description="Compare runs: mean, standard deviation and paired differences over splits and seeds.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs at any depth")
    parser.add_argument("--out", default="compare.html", help="the page with the curves (default: compare.html)")
    arguments = parser.parse_args()
    with in_one_line("gradmix-compare"):
        later("compare:run_compare")(arguments.runs, Path(arguments.out).expanduser())
