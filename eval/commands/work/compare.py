"""What gradmix-compare does: many runs beside each other."""

from pathlib import Path

from gradmix.eval.report.comparison import text, write_comparison
from gradmix.eval.runs.groups import find_runs


def run_compare(runs: list[str], out: Path) -> None:
    print(text(write_comparison(find_runs(runs), out)))
    print(f"\n{out}: the curves")
