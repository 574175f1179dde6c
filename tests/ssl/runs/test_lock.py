"""Two processes don't write one run's folder."""

import subprocess
import sys
from threading import Thread, Timer
from time import sleep

import pytest

import gradmix.ssl.runs.lock
from gradmix.ssl.runs.lock import alone_in

HOLD = """
import sys, time
from pathlib import Path
from gradmix.ssl.runs.lock import alone_in
with alone_in(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "config.yaml").touch()
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_write_one_run(tmp_path, monkeypatch):
    folder = tmp_path / "runs/one"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(gradmix.ssl.runs.lock, "PATIENCE", 0.3)
        with pytest.raises(ValueError, match=r"runs/one: another process is writing there"), alone_in(folder):
            pytest.fail("both are in")
        with alone_in(tmp_path / "runs/two"):
            pass
        holder.kill()
    with alone_in(folder):  # a killed one leaves nothing behind
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]  # two stayed empty


def test_who_waited_for_a_folder_that_stayed_empty_is_alone_in_it_too(tmp_path):
    folder, inside, wrong = tmp_path / "run", [], []

    def come_and_go():
        for _ in range(5):
            with alone_in(folder):
                inside.append(1)
                sleep(0.02)
                if len(inside) > 1 or not folder.is_dir():
                    wrong.append(len(inside))
                inside.pop()

    threads = [Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not folder.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"run_dir: .*file: can't be made \(File exists\)"),
        alone_in(tmp_path / "file"),
    ):
        pass


def test_who_waits_gets_the_folder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        Timer(0.5, holder.kill).start()
        with alone_in(tmp_path):
            assert holder.wait(10) != 0
