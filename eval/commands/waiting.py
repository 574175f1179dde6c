"""How torch's threads wait for each other on a CPU."""

import os
import sys

# A thread of GNU OpenMP, which torch and FAISS use on Linux, waits for the others by spinning some 300,000 times before
# it sleeps. Beside other programs the one that it waits for may have no CPU, and each of a step's many waits then takes
# a turn of the scheduler. OpenMP itself takes 1,000 where it has more threads than CPUs (benchmarks/busy.py).
SPINS = "1000"


def wait_politely() -> None:
    """Leave the CPUs to others while threads wait. What the user has set stays.

    Without effect once torch is imported: OpenMP reads its settings once.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
