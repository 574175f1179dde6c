"""gradmix-compare: many runs beside each other, over splits and seeds; differences are paired where runs share both."""

import argparse
import sys
from pathlib import Path

from gradmix.eval.groups import Group, difference, find_runs
from gradmix.eval.report.comparison import NUMBERS, gap, mean, write_comparison


def main() -> None:
    """gradmix-compare."""
    parser = argparse.ArgumentParser(
        prog="gradmix-compare",
        description="Compare runs: mean, standard deviation and paired differences over splits and seeds.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs at any depth")
    parser.add_argument("--out", default="compare.html", help="the page with the curves (default: compare.html)")
    arguments = parser.parse_args()
    try:
        out = Path(arguments.out).expanduser()
        print(text(write_comparison(find_runs(arguments.runs), out)))
        print(f"\n{out}: the curves")
    except (ValueError, OSError) as error:
        print(f"gradmix-compare: {error}", file=sys.stderr)
        sys.exit(2)


def text(sets: dict[str, list[Group]]) -> str:
    """The table for a terminal."""
    lines = []
    for name, groups in sets.items():
        width = max(len(group.label) for group in groups) + 2
        lines += ["", name]
        for key, (title, scale) in NUMBERS.items():
            if not any(group.values(key) for group in groups):
                continue
            lines.append(f"  {title}")
            for group in groups:
                values = list(group.values(key).values())
                what = difference(group, groups[0], key) if group is not groups[0] else None
                line = f"    {group.label:<{width}}{mean(values, scale):>16}  n={len(values):<3} {gap(what, scale)}"
                lines.append(line.rstrip())
    shared = "± standard deviation over splits and seeds (n)"
    if any(len(groups) > 1 for groups in sets.values()):
        shared += "; differences to the first group are over the splits and seeds that both have"
    return "\n".join([*lines, "", shared])
