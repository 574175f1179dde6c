"""What this machine has to give."""

import os


def usable_cpus() -> int:
    """CPUs that this process may use: schedulers and containers often allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
