"""docs/notebook.ipynb runs from the top, and what its text says is so."""

import ast
import json
import os
import runpy
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def shown(source):
    """A cell's code, with its last expression printed as a notebook shows it."""
    tree = ast.parse(source)
    if isinstance(tree.body[-1], ast.Expr):
        last = ast.get_source_segment(source, tree.body[-1])
        source = source[: source.rindex(last)] + f"print('OUT', repr(({last})))"
    return source


def run_cells(rank, folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    with open("told", "w") as told, redirect_stdout(told), redirect_stderr(told):
        runpy.run_path("cells.py", run_name="__main__")


def test_the_notebook_runs(start_processes, tmp_path):
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)  # they would get old
    (tmp_path / "cells.py").write_text("\n\n".join(shown("".join(cell["source"])) for cell in cells))
    start_processes(run_cells, (tmp_path,), 1)
    told = (tmp_path / "told").read_text().split("OUT ")[1:]
    assert told[0].startswith("runs/notebook\n") and "deep_knn on pixels" in told[0]
    learned, pixels = ast.literal_eval(told[1])
    assert 0.5 < learned <= 1 and 0.5 < pixels <= 1
    assert told[2].startswith("12 images, ")
    assert float(told[4]) > 0.8  # ten digits, six of which were trained on
    assert told[5].strip().startswith("torch.Size([4, ")
