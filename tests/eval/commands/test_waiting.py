"""Threads that wait must not keep other programs from their CPU."""

import os
import subprocess
import sys

import pytest

# What libgomp says of itself when torch is imported, after a command's and a call's own beginnings.
COMMAND = """
import sys; sys.argv = ["gradmix-eval", "--cfg", "job"]
from gradmix.eval.commands.evaluate import main; main()
"""
CALL = """
import gradmix
from gradmix.eval.calls import configured
from gradmix.eval.config import EvalConfig
configured("eval", EvalConfig, {"run": "somewhere"})
"""


def spins(begin: str, **settings: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    process = subprocess.run(
        [sys.executable, "-c", f"{begin}\nimport torch"],
        env={**clean, **settings, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in process.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("torch's OpenMP is not GNU's here")
    return lines[0].split("=")[1].strip(" '")


@pytest.mark.parametrize("begin", [COMMAND, CALL])
def test_torchs_threads_spin_a_thousand_times(begin):
    assert spins("") != "1000"
    assert spins(begin) == "1000"


def test_what_the_user_has_set_stays():
    assert spins(COMMAND, GOMP_SPINCOUNT="77") == "77"
    assert spins(COMMAND, OMP_WAIT_POLICY="active") == spins("", OMP_WAIT_POLICY="active")
