"""SIGTERM while training, validating, fitting FAISS and saving: exit 143 soon, and nothing is lost."""

import shutil
import signal
import time

import numpy as np

from tests.stress.running import DONE, HIT, Run, Trouble, newest_step

SIGNALS = 40
PLACES = {"training": 15, "validation": 3, "FAISS fit": 2, "checkpoint": 15, "results": 6}  # how often a run is there


def test_signals(cases, undisturbed, tell, tmp_path):
    whole, _ = undisturbed
    rng = np.random.default_rng(0)
    slowest = most_lost = struck = 0
    for case in range(cases(SIGNALS)):
        run = Run(tmp_path / str(case), {})
        place = list(PLACES)[case % len(PLACES)]
        trouble = Trouble(place, signal.SIGTERM, int(rng.integers(1, PLACES[place] + 1)), rng.uniform(0, 0.02))
        process = run.start(trouble)
        process.join(300)
        seconds = time.monotonic() - int(run.board[HIT]) / 1e9
        if int(run.board[HIT]) == 0:
            assert process.exitcode == 0, run.log()  # it was there less often
        else:
            assert process.exitcode == 143, (place, process.exitcode, run.log())
            assert not run.strays()
            struck += 1
            slowest = max(slowest, seconds)
            most_lost = max(most_lost, int(run.board[DONE]) - newest_step(run))
        run.finish()
        run.assert_like(whole)
        shutil.rmtree(run.folder)
    assert struck > 0.8 * cases(SIGNALS)
    assert slowest < 30 and most_lost <= 1
    tell(f"{struck} SIGTERMs, all exit 143 within {slowest:.1f} s, at most {most_lost} steps lost, 0 runs lost")
