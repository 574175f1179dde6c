"""The tests' own run: a test that kills its process or hangs is named, the rest runs, and the end says on what."""

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TESTS = """
import os, time, pytest

def test_before(): pass
def test_that_dies(): os.abort()
def test_after(): pass

def hang(rank): time.sleep(1000)

@pytest.mark.timeout(2, func_only=True)
def test_that_hangs(start_processes): start_processes(hang, (), 1)
"""


def test_a_test_that_dies_or_hangs_is_named_and_the_others_run(tmp_path):
    options = re.search(r"^TWO_PROCESSES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text(TESTS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-q"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "4 failed, 4 passed" in done.stdout
    for name in ("test_a.py", "test_b.py"):
        assert re.search(f"crashed while running '{name}::test_that_dies'", done.stdout)
        assert re.search(rf"FAILED {name}::test_that_hangs - Failed: Timeout", done.stdout)
    assert re.search(rf"^ran on: Python .* torch {re.escape(torch.__version__)}, .* CPUs, ", done.stdout, re.MULTILINE)
