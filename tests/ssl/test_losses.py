"""The contrastive losses against lightly, slow loops from the papers and closed forms; across processes too."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gradmix.ssl.losses
from gradmix.ssl.losses import NTXentLoss, SupConLoss


def lightlys_ntxent(z: torch.Tensor, temperature: float) -> torch.Tensor:
    from lightly.loss import NTXentLoss as Lightly  # here, because the processes below need not wait for it

    return Lightly(temperature)(*z.chunk(2))


def rows(count: int, dim: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def case(batch: int, seed: int = 0):
    """Clean rows, mixed rows, weights and labels of ``batch`` images in two views."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(2 * batch, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, max(2, batch // 2), (batch,), generator=generator).repeat(2)
    return rows(2 * batch, seed=seed), rows(2 * batch, seed=seed + 1), weight, labels


def slow_ntxent(z, temperature, p=None, kept=None):
    """Row by row from SimCLR's algorithm 1 and, with p, from GradMix's mixed term."""
    n = len(z)
    total = 0.0
    for r in range(n):
        other = (r + n // 2) % n
        positive = z[other] if p is None else p[other]
        log_sum = math.log(sum(math.exp(float(z[r] @ z[j]) / temperature) for j in range(n) if j != r))
        share = 1.0 if kept is None else float(kept[other])
        total += share * (log_sum - float(z[r] @ positive) / temperature)
    return total / n


def slow_supcon(z, labels, temperature, p=None, kept=None):
    """Row by row from equation 2 (L_out) of the SupCon paper, its mean over the anchors that have a positive."""
    n = len(z)
    losses = []
    for r in range(n):
        positives = [j for j in range(n) if j != r and labels[j] == labels[r]]
        if not positives:
            continue
        log_sum = math.log(sum(math.exp(float(z[r] @ z[j]) / temperature) for j in range(n) if j != r))
        loss = 0.0
        for j in positives:
            positive = z[j] if p is None else p[j]
            share = 1.0 if kept is None else float(kept[j])
            loss += share * (log_sum - float(z[r] @ positive) / temperature)
        losses.append(loss / len(positives))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_ntxent_is_lightlys_and_the_papers(batch, temperature):
    z, p, weight, _ = case(batch, seed=batch)
    ours = NTXentLoss(temperature)(z)
    theirs = lightlys_ntxent(z, temperature)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10, abs=1e-10)
    assert ours.item() == pytest.approx(slow_ntxent(z, temperature), rel=1e-10, abs=1e-10)
    mixed = NTXentLoss(temperature)(z, p, weight)
    assert mixed.item() == pytest.approx(slow_ntxent(z, temperature, p, weight), rel=1e-10, abs=1e-10)
    unweighted = NTXentLoss(temperature)(z, p)
    assert unweighted.item() == pytest.approx(slow_ntxent(z, temperature, p), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
def test_ntxent_gradient_is_lightlys(batch):
    z = rows(2 * batch, seed=3).requires_grad_()
    ours = torch.autograd.grad(NTXentLoss(0.1)(z), z)[0]
    theirs = torch.autograd.grad(lightlys_ntxent(z, 0.1), z)[0]
    # Lightly normalises once more, so its gradient lacks the part along z.
    along = (ours * z).sum(1, keepdim=True) * z
    assert torch.allclose(ours - along, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_supcon_is_the_papers(batch, temperature):
    z, p, weight, labels = case(batch, seed=batch + 50)
    loss = SupConLoss(temperature)
    assert loss(z, labels).item() == pytest.approx(slow_supcon(z, labels, temperature), rel=1e-10)
    slow = slow_supcon(z, labels, temperature, p, weight)
    assert loss(z, labels, p, weight).item() == pytest.approx(slow, rel=1e-10)


@pytest.mark.parametrize("batch", [4, 9, 16])
def test_in_blocks_is_the_same_loss_and_gradient(batch, monkeypatch):
    def losses_and_gradients():
        z, p, weight, labels = case(batch, seed=batch)
        leaves = [tensor.requires_grad_() for tensor in (z, p, weight)]
        ntxent, supcon = NTXentLoss(0.1), SupConLoss(0.1)
        clean = [ntxent(z), supcon(z, labels)]
        first = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in clean]  # as the attribution does
        loss = sum(clean) + 2 * ntxent(z, p, weight) + 3 * supcon(z, labels, p, weight)
        return [*first, loss, *torch.autograd.grad(loss, leaves)]

    whole = losses_and_gradients()
    monkeypatch.setattr(gradmix.ssl.losses, "BLOCK", 7)
    for blocks, expected in zip(losses_and_gradients(), whole, strict=True):
        assert torch.allclose(blocks, expected, rtol=1e-12, atol=1e-14)


def test_supcon_with_one_class_per_image_is_ntxent():
    z, p, weight, _ = case(9)
    labels = torch.arange(9).repeat(2)
    assert torch.allclose(SupConLoss(0.1)(z, labels), NTXentLoss(0.1)(z), rtol=1e-12)
    assert torch.allclose(SupConLoss(0.1)(z, labels, p, weight), NTXentLoss(0.1)(z, p, weight), rtol=1e-12)


def test_supcon_without_any_positive_is_zero_with_zero_gradient():
    z = rows(5).requires_grad_()
    loss = SupConLoss(0.05)(z, torch.arange(5))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_supcon_anchor_without_a_positive_does_not_count():
    z = rows(5)
    labels = torch.tensor([0, 0, 1, 1, 2])
    loss = SupConLoss(0.1)(z, labels)
    assert torch.isfinite(loss)
    assert loss.item() == pytest.approx(slow_supcon(z, labels, 0.1), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_closed_forms(batch, temperature):
    same = torch.ones(1, 4, dtype=torch.float64).div(2).repeat(2 * batch, 1)
    expected = math.log(2 * batch - 1)
    assert NTXentLoss(temperature)(same).item() == pytest.approx(expected, abs=1e-12)
    labels = torch.zeros(2 * batch, dtype=torch.long)
    assert SupConLoss(temperature)(same, labels).item() == pytest.approx(expected, abs=1e-12)
    # Mixed rows opposite to every anchor: 1/T at the denominator's rows, -1/T at the positive, weight 1/4.
    weight = torch.full((2 * batch,), 0.25, dtype=torch.float64)
    opposite = NTXentLoss(temperature)(same, -same, weight).item()
    assert opposite == pytest.approx((expected + 2 / temperature) / 4, abs=1e-12)


def test_orthogonal_images_closed_form():
    batch, temperature = 4, 0.5
    z = torch.eye(batch, dtype=torch.float64).repeat(2, 1)
    expected = math.log(math.exp(1 / temperature) + 2 * batch - 2) - 1 / temperature
    assert NTXentLoss(temperature)(z).item() == pytest.approx(expected, abs=1e-12)


def test_ntxent_does_not_care_about_the_order_of_images_or_views():
    z, p, weight, _ = case(6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    for index in (torch.cat([order, order + 6]), torch.arange(12).roll(6)):
        assert torch.allclose(NTXentLoss(0.1)(z[index]), NTXentLoss(0.1)(z), rtol=1e-12)
        mixed = NTXentLoss(0.1)(z[index], p[index], weight[index])
        assert torch.allclose(mixed, NTXentLoss(0.1)(z, p, weight), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_full(dtype, autocast):
    z, p, weight, labels = case(64)
    z, p, weight = z.to(dtype), p.to(dtype).requires_grad_(), weight.float()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for loss in (NTXentLoss(0.05)(z, p, weight), SupConLoss(0.05)(z, labels, p, weight)):
            assert loss.dtype == torch.float32
            assert torch.isfinite(torch.autograd.grad(loss, p)[0]).all()
        half = NTXentLoss(0.05)(z.requires_grad_())
    assert half.item() == pytest.approx(NTXentLoss(0.05)(z.float()).item(), rel=1e-6)
    # Equal rows: similarities of 20, where exp() in fp16 would be infinite.
    assert torch.isfinite(NTXentLoss(0.05)(torch.ones(8, 1, dtype=dtype)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: NTXentLoss(0.1)(z[:3]), "z: expected two views per image, got 3 rows"),
        (lambda z: NTXentLoss(0.1)(z[0]), r"z: expected \[N, D\] with at least 2 rows, got \(16,\)"),
        (lambda z: NTXentLoss(0.1)(z, z[:2]), r"positives: expected the shape of z, \(4, 16\), got \(2, 16\)"),
        (lambda z: NTXentLoss(0.1)(z, weight=z[:, 0]), "weight: belongs to positives"),
        (lambda z: NTXentLoss(0.1)(z, z, z), r"weight: expected one per row, \[4\], got \(4, 16\)"),
        (lambda z: SupConLoss(0.1)(z, torch.rand(4)), "labels: expected integers, got torch.float32"),
        (lambda z: SupConLoss(0.1)(z, torch.arange(3)), r"labels: expected one per row of z, \[4\], got \(3,\)"),
        (lambda z: NTXentLoss(0.0), "temperature: expected a number above 0, got 0.0"),
        (lambda z: SupConLoss(-1), "temperature: expected a number above 0, got -1"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows(4))


LOSSES = {
    "ntxent": lambda z, p, weight, labels: NTXentLoss(0.05)(z),
    "ntxent_mixed": lambda z, p, weight, labels: NTXentLoss(0.05)(z, p, weight),
    "supcon": lambda z, p, weight, labels: SupConLoss(0.05)(z, labels),
    "supcon_mixed": lambda z, p, weight, labels: SupConLoss(0.05)(z, labels, p, weight),
    # Labels by which 4 rows of the first process have a positive, and 2 of the second.
    "supcon_lonely": lambda z, p, weight, labels: SupConLoss(0.05)(z, (12 * weight).long()),
}


def one_process(rank: int, folder: Path) -> None:
    """Half of the images of ``case(6)`` and, as DistributedDataParallel does, the mean of loss and gradients."""
    own = own_rows(rank)
    found = {}
    for (name, loss_of), block in itertools.product(LOSSES.items(), BLOCKS):
        gradmix.ssl.losses.BLOCK = block
        z, p, weight, labels = (tensor[own] for tensor in case(6, seed=11))
        z, p = z.requires_grad_(), p.requires_grad_()
        loss = loss_of(z, p, weight, labels)
        loss.backward()
        p_grad = torch.zeros_like(z) if p.grad is None else p.grad
        found[name, block] = [loss.detach() / 2, z.grad / 2, p_grad / 2]
    torch.save(found, folder / f"{rank}.pt")


BLOCKS = (2048, 4)  # a process's six rows at once, and in two blocks


def own_rows(rank: int) -> torch.Tensor:
    """Rows of both views of images 3 * rank .. 3 * rank + 2, of 6."""
    images = torch.arange(3) + 3 * rank
    return torch.cat([images, images + 6])


def test_two_processes_are_one_on_the_concatenated_batch(in_processes, tmp_path):
    in_processes(one_process, 2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, loss_of in LOSSES.items():
        z, p, weight, labels = case(6, seed=11)
        z, p = z.requires_grad_(), p.requires_grad_()
        loss = loss_of(z, p, weight, labels)
        loss.backward()
        p_grad = torch.zeros_like(z) if p.grad is None else p.grad
        for block in BLOCKS:
            both = found[0][name, block][0] + found[1][name, block][0]
            assert both.item() == pytest.approx(loss.item(), abs=1e-10), name
        for rank, block in itertools.product(range(2), BLOCKS):
            own, (_, z_grad, theirs) = own_rows(rank), found[rank][name, block]
            assert torch.allclose(z_grad, z.grad[own], rtol=1e-10, atol=1e-10), name
            assert torch.allclose(theirs, p_grad[own], rtol=1e-10, atol=1e-10), name
