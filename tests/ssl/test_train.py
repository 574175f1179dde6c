"""Training repeats itself: the same seed, and a run that was stopped between two steps."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from pytorch_lightning import Callback
from safetensors.torch import load_file

import gradmix.ssl.pretrain
from gradmix.ssl.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EncoderConfig,
    MethodConfig,
    MixConfig,
    OptimizerConfig,
    SpeedConfig,
)
from gradmix.ssl.data import load_data
from gradmix.ssl.loader import TrainLoader
from gradmix.ssl.pretrain import Pretraining, build_optimizer, mixes_at
from gradmix.ssl.train import train, where_images_lie


def config(run_dir, method="joint", mix="gradmix", **changes):
    weights = {"simclr": (0.0, 1.0), "supcon": (1.0, 0.0), "joint": (1.0, 1.0)}[method]
    inner = "supervised" if method == "supcon" else "selfsup"
    return Config(
        run_dir=str(run_dir),
        epochs=changes.pop("epochs", 2),
        batch_size=128,
        data=DataConfig(name="digits", image_size=8, split=0, augment=AugmentConfig(flip=0)),
        method=MethodConfig(method, *weights, mixed_loss=inner, attribution=inner),
        mix=MixConfig(mix, **changes.pop("mixing", {})),
        encoder=EncoderConfig("resnet18", width=4),
        optimizer=OptimizerConfig("adam"),
        trainer={"accelerator": "cpu"},
        **changes,
    )


def test_the_log_says_where_the_images_lie(tmp_path, capsys):
    train(config(tmp_path / "small", epochs=1), DATA)
    assert "training images: 0.1 MiB in memory on cpu" in capsys.readouterr().out
    paths = [str(tmp_path / f"{i}.png") for i in range(len(DATA.train))]
    large = replace(DATA.train, images=None, files=paths)
    assert "decoded as they are needed by 2 workers" in where_images_lie(config("unused"), large, "cpu")


def step_gradients(module, batch):
    """The gradients of one training step, and the maps and boxes it mixed with."""
    module.zero_grad()
    module.training_step(batch, 0).backward()
    return {name: p.grad for name, p in module.named_parameters()}, module.pictures[1] if module.pictures else None


@pytest.fixture
def without_batch_statistics(monkeypatch):
    """Encoders with GroupNorm: what a row becomes does not depend on the other rows of the batch."""
    build = gradmix.ssl.pretrain.build_backbone

    def build_with_group_norm(*arguments):
        backbone = build(*arguments)
        for parent in list(backbone.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.BatchNorm2d):
                    setattr(parent, name, torch.nn.GroupNorm(2, child.num_features))
        return backbone

    monkeypatch.setattr(gradmix.ssl.pretrain, "build_backbone", build_with_group_norm)


def built(settings):
    torch.manual_seed(0)
    module = Pretraining(settings, DATA.train)
    module.loader = TrainLoader(DATA.train, settings.batch_size, seed=0, epochs=1)
    return module, next(iter(module.loader))


@pytest.mark.parametrize("method", ["simclr", "supcon", "joint"])
@pytest.mark.parametrize("mix", ["none", "cutmix", "gradmix"])
def test_micro_batches_have_the_gradient_of_the_whole_batch(method, mix, without_batch_statistics):
    module, batch = built(config("unused", method, mix))
    whole, mixed = step_gradients(module, batch)
    module.config.speed.micro_batch = 48  # 256 views: five parts and a smaller one
    parts, mixed_in_parts = step_gradients(module, batch)
    if mix != "none":
        assert torch.equal(mixed.boxes, mixed_in_parts.boxes)
    for name, expected in whole.items():
        assert (parts[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_micro_batches_count_once_in_batch_statistics():
    module, batch = built(config("unused", speed=SpeedConfig(micro_batch=128)))
    step_gradients(module, batch)
    # 256 views in two parts, then 256 mixed ones: the passes for attribution and backward are not counted
    assert module.backbone.bn1.num_batches_tracked == 4


def test_attribution_every_other_step():
    module, batch = built(config("unused", mixing={"attribution_every": 2}))
    for step in range(4):
        _, mixed = step_gradients(module, batch._replace(step=step))
        assert bool(mixed.attribution.any()) == (step % 2 == 0)
        assert (mixed.kept < 1).all()


@pytest.mark.parametrize("switch", ["channels_last", "compile"])
def test_a_switch_changes_the_speed_and_not_the_gradient(switch, monkeypatch):
    compile_module = torch.nn.Module.compile  # inductor would take a minute and a C++ compiler
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    settings = config("unused")
    found = []
    for on in (True, False):
        setattr(settings.speed, switch, on)
        found.append(step_gradients(*built(settings))[0])
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_fused_optimizers_take_the_same_step(name):
    settings = config("unused")
    settings.optimizer.name = name
    weights = []
    for settings.speed.fused in (True, False):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 99))
        optimizer = build_optimizer(settings, [parameter])
        assert optimizer.defaults["fused"] == settings.speed.fused
        for step in range(3):
            parameter.grad = torch.sin(torch.arange(99) * (step + 1.0))
            optimizer.step()
        weights.append(parameter.detach().clone())
    assert torch.allclose(*weights, rtol=1e-6, atol=1e-7)


DATA = load_data(config("unused").data, 0)


def weights(run_dir):
    return load_file(run_dir / "backbone.safetensors") | load_file(run_dir / "head.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("method", "mix"),
    [("simclr", "gradmix"), ("supcon", "gradmix"), ("joint", "gradmix"), ("joint", "cutmix"), ("simclr", "mixup")],
)
def test_the_same_seed_gives_the_same_weights(tmp_path, method, mix):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        torch.rand(len(run.name))  # what happened before must not matter
        train(config(run, method, mix, epochs=1), DATA)
    first, second = map(weights, runs)
    assert same(first, second)
    assert all(value.isfinite().all() for value in first.values() if value.is_floating_point())


def test_mixing_and_the_seed_matter(tmp_path):
    for name, changes in {"a": {}, "b": {"mix": "none"}, "c": {"seed": 1}}.items():
        train(config(tmp_path / name, epochs=1, **changes), DATA)
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
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(config(folder, epochs=3), DATA)
    return weights(folder)


@pytest.mark.parametrize("step", [1, 5, 6, 15])
def test_a_run_that_died_goes_on_to_the_same_weights(tmp_path, whole, step):
    """5 steps an epoch: inside epochs, at their ends, just behind them, and at the very end."""
    settings = config(tmp_path, epochs=3, checkpoint_seconds=0)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings, DATA, [Stop(step)])
    train(settings, DATA)
    assert same(whole, weights(tmp_path))
    resumed = json.loads((tmp_path / "training.json").read_text())["train/resumed_from_step"]
    assert resumed == step - 1  # the step whose checkpoint was not written yet is lost, no other


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_exits_and_the_run_goes_on(tmp_path, whole, number):
    settings = config(tmp_path, epochs=3)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(settings, DATA, [Stop(7, number)])
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) is before
    train(settings, DATA)
    assert same(whole, weights(tmp_path))
    assert json.loads((tmp_path / "training.json").read_text())["train/resumed_from_step"] == 7


def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole):
    settings = config(tmp_path, epochs=3, checkpoint_seconds=0)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings, DATA, [Stop(6)])
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000004.ckpt", "step-00000005.ckpt"]
    kept[1].write_bytes(kept[1].read_bytes()[:-500])
    with pytest.warns(UserWarning, match="step-00000005.ckpt: damaged checkpoint skipped"):
        train(settings, DATA)
    assert same(whole, weights(tmp_path))


def test_gradient_accumulation_resumes_between_optimizer_steps(tmp_path):
    twice = {"accelerator": "cpu", "accumulate_grad_batches": 2}
    settings = [config(tmp_path / name, epochs=2, checkpoint_seconds=0) for name in "ab"]
    for each in settings:
        each.trainer = twice
    train(settings[0], DATA)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings[1], DATA, [Stop(6)])
    train(settings[1], DATA)
    assert json.loads((tmp_path / "b/training.json").read_text())["train/resumed_from_step"] == 4
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_when_to_mix():
    always, never = MixConfig("gradmix"), MixConfig("gradmix", probability=0)
    places = [(epoch, step) for epoch in range(20) for step in range(50)]
    assert all(mixes_at(always, 0, *p) for p in places)
    assert not any(mixes_at(never, 0, *p) for p in places)
    half = [mixes_at(MixConfig("gradmix", probability=0.5), 0, *p) for p in places]
    assert 0.45 < sum(half) / len(half) < 0.55
    window = MixConfig("gradmix", start_epoch=3, end_epoch=5)
    assert {epoch for epoch, step in places if mixes_at(window, 0, epoch, step)} == {3, 4}


def test_a_loss_that_the_method_does_not_have_is_an_error(tmp_path):
    settings = config(tmp_path, "supcon")
    settings.method.mixed_loss = "selfsup"
    with pytest.raises(ValueError, match="supcon has only supervised"):
        Pretraining(settings, DATA.train)
    settings = config(tmp_path, "simclr")
    settings.method.attribution = "supervised"
    with pytest.raises(ValueError, match="simclr has selfsup"):
        Pretraining(settings, DATA.train)
