"""The method, a training step and the commands on a real GPU where there is one, and the same on the CPU."""

import json

import pytest
import torch
import torch.nn.functional as F

import gradmix
from gradmix.mixing import MIXERS
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.losses import NTXentLoss, SupConLoss
from gradmix.ssl.pretrain import Pretraining, build_optimizer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    """In full float32, so that there is something to compare with."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def projections(rows, dimensions=32):
    z = F.normalize(torch.randn(rows, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return z, z.flip(0).roll(3, 0)


@pytest.mark.parametrize("supervised", [False, True])
def test_losses_and_their_gradients_are_those_of_float64(device, supervised):
    z, p = projections(96)
    labels, weight = torch.arange(48).repeat(2) % 5, torch.linspace(0.5, 1, 96)
    found = []
    for kind in (z.dtype, torch.float32):
        where = torch.device("cpu") if kind == torch.float64 else device
        rows, mixed = (t.to(where, kind).requires_grad_() for t in (z, p))
        if supervised:
            loss = SupConLoss(0.1)
            value = loss(rows, labels.to(where)) + loss(rows, labels.to(where), mixed, weight.to(where, kind))
        else:
            loss = NTXentLoss(0.1)
            value = loss(rows) + loss(rows, mixed, weight.to(where, kind))
        found.append([value, *torch.autograd.grad(value, [rows, mixed])])
    for exact, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-4, atol=1e-5)


def test_maps_are_those_of_float64(device):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3, 2, 1), torch.nn.Tanh()
    )
    images = torch.rand(12, 3, 32, 32)

    def maps(where, kind):
        network, views = encoder.to(where, kind), images.to(where, kind)
        mixer = gradmix.GradMix(["1", "3"])
        with mixer.watch(network):
            z = F.normalize(network(views).flatten(1))
        return mixer.attribute(views, NTXentLoss(0.2)(z)).cpu().double()

    exact = maps(torch.device("cpu"), torch.float64)
    torch.testing.assert_close(maps(device, torch.float32), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in ("mixup", "fmix", "extra_view")])
def test_a_mixed_pixel_is_ones_own_or_comes_from_elsewhere_and_kept_counts_them(device, name):
    torch.manual_seed(0)
    views = torch.rand(16, 3, 24, 24, device=device)
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 2)).to(device)
    mixer = MIXERS[name]()
    if getattr(mixer, "centre", "random") == "peak":
        mixer = MIXERS[name](layers=["0"])
        with mixer.watch(encoder):
            loss = NTXentLoss(0.5)(F.normalize(encoder(views).relu().mean((2, 3))))
        mixed = mixer(views, loss)
    else:
        mixed = mixer(views)
    own = (mixed.images == views).all(1).float().mean((1, 2))
    assert mixed.images.device.type == device.type
    torch.testing.assert_close(own, mixed.kept.float(), atol=1e-6, rtol=0)
    assert (mixed.kept < 1).all()


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "mix"),
    [("joint", "none"), ("joint", "gradmix"), ("supcon", "cutmix"), ("simclr", "fmix"), ("sphor", "mixup")],
)
def test_training_learns(device, method, mix, precision, config, data):
    """Twenty steps on few images: the loss falls, weights stay finite, in every precision that the device has."""
    if device.type == "cpu" and precision == torch.float16:
        pytest.skip("a GPU's precision")
    settings = config("unused", method, mix)
    settings.encoder.width, settings.optimizer.base_lr = 8, 5e-3
    torch.manual_seed(0)
    module = Pretraining(settings, data.train).to(device)
    module.loader = TrainLoader(data.train, settings.batch_size, seed=0, epochs=1, device=device)
    optimizer, batch, losses = build_optimizer(settings, module.parameters()), next(iter(module.loader)), []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses).float().cpu()
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()
    assert all(weight.isfinite().all() for weight in module.parameters())


@needs_gpu
@pytest.mark.parametrize("method", ["simclr", "supcon", "joint", "sphor"])
@pytest.mark.parametrize("mix", ["none", "gradmix", "cutmix", "mixup", "resizemix", "fmix", "random_box", "extra_view"])
def test_a_step_waits_for_nothing_but_the_augmentation(method, mix, config, data):
    """CUDA itself says so: whatever makes the host wait raises here. kornia copies the random numbers that it draws."""
    settings = config("unused", method, mix)
    module = Pretraining(settings, data.train).cuda()
    module.loader = TrainLoader(data.train, settings.batch_size, seed=0, epochs=1, device=torch.device("cuda"))
    batches = iter(module.loader)
    module.training_step(next(batches), 0).backward()  # warms up: constants are made once
    batch = next(batches)
    module.augment.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    module.augment.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.training_step(batch, 0).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_commands_from_training_to_scores(device, command, tmp_path):
    from PIL import Image

    accelerator = "gpu" if device.type == "cuda" else "cpu"
    first = ("epochs=2", "encoder.width=8", "mix=gradmix", f"trainer.accelerator={accelerator}", "run_dir=run")
    done = command("pretrain", *first)
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["train/precision"] == ("bf16-mixed" if device.type == "cuda" else "32-true")
    assert metrics["knn/top1"] > 0.8 and metrics["osr/deep_knn/auroc"] > 0.6
    Image.new("L", (9, 9), 77).save(tmp_path / "a.png")
    assert command("score", "detector=run/detector", "images=a.png", "out=scores.csv").code == 0
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 2
    features = gradmix.load(tmp_path / "run").to(device)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device))
    assert features.device.type == device.type and features.isfinite().all()
