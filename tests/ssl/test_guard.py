"""Steps that are not finite: stopped or left out, and never saved."""

import json
import math
import os
import signal
import socket
from functools import wraps

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins import MixedPrecision

import gradmix.ssl.train
from gradmix.eval.runs.numbers import read_training
from gradmix.ssl.callbacks import newest_checkpoint
from gradmix.ssl.guard import Guard, check_finite
from gradmix.ssl.train import train


class Break(Callback):
    """Puts NaN into what a step sees or computes."""

    def __init__(self, where, *steps, rank=0):
        self.where, self.steps, self.rank = where, steps, rank

    def now(self, module):
        return module.steps in self.steps and module.global_rank == self.rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        step = batch.epoch * module.loader.steps_per_epoch + batch.step + 1
        self.handle = None
        if self.where == "activation" and step in self.steps and module.global_rank == self.rank:
            poison = lambda layer, inputs, output: output * float("nan")  # noqa: E731
            self.handle = module.backbone.conv1.register_forward_hook(poison)
        self.rows = batch.index.tolist()
        self.before = state_of(trainer, module)

    def on_after_backward(self, trainer, module):
        if self.handle is not None:
            self.handle.remove()
        if self.where == "gradient" and self.now(module):
            next(module.parameters()).grad[0] = float("inf")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        assert same(self.before, state_of(trainer, module)) == (self.where != "weight" and self.now(module))
        if self.where == "weight" and self.now(module):
            next(module.parameters()).data[0] = float("nan")


def state_of(trainer, module):
    moments = {(i, key): value for i, of in trainer.optimizers[0].state.items() for key, value in of.items()}
    return {name: value.clone() for name, value in {**module.state_dict(), **moments}.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("where", "what"), [("activation", "loss"), ("gradient", "gradient")])
def test_the_step_is_named_and_the_checkpoints_stay(tmp_path, config, data, where, what):
    settings, cause = config(tmp_path, checkpoint_seconds=0), Break(where, 7)
    with pytest.raises(FloatingPointError) as stop:
        train(settings, data, [cause])
    lr = 1e-3 * 128 / 256 * 0.5 * (1 + torch.cos(torch.tensor(6 / 9) * torch.pi)).item()
    assert f"{what} is not finite at step 7, learning rate {lr:.3g}, images {cause.rows} of" in str(stop.value)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000005.ckpt", "step-00000006.ckpt"]
    saved = newest_checkpoint(tmp_path / "checkpoints")["module"]
    assert all(torch.equal(cause.before[name], value) for name, value in saved.items())
    train(settings, data)
    assert json.loads((tmp_path / "training.json").read_text())["train/resumed_from_step"] == 6


def test_skipped_steps_change_nothing_are_counted_and_bounded(tmp_path, config, data):
    settings = config(tmp_path / "a", on_nonfinite="skip", max_skipped_steps=2)
    train(settings, data, [Break("activation", 3, 7)])
    assert json.loads((tmp_path / "a/training.json").read_text())["train/skipped_steps"] == 2
    assert all(value.isfinite().all() for value in newest_checkpoint(tmp_path / "a/checkpoints")["module"].values())

    train(config(tmp_path / "last", on_nonfinite="skip"), data, [Break("activation", 1, 10)])
    said = read_training(tmp_path / "last/training.json")  # which takes no NaN
    assert said["train/skipped_steps"] == 2 and math.isfinite(said["train/loss"])

    settings = config(tmp_path / "b", on_nonfinite="skip", max_skipped_steps=2, checkpoint_seconds=0)
    with pytest.raises(FloatingPointError, match=r"at step 5.*2 steps were skipped before, max_skipped_steps=2"):
        train(settings, data, [Break("gradient", 2, 3, 5)])
    with pytest.raises(FloatingPointError, match="at step 6"):  # the count outlives the process
        train(settings, data, [Break("gradient", 6)])


