"""SIGKILL at random moments, half of them while a checkpoint is written: every run ends with the same weights."""

import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.stress.running import DONE, RESUMED, SAVED, Run, Trouble, newest_step

KILLS = 100
OTHER_DISK = Path("/dev/shm")  # another file system than the runs'


@pytest.mark.skipif(not OTHER_DISK.is_dir(), reason="no second file system")
def test_kills(cases, undisturbed, tell, tmp_path):
    whole, seconds = undisturbed
    rng = np.random.default_rng(0)
    kills = half_written = in_evaluation = redone = runs = 0
    while kills < cases(KILLS):
        elsewhere = Path(tempfile.mkdtemp(dir=OTHER_DISK)) if runs % 3 == 0 else None
        run = Run(tmp_path / str(runs), {} if elsewhere is None else {"TMPDIR": str(elsewhere)})
        runs += 1
        for _ in range(5):  # then it is left in peace
            if (run.run_dir / "report.html").exists() or kills == cases(KILLS):
                break
            trouble = None
            if kills % 2:
                trouble = Trouble("checkpoint", signal.SIGKILL, int(rng.integers(1, 7)), rng.uniform(0, 0.015))
            process = run.start(trouble)
            process.join(300 if trouble else rng.uniform(0, 0.9 * seconds))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), run.log()
            killed = process.exitcode != 0
            kills += killed
            half_written += any("step" in path.name for path in run.strays())
            in_evaluation += killed and (run.run_dir / "training.json").exists()
            done, saved = int(run.board[DONE]), int(run.board[SAVED])
            assert newest_step(run) >= saved  # what was saved is there: at most the time since then is redone
            redone = max(redone, done - newest_step(run))
        expected = newest_step(run)
        trained = (run.run_dir / "training.json").exists()
        run.finish()
        assert trained or run.metrics()["train/resumed_from_step"] == expected
        assert trained or expected in (0, int(run.board[RESUMED])) or expected == whole.metrics()["train/steps"]
        run.assert_like(whole)
        if elsewhere is not None:
            assert not list(elsewhere.iterdir())
            elsewhere.rmdir()
        shutil.rmtree(run.folder)
    tell(
        f"{kills} kills ({half_written} left a half-written checkpoint, {in_evaluation} struck the evaluation) "
        f"in {runs} runs, 0 lost, at most {redone} steps redone"
    )
