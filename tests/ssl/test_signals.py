"""A closed terminal, and a person who presses Ctrl-C twice: what is saved, and what is said."""

import os
import signal
import threading
import time

import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback

from gradmix.ssl.callbacks import newest_checkpoint
from gradmix.ssl.machine import check_device
from gradmix.ssl.train import train


class Raise(Callback):
    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.steps == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


def test_a_closed_terminal_saves(config, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(config(tmp_path), data, [Raise(2, signal.SIGHUP)])
    assert stop.value.code == 128 + signal.SIGHUP
    assert newest_checkpoint(tmp_path / "checkpoints")["step"] == 3
    assert "stopped by SIGHUP, saved after step 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_all_processes_of_a_job_saves(name, started, tmp_path):
    """As Slurm and systemd send it, while workers decode."""
    for number in range(64):
        (tmp_path / f"photos/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number, 2 * number, 0)).save(tmp_path / f"photos/{number % 2}/{number}.png")
    words = ["data=imagefolder", "data.root=photos", "data.image_size=16", "data.workers=2", "encoder.width=4"]
    words += ["epochs=100000", "batch_size=16", "trainer.accelerator=cpu", "run_dir=run", "checkpoint_seconds=0"]
    process = started(tmp_path / "said", "pretrain", *words)
    while process.is_alive() and not list(tmp_path.glob("run/checkpoints/*.ckpt")):
        time.sleep(0.1)
    os.killpg(process.pid, getattr(signal, name))
    process.join()
    assert process.exitcode == 128 + getattr(signal, name), (tmp_path / "said").read_text()
    assert f"stopped by {name}, saved after step" in (tmp_path / "said").read_text()


def test_training_in_a_thread(config, data, tmp_path):
    thread = threading.Thread(target=train, args=(config(tmp_path, epochs=1), data))
    thread.start()
    thread.join()
    assert (tmp_path / "training.json").exists()


def test_what_nohup_ignores_stays_ignored(config, data, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(config(tmp_path, epochs=1), data, [Raise(2, signal.SIGHUP)])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "training.json").exists()


@pytest.mark.parametrize(("seconds", "kept"), [(0, "what is saved is step 2"), (1000, "nothing is saved yet")])
def test_ctrl_c_twice_says_what_is_saved(seconds, kept, config, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(config(tmp_path, checkpoint_seconds=seconds), data, [Raise(2, signal.SIGINT, signal.SIGINT)])
    assert stop.value.code == 130
    assert f"stopped at once; {kept}; the same command goes on" in capsys.readouterr().err
    assert (newest_checkpoint(tmp_path / "checkpoints") or {"step": None})["step"] == (2 if seconds == 0 else None)


@pytest.mark.parametrize("precision", ["16-mixed", "16", 16])
def test_float16_needs_a_gpu(precision, config, tmp_path):
    settings = config(tmp_path)
    settings.trainer["precision"] = precision
    with pytest.raises(ValueError, match=f"trainer.precision: {precision} needs a GPU"):
        check_device(settings)
    settings.trainer["precision"] = "bf16-mixed"
    check_device(settings)
    assert not torch.cuda.is_available() or settings.trainer["accelerator"] == "cpu"
