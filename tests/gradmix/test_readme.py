"""The README's "Use it in your own loop", run exactly as printed, on a few random images instead of CIFAR-10."""

import re
from pathlib import Path

import lightly.models.modules  # noqa: F401  before DataLoader is replaced, of which timm makes subclasses
import pytest
import torch
import torchvision

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"


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


def test_lightlys_example(tiny, capsys):
    original = (HERE / "lightly_simclr.txt").read_text()
    exec(compile(changed(original, block("diff")), "simclr.py", "exec"), tiny)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Starting Training" and lines[1].startswith("epoch: 00, loss: ") and len(lines) == 4
    assert all(torch.isfinite(p).all() for p in tiny["model"].parameters())
    assert (tiny["mixed"].attribution.amax((1, 2)) > 0).all()
