"""Training steps on a pretended GPU: nothing is left on the host that has to be on the device, and nothing waits.

Where there is no GPU, device mismatches and needless waiting go unnoticed. Here tensors say that they lie on one, are
computed with on the CPU, and refuse to meet tensors of the host as a GPU's would. One wait goes unseen here: kornia
draws the random numbers of a crop on the host, and copying them to a real GPU waits.
"""

import traceback
from types import SimpleNamespace

import kornia
import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import gradmix
from gradmix.ssl.config import DistillConfig, OutlierConfig, SpeedConfig
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.guard import Guard
from gradmix.ssl.optimizer import build_optimizer
from gradmix.ssl.pictures import mixing_picture
from gradmix.ssl.pretrain import Pretraining

pytestmark = pytest.mark.skipif(
    Version(kornia.__version__) < Version("0.9"),
    reason="kornia before 0.9 picks the images of a batch by a mask of the host, for which a GPU waits",
)
GPU = torch.device("cuda", 0)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
waits: list[str] = []  # places where the host would wait for the device


def waits_here(what: str) -> None:
    stack = [f for f in traceback.extract_stack() if "/ssl/" in f.filename or "/gradmix/" in f.filename]
    waits.append(f"{what}: {[f.line for f in stack if 'test_on_gpu' not in f.filename][-1:]}")


class OnGPU(Tensor):
    """Holds a tensor of the host, and says that it lies on the device."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, values: Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        wrapper = Tensor._make_wrapper_subclass(cls, values.shape, device=values.device, **layout)
        wrapper.values_ = values
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        host = [tensor for tensor in tensors if not isinstance(tensor, OnGPU) and tensor.ndim]
        assert not host, f"{function} of tensors on the device and on the host"
        if name in READS:
            waits_here(name)
        if name in ("index", "index_put", "index_put_"):
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                waits_here("the pixels of a mask are counted")
        out = function(*tree_map(values, args), **tree_map(values, kwargs))
        out = tree_map(lambda leaf: OnGPU(leaf) if isinstance(leaf, Tensor) else leaf, out)
        return return_and_correct_aliasing(function, args, kwargs, out)

    def tolist(self):
        waits_here("tolist")
        return self.values_.tolist()


def values(leaf):
    return leaf.values_ if isinstance(leaf, OnGPU) else leaf


class Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return tensor.values_.clone() if isinstance(tensor, OnGPU) else OnGPU(tensor.detach().clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return Move.apply(gradient)


class PretendedGPU(TorchFunctionMode):
    """Inside, what is made on or moved to a GPU is :class:`OnGPU`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, Tensor) and name in ("to", "cpu"):
            devices = [torch.device(a) for a in [*args[1:], kwargs.get("device")] if isinstance(a, str | torch.device)]
            devices += [a.device for a in args[1:] if isinstance(a, Tensor)] + [torch.device("cpu")] * (name == "cpu")
            rest = [a for a in [*args[1:], kwargs.get("dtype")] if isinstance(a, torch.dtype)]
            if devices and (devices[0].type == "cuda") != isinstance(first, OnGPU):
                if not kwargs.get("non_blocking"):
                    waits_here(f"{name} {devices[0]}")
                first = Move.apply(first)
            return Tensor.to(first, *rest) if rest else first
        generator = kwargs.get("generator")
        device = torch.device(kwargs.pop("device", None) or getattr(first, "device", "cpu"))
        if generator is not None:
            assert generator.device.type == device.type, f"{name} on {device} with a generator of {generator.device}"
        out = function(*args, **kwargs)
        if device.type == "cuda" and isinstance(out, Tensor) and not isinstance(out, OnGPU):
            if name in ("tensor", "as_tensor"):
                waits_here(name)
            out = Move.apply(out)
        return out


class GPUGenerator(torch.Generator):
    device = property(lambda self: GPU)


class Event:
    def record(self):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def gpu(monkeypatch):
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": GPUGenerator() if device == GPU else generator(device))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=GPU: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device=GPU: torch.set_rng_state(state))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits.clear()
    with PretendedGPU():
        yield


def to_gpu(module):
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = None if parameter is None else torch.nn.Parameter(OnGPU(parameter.data))
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else OnGPU(buffer)


def steps(settings, data, device="cpu", on_nonfinite="error"):
    """Two steps as Lightning takes them: their losses, and the module."""
    torch.manual_seed(0)
    module = Pretraining(settings, data.train)
    if device == GPU:
        to_gpu(module)
    module.loader = TrainLoader(data.train, settings.batch_size, seed=0, epochs=1, device=device)
    waits.clear()  # moving the data set may wait
    optimizer, guard, losses = build_optimizer(settings, module.parameters()), Guard(on_nonfinite, 1), []
    trainer = SimpleNamespace(precision_plugin=None)
    for _, batch in zip(range(2), module.loader, strict=False):
        guard.on_train_batch_start(trainer, module, batch, 0)
        loss = module.training_step(batch, 0)
        guard.on_before_backward(trainer, module, loss)
        loss.backward()
        guard.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    guard.settle()
    return [values(loss).item() for loss in losses], module


def small(config, *arguments, **changes):
    settings = config("unused", *arguments, **changes)
    settings.batch_size, settings.speed.fused = 16, False
    return settings


MIXES = [*gradmix.MIXERS.own, "none"]


@pytest.mark.parametrize(
    ("method", "mix"),
    [*(("joint", mix) for mix in MIXES), ("simclr", "gradmix"), ("supcon", "gradmix"), ("sphor", "mixup")],
)
def test_a_step_on_the_device_is_the_hosts_and_waits_for_nothing(gpu, method, mix, config, data):
    expected, _ = steps(small(config, method, mix), data)
    found, _ = steps(small(config, method, mix), data, GPU)
    assert found == expected
    assert not waits


@pytest.mark.parametrize(
    "changes",
    [
        {"speed": SpeedConfig(micro_batch=8)},
        {"mixing": {"options": {"partner": "similar"}}},
        {"distill": DistillConfig("ema")},
        {"method": "sphor", "distill": DistillConfig("ema", form="logits")},
        {"outliers": OutlierConfig("attribution", how="shift")},
    ],
    ids=["micro_batch", "similar", "relations", "logits", "outliers"],
)
def test_so_is_a_step_with_other_settings(gpu, changes, config, data):
    expected, _ = steps(small(config, **changes), data)
    found, _ = steps(small(config, **changes), data, GPU)
    assert found == expected
    assert not waits


def test_only_skipping_waits_for_the_verdict(gpu, config, data):
    steps(small(config), data, GPU, on_nonfinite="skip")
    assert len(waits) == 2 and all("flags.to" in wait for wait in waits)


def test_pictures_come_from_the_device(gpu, config, data):
    _, on_host = steps(small(config), data)
    _, on_gpu = steps(small(config), data, GPU)
    pictures = [mixing_picture(module.pictures, module.backbone.constants) for module in (on_host, on_gpu)]
    assert torch.equal(*pictures) and pictures[1].device.type == "cpu"


def test_the_pretended_gpu_notices(gpu):
    there, here = torch.rand(4, device=GPU), torch.rand(4)
    with pytest.raises(AssertionError, match="on the device and on the host"):
        there + here
    with pytest.raises(AssertionError, match="with a generator of cpu"):
        torch.rand(4, device=GPU, generator=torch.Generator())
    assert not waits
    for wait in (there.cpu, there.sum().item, there.tolist, lambda: here.to(GPU), lambda: there[there > 0]):
        waits.clear()
        wait()
        assert waits
    waits.clear()
    torch.tensor([1.0], device=GPU)
    assert waits
