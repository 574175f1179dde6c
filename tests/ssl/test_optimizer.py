"""The optimizer: one step as another, what weight decay falls on, and checkpoints from before it spared anything."""

import math

import pytest
import torch
from pytorch_lightning import Callback
from safetensors.torch import load_file
from torch import nn

from gradmix.ssl.config import OptimizerConfig
from gradmix.ssl.optimizer import build_optimizer, build_schedule
from gradmix.ssl.train import train

DECAY = 0.1


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_fused_optimizers_take_the_same_step(name, config):
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


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5), nn.LayerNorm(5), nn.Linear(5, 2)]
    return nn.Sequential(*layers).double()


def steps(module: nn.Module, images: torch.Tensor):
    """Gradients of three steps, one after the other; whoever takes them takes the step."""
    for _ in range(3):
        module.zero_grad()
        module(images).square().mean().backward()
        yield [parameter.grad.clone() for parameter in module.parameters()]


def is_decayed(name: str, module: nn.Module) -> bool:
    """By what it belongs to: weights of convolutions and linear layers."""
    owner, _, kind = name.rpartition(".")
    return kind == "weight" and isinstance(module.get_submodule(owner), nn.Conv2d | nn.Linear)


def by_hand(name: str, lr: float, images: torch.Tensor) -> list[torch.Tensor]:
    """The weights after three steps, parameter by parameter from the papers, with decay on some."""
    module = network()
    decays = [DECAY if is_decayed(key, module) else 0.0 for key, _ in module.named_parameters()]
    assert 0 < sum(decay > 0 for decay in decays) < len(decays)
    first, second = ([torch.zeros_like(p) for p in module.parameters()] for _ in range(2))
    for step, gradients in enumerate(steps(module, images), start=1):
        with torch.no_grad():
            for i, (weight, gradient, decay) in enumerate(zip(module.parameters(), gradients, decays, strict=True)):
                if name == "adamw":  # arXiv 1711.05101: beside the moments
                    weight -= lr * decay * weight
                elif name == "lars" and decay:  # arXiv 1708.03888: the layer's own rate
                    size, slope = weight.norm(), gradient.norm()
                    gradient = 0.001 * size / (slope + decay * size + 1e-8) * (gradient + decay * weight)
                else:
                    gradient = gradient + decay * weight
                if name in ("sgd", "lars"):
                    first[i] = 0.9 * first[i] + gradient
                    weight -= lr * first[i]
                else:
                    first[i] = 0.9 * first[i] + 0.1 * gradient
                    second[i] = 0.999 * second[i] + 0.001 * gradient**2
                    unbiased = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
                    weight -= lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    return [parameter.detach() for parameter in module.parameters()]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_weight_decay_spares_biases_and_what_normalises(name, config):
    settings = config("unused")
    settings.optimizer = OptimizerConfig(name, base_lr=0.2, weight_decay=DECAY)
    images = torch.rand(7, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    module = network()
    optimizer = build_optimizer(settings, module.parameters())
    for _ in steps(module, images):
        optimizer.step()
    for found, expected in zip(module.parameters(), by_hand(name, 0.1, images), strict=True):  # 128 / 256 of base_lr
        torch.testing.assert_close(found.detach(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_without_weight_decay_there_is_one_group_as_in_old_checkpoints(name, config):
    settings = config("unused")
    settings.optimizer = OptimizerConfig(name)
    assert len(build_optimizer(settings, network().parameters()).param_groups) == 1


class Stop(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        if module.steps == 3:
            raise SystemExit(1)


def test_a_run_with_weight_decay_goes_on_exactly_and_one_from_before_is_refused(tmp_path, config, data):
    decayed = OptimizerConfig("sgd", weight_decay=1e-3)
    train(config(tmp_path / "whole", epochs=1, optimizer=decayed), data)
    stopped = config(tmp_path / "stopped", epochs=1, optimizer=decayed, checkpoint_seconds=0.0)
    with pytest.raises(SystemExit):
        train(stopped, data, [Stop()])
    path = max((tmp_path / "stopped" / "checkpoints").glob("*.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    content, groups = path.read_bytes(), checkpoint["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-3, 0]

    rows = [row for group in groups for row in group["params"]]
    checkpoint["optimizer"]["param_groups"] = [{**groups[0], "params": rows}]  # as it was written before
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"began when optimizer\.weight_decay still fell on biases"):
        train(stopped, data)

    path.write_bytes(content)
    train(stopped, data)
    whole, gone_on = (load_file(tmp_path / run / "backbone.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(whole[name], gone_on[name]) for name in whole)


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "steps"), [(1, 9 / 8, 2), (1, 1.0, 1), (1, 9 / 4, 3), (10, 0.7, 7)]
)
def test_the_shortest_training_learns(epochs, steps_per_epoch, steps, config):
    settings = config("unused", epochs=epochs)
    settings.optimizer.warmup_epochs = 0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(settings, optimizer, steps_per_epoch)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 1 and all(rate > 0 for rate in rates[:-1])


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine_to_its_end(config):
    settings = config("unused", epochs=6)
    settings.optimizer.warmup_epochs, settings.optimizer.final_lr = 2, 0.25
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
    schedule = build_schedule(settings, optimizer, 4.0)
    rates = []
    for _ in range(24):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rise = [3 * (step + 1) / 8 for step in range(8)]
    fall = [3 * (0.25 + 0.75 * (1 + math.cos(math.pi * step / 15)) / 2) for step in range(16)]
    assert rates == pytest.approx(rise + fall)