def scale_on_the_cpu(monkeypatch, settings, **scale):
    """float16 with a gradient scaler: by itself, Lightning has none on CPUs."""

    @wraps(Trainer)
    def scaled(*, precision, **settings):
        return Trainer(plugins=[MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", **scale))], **settings)

    monkeypatch.setattr(gradmix.ssl.train, "Trainer", scaled)
    settings.trainer["precision"] = "16-mixed"


def test_skipped_steps_beside_a_gradient_scaler(tmp_path, monkeypatch, config, data):
    settings = config(tmp_path, on_nonfinite="skip")
    scale_on_the_cpu(monkeypatch, settings)
    train(settings, data, [Break("activation", 3)])
    assert json.loads((tmp_path / "training.json").read_text())["train/skipped_steps"] == 1


class PowerCut(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.steps == 4:
            raise RuntimeError("power cut")


@pytest.mark.parametrize(
    ("before", "on_nonfinite"), [("32-true", "error"), ("bf16-mixed", "error"), ("16-mixed", "skip")]
)
def test_a_run_goes_on_with_a_gradient_scaler(before, on_nonfinite, tmp_path, monkeypatch, config, data):
    """It began without one, or with an optimizer that was not fused."""
    settings = config(tmp_path, on_nonfinite=on_nonfinite, checkpoint_seconds=0)
    settings.trainer["precision"] = before
    with pytest.raises(RuntimeError, match="power cut"), monkeypatch.context() as patch:
        if before == "16-mixed":
            scale_on_the_cpu(patch, settings)
        train(settings, data, [PowerCut()])
    settings.on_nonfinite = "error"
    scale_on_the_cpu(monkeypatch, settings)
    train(settings, data)
    told = json.loads((tmp_path / "training.json").read_text())
    assert (told["train/resumed_from_step"], told["train/precision"]) == (3, "16-mixed")


class AlwaysOverflow(Callback):
    def on_after_backward(self, trainer, module):
        next(module.parameters()).grad[0] = float("inf")


def test_a_gradient_that_overflows_at_every_scale_is_an_error(tmp_path, monkeypatch, config, data):
    settings = config(tmp_path)
    scale_on_the_cpu(monkeypatch, settings, init_scale=2.0**-12)  # halved three times
    with pytest.raises(FloatingPointError, match=r"the gradient is not finite at step 4, .*=bf16-mixed"):
        train(settings, data, [AlwaysOverflow()])


def test_weights_that_are_not_finite_are_never_saved(tmp_path, config, data):
    settings = config(tmp_path, checkpoint_seconds=0)
    with pytest.raises(FloatingPointError, match="not finite after step 4; nothing is saved"):
        train(settings, data, [Break("weight", 4)])
    assert newest_checkpoint(tmp_path / "checkpoints")["step"] == 3
    with pytest.raises(FloatingPointError, match="optimizer 0 exp_avg"):
        check_finite({}, {"state": {0: {"step": torch.ones(()), "exp_avg": torch.tensor([1.0, float("inf")])}}}, 1)


class Ask(Callback):
    """A signal that reaches one process only."""

    def __init__(self, step=4):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.steps == self.step and module.global_rank == 1:
            signal.raise_signal(signal.SIGTERM)


def one_process(rank, port, folder, runs, data):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    for name, (settings, callback) in runs.items():
        try:
            train(settings, data, [callback])
        except (FloatingPointError, SystemExit) as stop:
            (folder / f"{name}-{rank}").write_text(f"{type(stop).__name__} {stop}")


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_decide_alike(start_processes, tmp_path, port, config, data):
    runs = {
        "signal": (config(tmp_path / "a"), Ask()),
        "gradient": (config(tmp_path / "b"), Break("activation", 5, rank=1)),
        "last": (config(tmp_path / "c"), Ask(10)),
    }
    for settings, _ in runs.values():
        settings.trainer = {"accelerator": "cpu", "devices": 1, "num_nodes": 2, "strategy": "ddp"}
    start_processes(one_process, (port, tmp_path, runs, data), 2)

    for name, folder, step in (("signal", "a", 5), ("last", "c", 10)):
        assert [(tmp_path / f"{name}-{rank}").read_text() for rank in range(2)] == ["SystemExit 143"] * 2
        assert newest_checkpoint(tmp_path / folder / "checkpoints")["step"] == step

    stopped = [(tmp_path / f"gradient-{rank}").read_text() for rank in range(2)]
    assert all(text.startswith("FloatingPointError the loss is not finite at step 5") for text in stopped)
    rows = [set(json.loads(text[text.index("[") : text.index("]") + 1])) for text in stopped]
    assert len(rows[0]) == len(rows[1]) == 64 and not rows[0] & rows[1]


class Overflow(Callback):
    """A gradient that is not finite, in one process only."""

    def on_after_backward(self, trainer, module):
        if module.steps == 5 and module.global_rank == 1:
            next(module.parameters()).grad[0] = float("inf")


class Arrived:
    def record(self):
        pass

    def synchronize(self):
        pass


def one_process_with_late_verdicts(rank, port, folder, runs, data):
    """As on GPUs; the first process saves after every step, the other one never."""
    decide, torch.cuda.Event = Guard.on_before_optimizer_step, Arrived

    def decide_late(*arguments):
        torch.Tensor.is_cuda = True
        try:
            decide(*arguments)
        finally:
            del torch.Tensor.is_cuda

    Guard.on_before_optimizer_step = decide_late
    for settings, _ in runs.values():
        settings.checkpoint_seconds = (0, 1e9)[rank]
    one_process(rank, port, folder, runs, data)


def test_processes_that_save_at_different_times_leave_at_the_same_step(start_processes, tmp_path, port, config, data):
    runs = {"signal": (config(tmp_path / "a"), Ask()), "gradient": (config(tmp_path / "b"), Overflow())}
    for settings, _ in runs.values():
        settings.trainer = {"accelerator": "cpu", "devices": 1, "num_nodes": 2, "strategy": "ddp"}
    start_processes(one_process_with_late_verdicts, (port, tmp_path, runs, data), 2)

    assert [(tmp_path / f"signal-{rank}").read_text() for rank in range(2)] == ["SystemExit 143"] * 2
    assert newest_checkpoint(tmp_path / "a/checkpoints")["step"] == 6  # sent after 4, agreed on at 5, read at 6
    stopped = [(tmp_path / f"gradient-{rank}").read_text() for rank in range(2)]
    assert all(text.startswith("FloatingPointError the gradient is not finite at step 5") for text in stopped)
    assert newest_checkpoint(tmp_path / "b/checkpoints")["step"] == 4
