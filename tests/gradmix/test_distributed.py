"""DistributedDataParallel over two processes is the same step as one process on the concatenated batch."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradmix import GradMix
from gradmix.ssl.losses import NTXentLoss

IMAGES = 4  # per process


def build(norm: bool) -> nn.Module:
    """Without BatchNorm, whose statistics are each process's own, the step can be compared exactly."""
    torch.manual_seed(0)
    stage = lambda a, b: nn.Sequential(  # noqa: E731
        nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b) if norm else nn.Identity(), nn.Tanh()
    )
    stages = nn.Sequential(stage(3, 8), stage(8, 12), stage(12, 16))
    return nn.Sequential(stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)).double()


def all_views() -> torch.Tensor:
    return torch.rand(4 * IMAGES, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rows_of(rank: int) -> torch.Tensor:
    images = torch.arange(IMAGES) + rank * IMAGES
    return torch.cat([images, images + 2 * IMAGES])


def step(model: nn.Module, mixer: GradMix, views: torch.Tensor, seed: int):
    ntxent = NTXentLoss(0.1)
    with mixer.watch(model):
        z = F.normalize(model(views), dim=1)
    loss = ntxent(z)
    mixed = mixer(views, loss, torch.Generator().manual_seed(seed))
    p = F.normalize(model(mixed.images), dim=1)
    (loss + ntxent(z, p, mixed.kept)).backward()
    return mixed


def one_process(rank: int, folder: Path) -> None:
    found = {}
    for norm in (False, True):
        # as the README says; torch 2.6 and 2.11 need it, 2.15 does not
        model = DistributedDataParallel(build(norm), broadcast_buffers=False)
        mixer = GradMix(["0.1", "0.2"])
        for i in range(2):  # the second step shows that the reducer was left in order
            model.zero_grad()
            mixed = step(model, mixer, all_views()[rows_of(rank)], seed=10 * i + rank)
        gradients = [p.grad for p in model.parameters()]
        found[norm] = mixed.images, mixed.kept, mixed.attribution, gradients
    torch.save(found, folder / f"{rank}.pt")


def test_two_processes_are_one_on_the_concatenated_batch(in_processes, tmp_path):
    in_processes(one_process, 2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    model, mixer, ntxent, views = build(norm=False), GradMix(["0.1", "0.2"]), NTXentLoss(0.1), all_views()
    with mixer.watch(model):
        z = F.normalize(model(views), dim=1)
    loss = ntxent(z)
    attribution = mixer(views, loss).attribution
    mixed_images, kept = torch.empty_like(views), torch.empty(len(views))
    for rank in range(2):
        mixed_images[rows_of(rank)], kept[rows_of(rank)] = found[rank][False][:2]
    p = F.normalize(model(mixed_images), dim=1)
    (loss + ntxent(z, p, kept)).backward()

    for rank in range(2):
        torch.testing.assert_close(found[rank][False][2], attribution[rows_of(rank)])
        for theirs, parameter in zip(found[rank][False][3], model.parameters(), strict=True):
            torch.testing.assert_close(theirs, parameter.grad, rtol=1e-10, atol=1e-12)
    # With BatchNorm: it runs, and both processes take the same step.
    for one, other in zip(found[0][True][3], found[1][True][3], strict=True):
        assert torch.equal(one, other) and torch.isfinite(one).all()
