"""Orthogonal class targets against a slow loop, closed forms, and the training step that uses them."""

import math

import pytest
import torch
import torch.nn.functional as F

from gradmix.ssl.config import MethodConfig
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.targets import OrthogonalTargetLoss


def slow(z, targets, shares, temperature):
    """Cross-entropy of soft labels, row by row: -sum_k share_k log softmax_k."""
    total = 0.0
    for row, share in zip(z.double(), shares, strict=True):
        logits = [float(row @ target.double()) / temperature for target in targets]
        log_sum = math.log(sum(math.exp(logit) for logit in logits))
        total -= sum(part * (logit - log_sum) for part, logit in zip(share, logits, strict=True))
    return total / len(z)


def shares_of(labels, classes, smoothing, other=None, kept=None):
    """Soft labels by hand: mixed by what was kept, then smoothed."""
    shares = []
    for i, label in enumerate(labels.tolist()):
        share = [0.0] * classes
        share[label] += 1.0 if kept is None else float(kept[i])
        if other is not None:
            share[int(other[i])] += 1 - float(kept[i])
        shares.append([(1 - smoothing) * part + smoothing / classes for part in share])
    return shares


def case(count=12, classes=5, dim=8):
    generator = torch.Generator().manual_seed(count)
    z = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    labels, other = torch.randint(0, classes, (2, count), generator=generator)
    return z, labels, other, torch.rand(count, generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_it_is_the_cross_entropy_of_soft_labels(temperature, smoothing):
    z, labels, other, kept = case()
    loss = OrthogonalTargetLoss(5, 8, temperature, smoothing)
    clean = slow(z, loss.targets, shares_of(labels, 5, smoothing), temperature)
    assert loss(z, labels).item() == pytest.approx(clean, rel=1e-5)
    mixed = slow(z, loss.targets, shares_of(labels, 5, smoothing, other, kept), temperature)
    assert loss(z, labels, other, kept).item() == pytest.approx(mixed, rel=1e-5)
    assert loss(z, labels, other, torch.ones(len(z))).item() == pytest.approx(clean, rel=1e-5)
    warmer = slow(z, loss.targets, shares_of(labels, 5, smoothing), 2 * temperature)
    assert loss(z, labels, temperature=2 * temperature).item() == pytest.approx(warmer, rel=1e-5)


@pytest.mark.parametrize(("classes", "dim"), [(1, 1), (6, 128), (128, 128)])
def test_targets_are_at_right_angles_and_always_the_same(classes, dim):
    torch.manual_seed(classes)
    loss = OrthogonalTargetLoss(classes, dim)
    assert torch.allclose(loss.targets @ loss.targets.T, torch.eye(classes), atol=1e-6)
    torch.manual_seed(0)
    assert torch.equal(loss.targets, OrthogonalTargetLoss(classes, dim).targets)
    assert not list(loss.parameters())


def test_closed_form_on_the_targets_themselves():
    loss = OrthogonalTargetLoss(6, 16, temperature=0.5)
    expected = math.log(math.exp(2) + 5) - 2
    assert loss(loss.targets, torch.arange(6)).item() == pytest.approx(expected, abs=1e-6)
    assert loss(loss.targets.roll(1, 0), torch.arange(6)).item() == pytest.approx(expected + 2, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    z, labels, other, kept = case()
    loss = OrthogonalTargetLoss(5, 8, temperature=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(z.to(dtype), labels, other, kept)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss(z.to(dtype).float(), labels, other, kept).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OrthogonalTargetLoss(9, 8), "classes: 9 targets at right angles need as many dimensions, got dim=8"),
        (lambda: OrthogonalTargetLoss(5, 8, temperature=0), "temperature: expected a number above 0, got 0"),
        (lambda: OrthogonalTargetLoss(5, 8, smoothing=1.5), "smoothing: expected 0 to 1, got 1.5"),
        (lambda: OrthogonalTargetLoss(5, 9)(*case()[:2]), r"z: expected \[N, 9\], got \(12, 8\)"),
        (lambda: OrthogonalTargetLoss(5, 8)(*case()[:3]), "other and kept: give both or neither"),
        (
            lambda: OrthogonalTargetLoss(5, 8)(case()[0], torch.zeros(3, dtype=torch.long)),
            r"labels: expected one per row of z, \[12\], got \(3,\)",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def sphor(settings, mixed_loss="targets"):
    settings.method = MethodConfig(
        "sphor", targets=1.5, smoothing=0.1, mixed_loss=mixed_loss, attribution="targets", temperature=0.2
    )
    return settings


@pytest.mark.parametrize("mix", ["mixup", "gradmix"])
def test_the_training_step_adds_the_mixed_images_with_both_their_labels(mix, config, data):
    settings = sphor(config("unused", mix=mix, mixing={"weight": 0.5}))
    module = Pretraining(settings, data.train)
    module.loader = TrainLoader(data.train, settings.batch_size, seed=0, epochs=1)
    batch = next(iter(module.loader))
    loss = module.training_step(batch, 0).item()
    views, mixed = module.pictures
    labels = batch.labels.repeat(2)
    with torch.no_grad():
        z, p = module.embed(views)[1], module.embed(mixed.images)[1]
    targets = module.target_loss.targets
    assert len(targets) == len(data.classes)
    clean = slow(z, targets, shares_of(labels, 6, 0.1), 0.2)
    theirs = slow(p, targets, shares_of(labels, 6, 0.1, labels[mixed.partner], mixed.kept), 0.2)
    assert loss == pytest.approx(1.5 * (clean + 0.5 * theirs), rel=1e-5)
    assert (mixed.attribution is not None) == (mix == "gradmix")


def test_a_head_too_narrow_for_the_classes_is_refused_before_training(config, data):
    settings = sphor(config("unused"))
    settings.encoder.head_dim = 5
    message = "encoder.head_dim: 6 class targets at right angles need 6 or more, got 5"
    with pytest.raises(ValueError, match=message):
        Pretraining(settings, data.train)


def test_the_mixed_images_cannot_enter_a_loss_that_is_not_there(config, data):
    message = "method.mixed_loss: sphor has only targets, got 'selfsup'"
    with pytest.raises(ValueError, match=message):
        Pretraining(sphor(config("unused"), mixed_loss="selfsup"), data.train)


def test_logits_in_full_precision_under_autocast():
    z, *_ = case()
    loss = OrthogonalTargetLoss(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss.logits(z.float(), 0.05), loss.logits(z.double(), 0.05).float())
