"""The README's "Use it in your own loop", run exactly as printed, on a few random images instead of CIFAR-10."""

import re
from pathlib import Path

import lightly.models.modules  # noqa: F401  before DataLoader is replaced, of which timm makes subclasses
import pytest
import torch
import torchvision

README = Path(__file__).parents[2] / "README.md"


def block(language: str) -> str:
    """The one code block of that language in the section."""
    section = re.search(r"^## Use it in your own loop\n(.*?)(?=^## |\Z)", README.read_text(), re.M | re.S)
    assert section, "README.md has no section 'Use it in your own loop'"
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", section[1], re.M | re.S)
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
        yield {"range": lambda _epochs: range(3), "__name__": "readme"}


def test_plain_pytorch(tiny, capsys):
    exec(compile(block("python"), "README.md", "exec"), tiny)
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


# SimCLR on lightly's parts, as its documentation puts them together; the lines that the README changes are its own.
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
    exec(compile(changed(LIGHTLY, block("diff")), "simclr.py", "exec"), tiny)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1", "epoch 2"]
    assert all(torch.isfinite(p).all() for p in tiny["model"].parameters())
    assert (tiny["mixed"].attribution.amax((1, 2)) > 0).all()
    assert (tiny["mixed"].kept < 1).all()
