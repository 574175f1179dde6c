"""Every command of "Any backbone" in docs/recipes/evaluate.md, run as printed, with small settings added."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from gradmix.ssl.networks.backbones import ResNet

PAGE = Path(__file__).parents[2] / "docs/recipes/evaluate.md"
SMALL = {
    "eval": ("probe.epochs=1",),
    "pretrain": ("epochs=1", "batch_size=32", "encoder.width=8", "data.image_size=16", "trainer.accelerator=cpu"),
}
LEFT_BEHIND = {
    "checkpoint=": "runs/theirs/metrics.json",
    "transfer": "runs/mine/transfer-imagefolder/metrics.json",
    "knn_k=": "knn/k=200,t=0.2/top1",
    "protocols=": ("linear_augmented/top1", "finetune/top1", "few_labels/1%/top1", "few_labels/4/top1_std"),
    "export=": "runs/mine/export/backbone.onnx",
    "encoder.init=": "runs/started/metrics.json",
}


def commands():
    section = re.search(r"^## Any backbone\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert section, f"{PAGE} has no section 'Any backbone'"
    return re.search(r"^```\n(.*?)^```", section[1], re.M | re.S)[1].splitlines()


@pytest.fixture
def folder(tmp_path, digits_run):
    """PATH and OTHER with real digits of two classes, theirs.pth, runs/mine."""
    digits = load_digits()
    for name, classes in (("PATH", (1, 4)), ("OTHER", (0, 7))):
        for digit in classes:
            for i, image in enumerate(digits.images[digits.target == digit][:130]):
                path = tmp_path / name / ("train" if i < 110 else "test") / str(digit) / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image * (255 / 16)).astype(np.uint8)).save(path)
    torch.save({"state_dict": ResNet("resnet18", 8).state_dict()}, tmp_path / "theirs.pth")
    shutil.copytree(digits_run, tmp_path / "runs/mine", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path


@pytest.mark.parametrize("line", commands(), ids=lambda line: shlex.split(line)[2 if "run=" in line else 1])
def test_commands_of_the_page(line, folder, command):
    name, *arguments = shlex.split(line, comments=True)
    name = name.removeprefix("gradmix-")
    result = command(name, *arguments, *SMALL[name])
    if "onnx" in line and torch.__version__ < "2.11":
        assert result.code == 2 and "onnx needs torch 2.11" in result.err
        return
    assert result.code == 0, result.err
    (expected,) = (value for key, value in LEFT_BEHIND.items() if key in line)
    numbers = json.loads((folder / "runs/mine/metrics.json").read_text())
    for entry in [expected] if isinstance(expected, str) else expected:
        assert (folder / entry).is_file() or 0 <= numbers[entry] <= 1, entry
    if "protocols=" in line:
        for protocol in ("cached: lr", "augmented: sgd, 1 epoch", "finetune: sgd, 1 epoch"):
            assert protocol in result.out
    if "transfer" in line:
        assert numbers["quality/effective_rank"] > 1 and numbers["quality/uniformity"] < 0
