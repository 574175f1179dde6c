"""FAISS and torch in one process that starts others: both import orders, every start method, no hang and no crash."""

import itertools
import subprocess
import sys

import pytest

TIMES = 20
PARENT = """
import multiprocessing, sys
{first}
{second}
import numpy as np

def work(seed):
    index = faiss.IndexFlatL2(16)
    rows = np.random.default_rng(seed).standard_normal((500, 16)).astype(np.float32)
    index.add(rows)
    _, found = index.search(rows, 1)
    a = torch.from_numpy(rows)
    return (found[:, 0] == np.arange(500)).all() and (a @ a.T).shape == (500, 500)

def child(seed):
    torch.set_num_threads(1)  # as DataLoader does in its workers
    faiss.omp_set_num_threads(1)
    sys.exit(0 if work(seed) else 1)

if __name__ == "__main__":
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    context = multiprocessing.get_context({method!r})
    for seed in range({times}):
        assert work(seed)
        process = context.Process(target=child, args=(seed,))
        process.start()
        process.join(60)
        assert process.exitcode == 0, process.exitcode
    print("done")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("order", list(itertools.permutations(["faiss", "torch"])), ids=" ".join)
def test_imports_and_start_methods(order, method, cases, tmp_path, tell):
    script = tmp_path / "parent.py"
    first, second = (f"import {name}" for name in order)
    script.write_text(PARENT.format(first=first, second=second, method=method, times=cases(TIMES)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60 * cases(TIMES) + 60)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
    tell(f"{cases(TIMES)} children, no hang, no crash")
