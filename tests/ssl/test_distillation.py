"""Distillation's losses against slow loops, finite differences, and one process for two."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from gradmix.ssl.distillation import correlation_loss, relation_loss, two_hot_loss


def slow_softmax(row):
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def slow_pearson(a, b, weights):
    total = sum(weights)
    mean_a, mean_b = (sum(w * x for w, x in zip(weights, xs, strict=True)) / total for xs in (a, b))
    terms = list(zip(weights, a, b, strict=True))
    covariance = sum(w * (x - mean_a) * (y - mean_b) for w, x, y in terms)
    spreads = [sum(w * (x - mean_a) ** 2 for w, x, _ in terms), sum(w * (y - mean_b) ** 2 for w, _, y in terms)]
    return covariance / math.sqrt(spreads[0] * spreads[1])


def slow_correlation_loss(student, teacher, weights):
    s, t = ([slow_softmax(row) for row in logits.tolist()] for logits in (student, teacher))
    rows = [1 - slow_pearson(a, b, [1.0] * len(a)) for a, b in zip(s, t, strict=True)]
    loss = sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)
    columns = range(len(s[0]))
    return loss + 1 - sum(slow_pearson([r[c] for r in s], [r[c] for r in t], weights) for c in columns) / len(columns)


def slow_relation_loss(queries, keys, taught, taught_keys, own, temperature, weights):
    total = 0.0
    for r, (query, told) in enumerate(zip(queries, taught, strict=True)):
        others = [j for j in range(len(keys)) if j != own[r]]
        q = slow_softmax([float(query @ keys[j]) / temperature for j in others])
        p = slow_softmax([float(told @ taught_keys[j]) / temperature for j in others])
        total += weights[r] * sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True))
    return total / len(queries)


def logits(rows=10, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, classes, dtype=torch.float64, generator=generator) * 2 for _ in range(2)]


def points(rows=10, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator), dim=1)


@pytest.mark.parametrize("weighted", [False, True])
def test_correlation_is_the_slow_loops(weighted):
    student, teacher = logits()
    weight = torch.linspace(0, 1, 10, dtype=torch.float64) if weighted else None
    expected = slow_correlation_loss(student, teacher, weight.tolist() if weighted else [1.0] * 10)
    assert correlation_loss(student, teacher, weight).item() == pytest.approx(expected, rel=1e-12)
    if weighted:  # rows that weigh nothing are not there
        chosen = (weight > 0.5).double()
        some = slow_correlation_loss(student[5:], teacher[5:], [1.0] * 5)
        assert correlation_loss(student, teacher, chosen).item() == pytest.approx(some, rel=1e-12)
    else:
        s, t = (x.softmax(1).numpy() for x in (student, teacher))
        rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
        columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
        assert correlation_loss(student, teacher).item() == pytest.approx(2 - rows - columns, rel=1e-12)


def test_a_teacher_who_is_the_student_is_followed_already():
    student, _ = logits()
    assert correlation_loss(student, student.clone()).item() == pytest.approx(0, abs=1e-12)
    assert correlation_loss(student, student.clone(), torch.zeros(10)).item() == 0
    z = points()
    assert relation_loss(z, z, z, z, torch.arange(10), 0.1).item() == pytest.approx(0, abs=1e-12)


def test_two_hot_is_the_cross_entropy_of_the_rows_that_count():
    student, _ = logits()
    labels, other = torch.randint(0, 4, (2, 10), generator=torch.Generator().manual_seed(1))
    kept, rows = torch.linspace(0.5, 1, 10), (torch.arange(10) % 3 == 0).double()
    total = 0.0
    for r in range(0, 10, 3):
        probabilities = slow_softmax(student[r].tolist())
        for k in range(4):
            own, theirs = (k == int(label[r]) for label in (labels, other))
            share = 0.75 / 4 + 0.25 * (float(kept[r]) * own + (1 - float(kept[r])) * theirs)
            total -= share * math.log(probabilities[k])
    assert two_hot_loss(student, labels, other, kept, 0.75, rows).item() == pytest.approx(total / 4, rel=1e-6)
    assert two_hot_loss(student, labels, other, kept, 0.75, torch.zeros(10)).item() == 0


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_relations_are_the_slow_loops(temperature):
    student, keys, teacher = points(width=5), points(width=5, seed=1), points(width=7, seed=2)
    own, weight = torch.arange(10).roll(3), torch.linspace(0, 1, 10, dtype=torch.float64)
    arguments = student, keys, teacher[own], teacher, own, temperature
    expected = slow_relation_loss(*arguments, weight.tolist())
    assert relation_loss(*arguments, weight).item() == pytest.approx(expected, rel=1e-10)
    assert relation_loss(*arguments).item() == pytest.approx(slow_relation_loss(*arguments, [1.0] * 10), rel=1e-10)


def test_relations_in_blocks_are_the_same(monkeypatch):
    student, keys, teacher = points(), points(seed=1), points(width=7, seed=2)
    whole = relation_loss(student, keys, teacher, teacher, torch.arange(10), 0.1)
    monkeypatch.setattr("gradmix.ssl.losses.BLOCK", 3)
    torch.testing.assert_close(relation_loss(student, keys, teacher, teacher, torch.arange(10), 0.1), whole)


def test_gradients_are_those_of_finite_differences():
    student, teacher = logits(6, 3)
    weight = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    assert gradcheck(lambda s: correlation_loss(s, teacher, weight), student.requires_grad_())
    assert gradcheck(lambda s: two_hot_loss(s, weight.long(), weight.long() + 1, weight, 0.75, weight.round()), student)
    queries, keys = (points(6, seed=s).requires_grad_() for s in (3, 4))
    taught = points(6, 7)
    relation = lambda q, k: relation_loss(q, k, taught, taught, torch.arange(6), 0.3, weight)  # noqa: E731
    assert gradcheck(relation, (queries, keys))


def test_half_precision_is_computed_in_full():
    student, teacher = (x.to(torch.bfloat16) for x in logits())
    z = points().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = correlation_loss(student, teacher), relation_loss(z, z.roll(1, 0), z, z, torch.arange(10), 0.05)
    full = (
        correlation_loss(student.float(), teacher.float()),
        relation_loss(z.float(), z.roll(1, 0).float(), z.float(), z.float(), torch.arange(10), 0.05),
    )
    for ours, exact in zip(found, full, strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_class_that_nobody_has_makes_no_nan():
    student = torch.tensor([[0.0, 400.0, -400.0]] * 4 + [[400.0, 0.0, -400.0]] * 4).requires_grad_()
    teacher = student.detach().roll(2, 0)
    loss = correlation_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: correlation_loss(logits()[0], logits(9)[0]), r"twice \[N, K\], got \[10, 4\] and \[9, 4\]"),
        (lambda: correlation_loss(*logits(), torch.ones(3)), r"weight: expected one per row, \[10\], got \(3,\)"),
        (lambda: relation_loss(*[points()] * 4, torch.arange(10), 0.0), "temperature: expected a number above 0"),
        (
            lambda: relation_loss(points(), points(9), points(), points(), torch.arange(10), 0.1),
            r"keys: expected the shape of the queries, \(10, 5\), got \[9, 5\]",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def all_rows():
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    weight = torch.rand(12, dtype=torch.float64, generator=generator)
    sure = (weight > 0.4).double()  # not as many on both
    labels, other = torch.randint(0, 4, (2, 12), generator=generator)
    return draw(12, 6), draw(6, 4), draw(12, 4), F.normalize(draw(12, 7), dim=1), weight, sure, labels, other


def step(rows, own):
    """Gradients at a weight of the sum of all losses; ``rows`` of those of :func:`all_rows`."""
    inputs, matrix, teacher, taught, weight, sure, labels, other = all_rows()
    matrix.requires_grad_()
    s = inputs[rows] @ matrix
    z = F.normalize(s, dim=1)
    loss = correlation_loss(s, teacher[rows]) + correlation_loss(s, teacher[rows], sure[rows])
    loss = loss + two_hot_loss(s, labels[rows], other[rows], weight[rows], 0.75, 1 - sure[rows])
    loss = loss + relation_loss(z, z, taught[rows], taught[rows], own, 0.2, weight[rows])
    loss.backward()
    return matrix.grad, loss.detach()


def one_process(rank, folder):
    gradient, loss = step(torch.arange(6) + 6 * rank, torch.arange(6))
    for value in (gradient, loss):
        torch.distributed.all_reduce(value)  # as DistributedDataParallel: the mean
        value /= 2
    torch.save((gradient, loss), folder / f"{rank}.pt")


def test_two_processes_are_one_on_the_concatenated_batch(in_processes, tmp_path):
    in_processes(one_process, 2)
    expected = step(torch.arange(12), torch.arange(12))
    for rank in range(2):
        for found, value in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)
