"""gradmix-compare: many runs beside each other, over splits and seeds; differences are paired where runs share both."""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """gradmix-compare."""
    parser = argparse.ArgumentParser(
        prog="gradmix-compare",
        description="Compare runs: mean, standard deviation and paired differences over splits and seeds.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs at any depth")
    parser.add_argument("--out", default="compare.html", help="the page with the curves (default: compare.html)")
    arguments = parser.parse_args()
    # Imported here, so that --help answers at once.
    from gradmix.eval.report.comparison import text, write_comparison
    from gradmix.eval.runs.groups import find_runs

    try:
        out = Path(arguments.out).expanduser()
        print(text(write_comparison(find_runs(arguments.runs), out)))
        print(f"\n{out}: the curves")
    except (ValueError, OSError) as error:
        print(f"gradmix-compare: {error}", file=sys.stderr)
        sys.exit(2)
