"""Prototypes against slow loops, closed forms, finite differences, and one process for two."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from gradmix.ssl.config import MethodConfig, PrototypeConfig
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.prototypes import PrototypeLoss

CLASSES, EACH, DIM = 3, 4, 6


def rows(count=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(count, DIM, dtype=torch.float64, generator=generator), dim=1)
    labels, other = torch.randint(0, CLASSES, (2, count), generator=generator)
    return z, labels, other, torch.rand(count, dtype=torch.float64, generator=generator)


def loss_of(**changes):
    settings = {"per_class": EACH, "neighbours": 2, "momentum": 0.8, "sharpness": 0.3} | changes
    return PrototypeLoss(CLASSES, DIM, **settings).double()


def slow_assignment(z, prototypes, sharpness):
    """Sinkhorn by hand: columns to the same sum, rows to 1, three times."""
    q = np.exp(z @ prototypes.T / sharpness)
    for _ in range(3):
        for j in range(q.shape[1]):
            q[:, j] /= sum(q[:, j])
        for i in range(q.shape[0]):
            q[i] /= sum(q[i])
    return q


def slow_chosen(q, labels, loss):
    """For each row, the nearest prototypes of its class."""
    chosen = []
    for weights, label in zip(q, labels, strict=True):
        own = [label * loss.per_class + m for m in range(loss.per_class)]
        chosen.append(sorted(own, key=lambda j: -weights[j])[: loss.neighbours])
    return chosen


def slow_likelihood(z, prototypes, q, chosen, temperature):
    losses = []
    for row, weights, own in zip(z, q, chosen, strict=True):
        logits = [float(row @ p) / temperature for p in prototypes]
        log_sum = math.log(sum(math.exp(logit) for logit in logits))
        total = sum(weights[j] for j in own)
        losses.append(log_sum - sum(weights[j] / total * logits[j] for j in own))
    return losses


def slow_step(loss, z, labels, temperature=0.1):
    """The loss of raw views, and the prototypes behind it."""
    z, labels, prototypes = z.numpy(), labels.tolist(), loss.prototypes.numpy().copy()
    q = slow_assignment(z, prototypes, loss.sharpness)
    chosen = slow_chosen(q, labels, loss)
    moved = prototypes.copy()
    for j in range(len(prototypes)):
        given = {i: q[i, j] / sum(q[i, k] for k in chosen[i]) for i in range(len(z)) if j in chosen[i]}
        average = sum(weight * z[i] for i, weight in given.items()) / sum(given.values()) if given else 0
        moved[j] = loss.momentum * prototypes[j] + (1 - loss.momentum) * average
        moved[j] /= np.linalg.norm(moved[j])
    q = slow_assignment(z, moved, loss.sharpness)
    likelihood = np.mean(slow_likelihood(z, moved, q, chosen, temperature))
    contrasts = []
    for i in range(len(moved)):
        others = [j for j in range(len(moved)) if j != i]
        log_sum = math.log(sum(math.exp(moved[i] @ moved[j] / loss.contrast_temperature) for j in others))
        same = [moved[i] @ moved[j] / loss.contrast_temperature for j in others if j // EACH == i // EACH]
        contrasts.append(log_sum - np.mean(same))
    return likelihood + loss.contrast * np.mean(contrasts), moved


@pytest.mark.parametrize("neighbours", [1, 2, None])
@pytest.mark.parametrize("contrast", [0.0, 0.7])
def test_it_is_the_slow_loops(neighbours, contrast):
    loss = loss_of(neighbours=neighbours, contrast=contrast)
    for seed in range(3):  # from where the prototypes have gone
        z, labels, other, kept = rows(seed=seed)
        expected, moved = slow_step(loss, z, labels)
        assert loss(z, labels).item() == pytest.approx(expected, rel=1e-10)
        np.testing.assert_allclose(loss.prototypes.numpy(), moved, rtol=1e-10, atol=1e-12)
        q = slow_assignment(z.numpy(), moved, loss.sharpness)
        own, theirs = (
            slow_likelihood(z.numpy(), moved, q, slow_chosen(q, of.tolist(), loss), 0.1) for of in (labels, other)
        )
        mixed = np.mean([k * a + (1 - k) * b for k, a, b in zip(kept.tolist(), own, theirs, strict=True)])
        assert loss(z, labels, other, kept).item() == pytest.approx(mixed, rel=1e-10)
        np.testing.assert_allclose(loss.prototypes.numpy(), moved, rtol=1e-10, atol=1e-12)  # as they were


def test_one_prototype_per_class_is_ciders():
    """Compactness: cross-entropy to the prototypes; dispersion: log of the mean exp(similarity) of different ones."""
    loss = loss_of(per_class=1, neighbours=5, contrast=0.5, contrast_temperature=0.1)
    z, labels, other, kept = rows()
    before = loss.prototypes.clone()
    found = loss(z, labels).item()
    p = loss.prototypes
    for k in range(CLASSES):  # the move, of the class's mean
        mean = z[labels == k].mean(0) if (labels == k).any() else 0
        torch.testing.assert_close(p[k], F.normalize(0.8 * before[k] + 0.2 * mean, dim=0))
    compact = F.cross_entropy(z @ p.T / 0.1, labels).item()
    disperse = np.mean(
        [math.log(np.mean([math.exp(p[i] @ p[j] / 0.1) for j in range(CLASSES) if j != i])) for i in range(CLASSES)]
    )
    assert found == pytest.approx(compact + 0.5 * (disperse + math.log(CLASSES - 1)), rel=1e-10)
    mixed = (kept * F.cross_entropy(z @ p.T / 0.1, labels, reduction="none")).mean()
    mixed = mixed + ((1 - kept) * F.cross_entropy(z @ p.T / 0.1, other, reduction="none")).mean()
    torch.testing.assert_close(loss(z, labels, other, kept), mixed)


def test_prototypes_begin_on_the_sphere_and_always_the_same():
    torch.manual_seed(1)
    first = PrototypeLoss(5, 16).prototypes
    torch.manual_seed(2)
    assert torch.equal(first, PrototypeLoss(5, 16).prototypes) and first.shape == (30, 16)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(30))


def test_gradients_are_those_of_finite_differences_with_the_assignment_held():
    """With one prototype per class nothing is assigned. To the likelihood the prototypes' move has no gradient: at
    momentum 1 there is no move, and at another one autograd of a plain form says what is left."""
    z, labels, other, kept = rows(8)

    def anew(momentum, mixed=False):
        def value(z):
            loss = loss_of(per_class=1, neighbours=1, contrast=0.7, momentum=momentum)
            return loss(z, labels, other, kept) if mixed else loss(z, labels)

        return value

    assert gradcheck(anew(1.0), z.clone().requires_grad_())
    assert gradcheck(anew(1.0, mixed=True), z.clone().requires_grad_())

    def contrast(z):
        loss = loss_of(per_class=1, neighbours=1, contrast=1.0)
        old = loss.prototypes.clone()
        moved = torch.stack([0.8 * old[k] + 0.2 * z[labels == k].mean(0) for k in range(CLASSES)])
        moved = F.normalize(moved, dim=1)
        likelihood = F.cross_entropy(z @ moved.detach().T / 0.1, labels)
        similarity = (moved @ moved.T / 0.5).masked_fill(torch.eye(CLASSES, dtype=torch.bool), -torch.inf)
        return likelihood + similarity.logsumexp(1).mean()

    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss_of(per_class=1, neighbours=1, contrast=1.0)(ours, labels).backward()
    contrast(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_class_far_from_all_its_prototypes_has_weights_and_no_nan():
    loss = PrototypeLoss(2, 4, per_class=2, sharpness=0.001)
    loss.prototypes.copy_(F.normalize(torch.tensor([[1.0, 0, 0, 0], [1, 0.1, 0, 0], [-1, 0, 0, 0], [-1, 0, 0.1, 0]])))
    z = F.normalize(torch.tensor([[-1.0, 0.05, 0, 0], [-1, 0, 0, 0.1]])).requires_grad_()
    value = loss(z, torch.tensor([0, 0]))
    value.backward()
    assert value.item() > 15 and z.grad.isfinite().all() and loss.prototypes.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_of()(torch.ones(4, 5), torch.zeros(4)), r"z: expected \[N, 6\], got \(4, 5\)"),
        (lambda: loss_of()(*rows()[:3]), "other and kept: give both or neither"),
        (lambda: loss_of()(rows()[0], torch.zeros(3)), r"labels: expected one per row of z, \[10\], got \(3,\)"),
        (lambda: loss_of(sharpness=0.0), "temperature: expected a number above 0"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def step(part):
    loss = loss_of(contrast=0.7)
    inputs, labels, other, kept = rows(12, seed=4)
    matrix = torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    z = F.normalize(inputs[part] @ matrix, dim=1)
    value = loss(z, labels[part]) + loss(z, labels[part], other[part], kept[part])
    value.backward()
    return matrix.grad, value.detach(), loss.prototypes


def one_process(rank, folder):
    gradient, value, moved = step(torch.arange(6) + 6 * rank)
    for number in (gradient, value):
        torch.distributed.all_reduce(number)
        number /= 2
    torch.save((gradient, value, moved), folder / f"{rank}.pt")


def test_two_processes_are_one_on_the_concatenated_batch(in_processes, tmp_path):
    in_processes(one_process, 2)
    expected = step(torch.arange(12))
    for rank in range(2):
        for found, value in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mix", ["none", "gradmix", "mixup"])
def test_the_training_step_has_prototypes(mix, config, data):
    settings = config("unused", "sphor", mix, mixing={"weight": 0.5})
    settings.method = MethodConfig(
        "palm",
        prototypes=1.5,
        temperature=0.2,
        mixed_loss="prototypes",
        attribution="prototypes",
        prototype=PrototypeConfig(per_class=3, neighbours=2),
    )
    module = Pretraining(settings, data.train)
    module.loader = TrainLoader(data.train, settings.batch_size, seed=0, epochs=1)
    batch = next(iter(module.loader))
    twin = PrototypeLoss(6, 128, 3, 0.2, 2)
    loss = module.training_step(batch, 0)
    loss.backward()
    if mix == "none":
        return
    views, mixed = module.pictures
    labels = batch.labels.repeat(2)
    with torch.no_grad():
        z, p = module.embed(views)[1], module.embed(mixed.images)[1]
        expected = 1.5 * (twin(z, labels) + 0.5 * twin(p, labels, labels[mixed.partner], mixed.kept))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(module.prototype_loss.prototypes, twin.prototypes, rtol=1e-4, atol=1e-5)
    assert "prototype_loss.prototypes" in module.state_dict()
