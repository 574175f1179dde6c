"""Training repeats itself: the same seed, and a run that was stopped between two steps."""

import errno
import json
import os
import re
import signal
from dataclasses import replace
from operator import eq

import pytest
import torch
from pytorch_lightning import Callback
from safetensors.torch import load_file

from gradmix.ssl.callbacks import newest_checkpoint
from gradmix.ssl.config import MixConfig, OptimizerConfig
from gradmix.ssl.pretrain import Pretraining, mixes_at
from gradmix.ssl.train import build_trainer, train, where_images_lie


def test_the_log_says_where_the_images_lie(tmp_path, capsys, config, data):
    train(config(tmp_path / "small", epochs=1), data)
    out = capsys.readouterr().out
    assert "training images: 0.1 MiB in memory on cpu" in out
    assert re.search(r"8 x 8 pixels, 5 steps, a step of 128 images takes at least 0\.\d\d GiB of .* free", out)
    paths = [str(tmp_path / f"{i}.png") for i in range(len(data.train))]
    large = replace(data.train, images=None, files=paths)
    assert "decoded as they are needed by 2 workers" in where_images_lie(config("unused"), large, "cpu", 2)
    photographs = replace(large, photographs=True)
    assert "views are cut from the files as they are needed, by 2 w" in where_images_lie(None, photographs, "cpu", 2)


def weights(run_dir):
    return load_file(run_dir / "backbone.safetensors") | load_file(run_dir / "head.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("method", "mix"),
    [("simclr", "gradmix"), ("supcon", "gradmix"), ("joint", "gradmix"), ("joint", "cutmix"), ("simclr", "mixup")],
)
def test_the_same_seed_gives_the_same_weights(tmp_path, method, mix, config, data):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        torch.rand(len(run.name))  # what happened before must not matter
        train(config(run, method, mix, epochs=1), data)
    first, second = map(weights, runs)
    assert same(first, second)
    assert all(value.isfinite().all() for value in first.values() if value.is_floating_point())


def test_mixing_and_the_seed_matter(tmp_path, config, data):
    for name, changes in {"a": {}, "b": {"mix": "none"}, "c": {"seed": 1}}.items():
        train(config(tmp_path / name, epochs=1, **changes), data)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert not same(a, b) and not same(a, c)


class Stop(Callback):
    """Ends the process's training behind a step: by an exception, or as if a signal had come."""

    def __init__(self, step, number=None):
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.steps == self.step:
            if self.number is None:
                raise RuntimeError("power cut")
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config, data):
    folder = tmp_path_factory.mktemp("whole")
    train(config(folder, epochs=3), data)
    return weights(folder)


@pytest.mark.parametrize("step", [1, 5, 6, 15])
def test_a_run_that_died_goes_on_to_the_same_weights(tmp_path, whole, step, config, data):
    """5 steps an epoch: inside epochs, at their ends, just behind them, and at the very end."""
    settings = config(tmp_path, epochs=3, checkpoint_seconds=0)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings, data, [Stop(step)])
    train(settings, data)
    assert same(whole, weights(tmp_path))
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["train/loss"] > 0
    # the step whose checkpoint was not written yet is lost, no other
    assert told["train/resumed_from_step"] == step - 1
    if step == 15:  # died behind its last checkpoint: there is no step left to do
        (tmp_path / "training.json").unlink()
        train(settings, data)
        again = json.loads((tmp_path / "training.json").read_text())
        assert again["train/loss"] == told["train/loss"] and again["train/resumed_from_step"] == 15


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_exits_and_the_run_goes_on(tmp_path, whole, number, config, data, capsys):
    settings = config(tmp_path, epochs=3)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(settings, data, [Stop(7, number)])
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert f"stopped by {signal.Signals(number).name}, saved after step 7;" in capsys.readouterr().err
    train(settings, data)
    assert "goes on after step 7\n" in capsys.readouterr().out
    assert same(whole, weights(tmp_path))
    assert json.loads((tmp_path / "training.json").read_text())["train/resumed_from_step"] == 7


def truncated(content):
    return content[:-500]


def sent_to_an_impossible_place(content):
    place = content.rindex(b"PK\6\6") + 48  # where the archive's table begins: a gigabyte behind its end
    return content[:place] + (2**30).to_bytes(8, "little") + content[place + 8 :]


def one_bit_flipped(content):
    middle = len(content) // 2  # among the weights: torch itself would read them
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncated, one_bit_flipped, sent_to_an_impossible_place])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole, damage, config, data):
    settings = config(tmp_path, epochs=3, checkpoint_seconds=0)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings, data, [Stop(6)])
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000004.ckpt", "step-00000005.ckpt"]
    kept[1].write_bytes(damage(kept[1].read_bytes()))
    with pytest.warns(UserWarning, match=r"step-00000005\.ckpt: damaged checkpoint skipped"):
        train(settings, data)
    assert same(whole, weights(tmp_path))


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no right"), OSError(errno.EIO, "I/O"), MemoryError()])
def test_a_checkpoint_that_may_be_whole_is_not_passed_over(tmp_path, monkeypatch, error):
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}.ckpt").touch()

    def fail(path):
        raise error

    monkeypatch.setattr("gradmix.ssl.callbacks.zipfile.ZipFile", fail)
    with pytest.raises(type(error)):
        newest_checkpoint(tmp_path)


