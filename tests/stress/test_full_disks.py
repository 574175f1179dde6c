"""Disks that fill up at random offsets: the run stops and says where, checkpoints stay, and it goes on later."""

import os
import shutil
import signal
import subprocess

import numpy as np
import pytest

from tests.stress.running import Run, Trouble, newest_step

DISKS = 20
SIZE = 64 * 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB; mounting one needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder]).returncode:
        pytest.skip("can't mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disks(cases, undisturbed, small_disk, tell):
    whole, _ = undisturbed
    written = sum(path.stat().st_size for path in whole.run_dir.rglob("*") if path.is_file())
    rng = np.random.default_rng(0)
    full = while_training = 0
    for case in range(cases(DISKS)):
        run = Run(small_disk / str(case), {"TMPDIR": str(small_disk)})
        stopped = run.start(Trouble("training", signal.SIGTERM, int(rng.integers(2, 10))))
        stopped.join(300)
        assert stopped.exitcode == 143, run.log()
        before, step = run.hashes(), newest_step(run)
        (run.folder / "log").unlink()
        (run.folder / "log").symlink_to(small_disk.parent / f"log {case}")  # where there is room for it
        ballast = small_disk / "ballast"
        room = int(rng.uniform(0, written)) // 4096 * 4096
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
        process = run.start()
        process.join(300)
        if process.exitcode != 0:  # a large rest of the disk may have been enough
            full += 1
            while_training += not (run.run_dir / "training.json").exists()
            said = [line for line in run.log().splitlines() if line.startswith("gradmix-pretrain: ")]
            assert process.exitcode == 2 and len(said) == 1, run.log()
            assert "run/" in said[0] or "run_dir" in said[0], said
            assert not run.strays()
            after = run.hashes()
            assert newest_step(run) >= step
            assert all(after[name] == digest for name, digest in before.items() if name in after)
            assert set(before) <= set(after) or newest_step(run) > step
        ballast.unlink()
        run.finish()
        run.assert_like(whole)
        shutil.rmtree(run.folder)
    assert full > 0.7 * cases(DISKS)
    tell(f"{full} full disks ({while_training} while training), 0 checkpoints changed, 0 runs lost")
