"""What gradmix-compare does: many runs beside each other."""

from pathlib import Path

from gradmix.eval.report.comparison import text, write_comparison
from gradmix.eval.runs.groups import find_runs
from gradmix.ssl.runs.outputs import check_output, check_writable


def run_compare(runs: list[str], out: Path) -> None:
    """Print the table of the runs in some folders, and write the page about them.

    Raises:
        ValueError: no runs there, runs that can't be read, or an ``out`` that holds something else.
    """
    found = find_runs(runs)
    check_output("out", out, folders=found)
    check_writable("out", out.parent, [out.name])
    if out.exists() and out.suffix not in (".html", ".htm"):
        raise ValueError(f"out: {out} is there already and is no page; give another name, or remove it")
    print(text(write_comparison(found, out)))
    print(f"\n{out}: the curves")
