"""Outliers pushed from every class, or from every image: slow loops, finite differences, two processes, the step."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from safetensors.torch import load_file
from torch.autograd import gradcheck

from gradmix.ssl.config import MethodConfig, OutlierConfig
from gradmix.ssl.data.loader import TrainLoader, seed_of
from gradmix.ssl.losses import NTXentLoss
from gradmix.ssl.outlier_losses import negatives_loss, uniform_loss
from gradmix.ssl.pictures import mixing_picture
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.train import check, train


def points(rows, seed=0, width=5):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=1)


def test_uniform_is_the_slow_loops():
    logits = 3 * points(7)
    total = 0.0
    for row in logits.tolist():
        log_sum = math.log(sum(math.exp(logit) for logit in row))
        total += sum(1 / 5 * (math.log(1 / 5) - (logit - log_sum)) for logit in row)
    assert uniform_loss(logits).item() == pytest.approx(total / 7, rel=1e-12)
    assert uniform_loss(torch.ones(3, 4)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_negatives_are_what_the_denominators_gain(temperature):
    z, outliers = points(8), points(3, seed=1)
    total = with_them = 0.0
    for r in range(8):
        clean = sum(math.exp(float(z[r] @ z[j]) / temperature) for j in range(8) if j != r)
        more = sum(math.exp(float(z[r] @ o) / temperature) for o in outliers)
        total += math.log(clean + more) - math.log(clean)
        with_them += math.log(clean + more) - float(z[r] @ z[(r + 4) % 8]) / temperature
    found = negatives_loss(z, outliers, temperature)
    assert found.item() == pytest.approx(total / 8, rel=1e-10)
    assert (NTXentLoss(temperature)(z) + found).item() == pytest.approx(with_them / 8, rel=1e-10)


def test_gradients_are_those_of_finite_differences():
    z, outliers = points(6).requires_grad_(), points(4, seed=1).requires_grad_()
    assert gradcheck(uniform_loss, z)
    assert gradcheck(lambda z, o: negatives_loss(z, o, 0.3), (z, outliers))


def test_blocks_and_half_precision_are_the_same(monkeypatch):
    z, outliers = points(9), points(4, seed=1)
    whole = negatives_loss(z, outliers, 0.05)
    monkeypatch.setattr("gradmix.ssl.losses.BLOCK", 4)
    torch.testing.assert_close(negatives_loss(z, outliers, 0.05), whole)
    z, outliers = z.to(torch.bfloat16), outliers.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = negatives_loss(z, outliers, 0.05), uniform_loss(z)
    torch.testing.assert_close(half, (negatives_loss(z.float(), outliers.float(), 0.05), uniform_loss(z.float())))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_loss(torch.ones(3)), r"logits: expected \[N, K\], got \(3,\)"),
        (
            lambda: negatives_loss(points(3), points(3, width=4), 0.1),
            r"outliers: expected \[M, D\] for z \[N, D\], got",
        ),
        (lambda: negatives_loss(points(3), points(3), 0), "temperature: expected a number above 0"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def step(part, outlier_part):
    matrix = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    z, outliers = (F.normalize(x @ matrix, dim=1) for x in (points(12)[part], points(4, seed=1)[outlier_part]))
    value = negatives_loss(z, outliers, 0.2) + uniform_loss(outliers)
    value.backward()
    return matrix.grad, value.detach()


def one_process(rank, folder):
    found = step(torch.arange(6) + 6 * rank, torch.arange(2) + 2 * rank)
    for number in found:
        torch.distributed.all_reduce(number)
        number /= 2
    torch.save(found, folder / f"{rank}.pt")


def test_two_processes_are_one_on_the_concatenated_batch(in_processes, tmp_path):
    in_processes(one_process, 2)
    expected = step(torch.arange(12), torch.arange(4))
    for rank in range(2):
        for found, value in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)


def built(settings, data):
    torch.manual_seed(0)
    module = Pretraining(settings, data.train)
    module.loader = TrainLoader(data.train, settings.batch_size, seed=0, epochs=1)
    return module, next(iter(module.loader))


@pytest.mark.parametrize("mix", ["none", "gradmix", "cutmix", "random_box"])
@pytest.mark.parametrize("method", ["joint", "sphor"])
def test_the_step_pushes_disrupted_views_away(method, mix, config, data):
    module, batch = built(config("unused", method, mix, outliers=OutlierConfig("attribution", weight=0.5)), data)
    plain, _ = built(config("unused", method, mix), data)
    module.training_step(batch, 0).backward()
    plain.training_step(batch, 0)
    views, maps, outliers = module.disrupted
    assert len(outliers) == 32 and (maps.amax((1, 2)) > 0).all() and (views != outliers).any()
    changed = (views != outliers).any(1).double().mean()
    assert 0 < changed <= round(0.1 * 64) / 64
    for name in ("selfsup", "supervised", "targets"):  # nothing else sees them; BatchNorm does, in the mixed ones
        if f"train/{name}" in plain.scalars:
            assert torch.equal(module.scalars[f"train/{name}"], plain.scalars[f"train/{name}"])
    if mix != "none":
        assert torch.equal(module.pictures[1].images, plain.pictures[1].images)
    with torch.no_grad():
        more = outliers if mix == "none" else torch.cat([module.pictures[1].images, outliers])
        all_views = module.draw_views(batch.images, seed_of(module.config.seed, batch.epoch, batch.step))
        z, o = module.embed(all_views)[1], module.embed(more)[1][-32:]
        expected = negatives_loss(z, o, 0.1) if method == "joint" else uniform_loss(module.target_loss.logits(o))
    torch.testing.assert_close(module.scalars["train/outliers"], expected, rtol=1e-4, atol=1e-5)
    parts = [value for name, value in module.scalars.items() if name not in ("train/loss", "train/kept")]
    torch.testing.assert_close(module.scalars["train/loss"], sum(parts) - 0.5 * expected, rtol=1e-4, atol=1e-5)
    picture = mixing_picture(module.pictures, module.backbone.constants, disrupted=module.disrupted)
    assert picture.shape == (3, 2 + (3 if mix == "none" else 6) * 66, 2 + 8 * 66)


def test_mixed_images_may_be_the_outliers(config, data):
    settings = config("unused", outliers=OutlierConfig("mixed", share=0.5), mixing={"weight": 0.0})
    module, batch = built(settings, data)
    module.training_step(batch, 0)
    views, mixed = module.pictures
    with torch.no_grad():
        expected = negatives_loss(module.embed(views)[1], module.embed(mixed.images)[1][:128], 0.1)
    torch.testing.assert_close(module.scalars["train/outliers"], expected, rtol=1e-4, atol=1e-5)
    assert module.disrupted is None


def test_prototypes_are_all_as_likely(config, data):
    settings = config("unused", "sphor", "none", outliers=OutlierConfig("attribution"))
    settings.method = MethodConfig("palm", prototypes=1.0, mixed_loss="prototypes", attribution="prototypes")
    settings.method.temperature_end = 0.5
    module, batch = built(settings, data)
    module.training_step(batch._replace(epoch=1, step=0), 0)  # half of two epochs: between 0.1 and 0.5
    with torch.no_grad():
        logits = module.embed(module.disrupted[2])[1] @ module.prototype_loss.prototypes.T / 0.3
    torch.testing.assert_close(module.scalars["train/outliers"], uniform_loss(logits), rtol=1e-4, atol=1e-5)


def test_steps_that_do_not_look_have_no_outliers(config, data):
    settings = config("unused", mix="none", outliers=OutlierConfig("attribution"), mixing={"attribution_every": 2})
    module, batch = built(settings, data)
    for number in range(3):
        module.training_step(batch._replace(step=number), 0)
        assert ("train/outliers" in module.scalars) == (number % 2 == 0)


class Stop(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.steps == 7:
            raise RuntimeError("power cut")


def test_a_run_that_died_goes_on_to_the_same_weights(tmp_path, config, data):
    """Outliers and prototypes at once."""
    settings = [
        config(tmp_path / n, "sphor", checkpoint_seconds=0, outliers=OutlierConfig("attribution")) for n in "ab"
    ]
    for one in settings:
        one.method = MethodConfig("palm", prototypes=1.0, mixed_loss="prototypes", attribution="prototypes")
    train(settings[0], data)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings[1], data, [Stop()])
    train(settings[1], data)
    first, second = (load_file(tmp_path / name / "backbone.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    told = [json.loads((tmp_path / name / "training.json").read_text()) for name in "ab"]
    assert told[0]["train/outliers"] == told[1]["train/outliers"] and told[1]["train/resumed_from_step"] == 6


@pytest.mark.parametrize(
    ("method", "mix", "outliers", "message"),
    [
        ("joint", "none", OutlierConfig("mixed"), "outliers.name: mix=none mixes nothing that could be an outlier"),
        ("joint", "none", OutlierConfig("some"), "outliers.name: expected one of none, attribution, mixed, got 'some'"),
    ],
)
def test_what_makes_no_sense_is_refused(method, mix, outliers, message, config):
    with pytest.raises(ValueError, match=message):
        check(config("unused", method, mix, outliers=outliers))


def test_uniform_needs_classes(config, data):
    with pytest.raises(
        ValueError, match=r"outliers\.form: uniform is over class targets or prototypes, which method=jo"
    ):
        Pretraining(config("unused", outliers=OutlierConfig("attribution", form="uniform")), data.train)
