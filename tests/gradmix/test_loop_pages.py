"""The loops of README.md and docs/recipes/own-loop.md, as printed, on a few random images instead of CIFAR-10."""

import re
from pathlib import Path

import lightly.models.modules  # noqa: F401  before DataLoader is replaced, of which timm makes subclasses
import pytest
import torch
import torchvision

ROOT = Path(__file__).parents[2]


def block(language: str, page: str, section: str = "") -> str:
    """The one code block of that language on the page, or in a section of it."""
    text = (ROOT / page).read_text()
    if section:
        text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return code


@pytest.fixture
def tiny(monkeypatch):
    """Eight images, batches of four, three epochs."""

    def cifar10(root, train=True, transform=None, download=False):
        return torchvision.datasets.FakeData(8, (3, 32, 32), transform=transform)

    loader = torch.utils.data.DataLoader

    def small_loader(dataset, batch_size, num_workers=0, **options):
        return loader(dataset, batch_size=4, **options)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", cifar10)
    monkeypatch.setattr(torch.utils.data, "DataLoader", small_loader)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield {"range": lambda _epochs: range(3), "__name__": "page"}


PAGE = "docs/recipes/own-loop.md"


def test_the_three_lines_of_the_readme():
    """The loss is NT-Xent of the views and, weighted by what they kept, of the mixed ones: by a slow loop."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.resnet18(num_classes=16)
        views = torch.rand(8, 3, 32, 32)
    before = network.conv1.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    names = {"network": network, "optimizer": optimizer, "batches": [views], "__name__": "page"}
    exec(compile(block("python", "README.md", "Three lines in your own loop"), "README.md", "exec"), names)

    z, p, kept = names["z"].detach().double(), names["p"].detach().double(), names["mixed"].kept.double()
    rows, expected = len(views), 0.0
    for i in range(rows):
        other = (i + rows // 2) % rows
        everyone = sum(torch.exp(z[i] @ z[j] / 0.1) for j in range(rows) if j != i)
        expected -= torch.log(torch.exp(z[i] @ z[other] / 0.1) / everyone).item() / rows
        expected -= kept[other] * torch.log(torch.exp(z[i] @ p[other] / 0.1) / everyone).item() / rows
    assert names["loss"].item() == pytest.approx(float(expected), rel=1e-4)
    assert (kept < 1).all() and (names["mixed"].attribution.amax((1, 2)) > 0).all()
    assert not torch.equal(network.conv1.weight, before) and network.conv1.weight.isfinite().all()


def test_plain_pytorch(tiny, capsys):
    exec(compile(block("python", PAGE), PAGE, "exec"), tiny)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1", "epoch 2"]
    assert all(torch.isfinite(p).all() for p in tiny["model"].parameters())
    assert (tiny["mixed"].attribution.amax((1, 2)) > 0).all()
    assert (tiny["mixed"].kept < 1).all()


def changed(source: str, diff: str) -> str:
    """``source`` with a unified diff made; a hunk is found by its text."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(before) == 1, f"lightly's example has not exactly one:\n{before}"
        source = source.replace(before, after)
    return source


# SimCLR on lightly's parts, as its documentation puts them together; the lines that the page changes are its own.
LIGHTLY = """
import torch
import torchvision
from torch import nn
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
        self.head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x):
        return self.head(self.backbone(x).flatten(1))


model = Model()
data = torchvision.datasets.CIFAR10("data", transform=SimCLRTransform(input_size=32, gaussian_blur=0.0))
criterion = NTXentLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
for epoch in range(10):
    total_loss = 0
    for (x0, x1), _ in torch.utils.data.DataLoader(data, batch_size=256, drop_last=True):
        z0 = model(x0)
        z1 = model(x1)
        loss = criterion(z0, z1)
        total_loss += loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: {total_loss.item():.3f}")
"""


def test_the_change_to_lightlys_loop(tiny, capsys):
    exec(compile(changed(LIGHTLY, block("diff", PAGE)), "simclr.py", "exec"), tiny)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1", "epoch 2"]
    assert all(torch.isfinite(p).all() for p in tiny["model"].parameters())
    assert (tiny["mixed"].attribution.amax((1, 2)) > 0).all()
    assert (tiny["mixed"].kept < 1).all()