def test_a_run_without_a_readable_checkpoint_or_with_other_images_does_not_start_over(tmp_path, config, data):
    settings = config(tmp_path, checkpoint_seconds=0)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings, data, [Stop(3)])
    fewer = replace(data, train=data.train.select(torch.arange(len(data.train) - 1)))
    with pytest.raises(ValueError, match="not the training images"):
        train(settings, fewer)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"<html>")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no checkpoint can be read"):
        train(settings, data)


def test_gradient_accumulation_resumes_between_optimizer_steps(tmp_path, config, data):
    twice = {"accelerator": "cpu", "accumulate_grad_batches": 2}
    settings = [config(tmp_path / name, epochs=2, checkpoint_seconds=0) for name in "ab"]
    for each in settings:
        each.trainer = twice
    train(settings[0], data)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings[1], data, [Stop(6)])
    train(settings[1], data)
    assert json.loads((tmp_path / "b/training.json").read_text())["train/resumed_from_step"] == 4
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_on_or_off_everywhere(tmp_path, config, monkeypatch, tf32):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    settings = config(tmp_path / "run")
    settings.speed.tf32 = tf32
    try:
        build_trainer(settings, [])
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_when_to_mix():
    always, never = MixConfig("gradmix"), MixConfig("gradmix", probability=0)
    places = [(epoch, step) for epoch in range(20) for step in range(50)]
    assert all(mixes_at(always, 0, *p) for p in places)
    assert not any(mixes_at(never, 0, *p) for p in places)
    half = [mixes_at(MixConfig("gradmix", probability=0.5), 0, *p) for p in places]
    assert 0.45 < sum(half) / len(half) < 0.55
    others = [mixes_at(MixConfig("gradmix", probability=0.5), 1, *p) for p in places]
    for one, other in ((half[:-50], half[50:]), (half[:-1], half[1:]), (half, others)):  # epochs, steps, seeds
        assert 0.45 < sum(map(eq, one, other)) / len(one) < 0.55  # know nothing of each other
    window = MixConfig("gradmix", start_epoch=3, end_epoch=5)
    assert {epoch for epoch, step in places if mixes_at(window, 0, epoch, step)} == {3, 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_time": "00:12:00:00"}, r"trainer\.max_time: not to be set here; a run is all its epochs"),
        ({"limit_train_batches": 2}, r"trainer\.limit_train_batches: not to be set"),
        ({"fast_dev_run": True}, r"trainer\.fast_dev_run: not to be set"),
        ({"precision": "bf16-true"}, r"trainer\.precision: expected one of auto, .*got 'bf16-true'"),
        ({"precision": 64}, r"trainer\.precision: .*got 64"),
        ({"strategy": "fsdp"}, r"trainer\.strategy: expected one of auto, ddp, .*got 'fsdp'"),
        ({"accumulate_grad_batches": 0}, r"trainer\.accumulate_grad_batches: expected at least 1, got 0"),
        ({"num_nodes": 0}, r"trainer\.num_nodes: expected at least 1, got 0"),
        ({"devices": [1]}, r"trainer: .*devices.* should be an int"),
        ({"devices": "abc"}, r"trainer: .*devices.* should be an int"),
        ({"gradient_clip_val": -1.0}, r"trainer\.gradient_clip_val: expected at least 0, got -1"),
    ],
)
def test_what_training_could_not_honour_is_refused_before_it(tmp_path, arguments, message, config, data):
    settings = config(tmp_path / "run")
    settings.trainer |= arguments
    with pytest.raises(ValueError, match=message):
        train(settings, data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 2**32, r"seed: expected 0 to 4294967295, got 4294967296"),
        ("optimizer.name", "adan", r"optimizer\.name: expected one of adam, adamw, sgd, lars, got 'adan'"),
        ("optimizer.base_lr", float("inf"), r"optimizer\.base_lr: expected a finite number, got inf"),
        ("optimizer", OptimizerConfig("lars"), r"optimizer\.weight_decay: LARS scales .* a little, as 1e-6, or"),
        ("optimizer.warmup_epochs", 2.5, r"optimizer\.warmup_epochs: 2\.5 are more than epochs=2"),
        ("method.temperature", float("inf"), r"method\.temperature: expected a finite number"),
        ("mix.end_epoch", 0, r"mix\.end_epoch: 0 is not behind mix\.start_epoch=0, nothing would be mixed"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_training(tmp_path, key, value, message, config, data):
    """Later, the folder would belong to them already, and refuse the settings that make sense."""
    settings = config(tmp_path / "run")
    *groups, name = key.split(".")
    setattr(getattr(settings, groups[0]) if groups else settings, name, value)
    with pytest.raises(ValueError, match=message):
        train(settings, data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", [32, "32-true", "bf16-mixed"])
def test_precisions_that_work(tmp_path, precision, config, data):
    settings = config(tmp_path, epochs=1)
    settings.trainer["precision"] = precision
    train(settings, data)
    assert json.loads((tmp_path / "training.json").read_text())["train/precision"] == precision


def test_a_loss_that_the_method_does_not_have_is_an_error(tmp_path, config, data):
    settings = config(tmp_path, "supcon")
    settings.method.mixed_loss = "selfsup"
    with pytest.raises(ValueError, match="supcon has only supervised"):
        Pretraining(settings, data.train)
    settings = config(tmp_path, "simclr")
    settings.method.attribution = "supervised"
    with pytest.raises(ValueError, match="simclr has selfsup"):
        Pretraining(settings, data.train)
