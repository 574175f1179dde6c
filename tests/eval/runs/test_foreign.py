"""gradmix-eval checkpoint=FILE, and run=A data=B."""

import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from gradmix.ssl.data.images import decode
from gradmix.ssl.networks.backbones import ResNet, read_backbone


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def digit_folders(tmp_path_factory):
    """root/train/<class>/ and root/test/<class>/: 40 and 20 real digits of three classes."""
    root, data = tmp_path_factory.mktemp("folders"), load_digits()
    for digit in (1, 4, 7):
        images = data.images[data.target == digit]
        for i in range(60):
            path = root / ("train" if i < 40 else "test") / f"digit {digit}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((images[i] * (255 / 16)).astype(np.uint8)).save(path)
    return root


FOLDER = ("data=imagefolder", "data.image_size=16", "detectors=[deep_knn]")


def test_a_checkpoint_from_elsewhere_on_a_folder(command, tmp_path, digit_folders):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = ResNet("resnet18", width=8).state_dict() | {"fc.weight": torch.ones(5, 64)}
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "a.pth")
    arguments = ("checkpoint=a.pth", "encoder=resnet18", *FOLDER, f"data.root={digit_folders}", "out=out")
    result = command("eval", *arguments)
    assert result.code == 0, result.err
    assert "120 tensors matched under 'state_dict.module.'; missing: none; unused: state_dict.module.fc" in result.out
    numbers = read(tmp_path / "out")
    assert numbers["knn/top1"] > 0.6 and numbers["linear/top1"] > 0.6  # three digits, random weights
    assert numbers["checkpoint"] == "a.pth"
    train = load_file(tmp_path / "out/features/train.safetensors")
    assert train["features"].shape == (120, 64)  # nothing was held out
    page = (tmp_path / "out/report.html").read_text()
    assert "gradmix-eval checkpoint=a.pth encoder=resnet18 data=imagefolder" in page

    # The folder is a run's: evaluated again, scored with, and open-set when classes are chosen
    (tmp_path / "a.pth").unlink()
    again = "run=out", "detectors=[deep_knn]"
    assert command("eval", *again).code == 0 and read(tmp_path / "out") == numbers | {
        "evaluation": numbers["evaluation"] | {"command": "gradmix-eval run=out 'detectors=[deep_knn]'"}
    }
    known = ("data.known=[digit 1,digit 7]", "data.holdout=0.1")
    result = command("eval", "run=out", *FOLDER, f"data.root={digit_folders}", *known, "out=open")
    assert result.code == 0, result.err
    assert 0 < read(tmp_path / "open")["osr/deep_knn/auroc"] < 1
    photos = digit_folders / "test" / "digit 4"
    result = command("score", "detector=open/detector", f"images={photos}")
    assert result.code == 0 and "20 images" in result.out


def test_a_checkpoint_of_timms(command, tmp_path, digit_folders):
    """Into a run's folder that scores, exports and starts a training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    torch.save({"state_dict": {f"module.{k}": value for k, value in theirs.state_dict().items()}}, tmp_path / "a.pth")
    images = (*FOLDER, "data.image_size=32", f"data.root={digit_folders}")
    result = command("eval", "checkpoint=a.pth", "encoder=timm/test_vit", *images, "out=out")
    assert result.code == 0, result.err
    assert "missing: none; unused: state_dict.module.head.weight, state_dict.module.head.bias; images" in result.out
    assert "mean (0.5, 0.5, 0.5) and deviation (0.5, 0.5, 0.5) removed" in result.out
    theirs.reset_classifier(0)
    files = sorted((digit_folders / "test").rglob("*.png"))
    pixels = torch.stack([decode(file, 32) for file in files]) / 255
    with torch.inference_mode():
        expected = theirs(pixels * 2 - 1)
    features = load_file(tmp_path / "out/features/test.safetensors")["features"]
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    page = (tmp_path / "out/report.html").read_text()
    assert "encoder=timm/test_vit" in page and "timm/test_vit, 32 x 32 pixels" in page
    assert command("score", "detector=out/detector", f"images={files[0]}").code == 0

    quick = ("epochs=1", "batch_size=32", "knn_every=0", "trainer.accelerator=cpu", "run_dir=run")
    start = ("encoder=timm/test_vit", "encoder.init=out/backbone.safetensors", *images, *quick)
    result = command("pretrain", *start)
    assert result.code == 0 and "78 tensors matched" in result.out, result.err
    assert "version/timm" in read(tmp_path / "run")
    assert "encoder.name=" not in (tmp_path / "run/report.html").read_text()  # the group says it all
    assert "finished already" in command("pretrain", *start).out


def test_transfer(command, tmp_path, digits_run, digit_folders):
    run = shutil.copytree(digits_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    before = read(run)
    moved = shutil.copytree(digit_folders, tmp_path / "other")
    result = command("eval", "run=run", *FOLDER, f"data.root={digit_folders}")
    assert result.code == 0, result.err
    there = read(run / "transfer-imagefolder")
    assert there["knn/top1"] > 0.5 and "run/transfer-imagefolder/metrics.json" in result.out
    assert there["data"] == {"name": "imagefolder", "root": str(digit_folders), "split": None, "known": None}
    assert there["evaluation"]["command"].startswith("gradmix-eval run=run data=imagefolder")
    result = command("eval", "run=run", *FOLDER, "data.root=other")
    other = f"holds results of other data (data.root is '{digit_folders}' there and '{moved}' here); give another out="
    assert result.code == 2 and other in result.err, result.err
    assert len(result.err.strip().splitlines()) == 1 and read(run / "transfer-imagefolder") == there
    for wrong, message in (
        ("data.image_size=99", "data.image_size: the run has 16, and other data gets the same; leave it out"),
        ("data.fit=pad", "data.fit: the run has crop, and other data gets the same; leave it out"),
    ):
        result = command("eval", "run=run", *FOLDER, f"data.root={digit_folders}", wrong)
        assert result.code == 2 and message in result.err, result.err
    assert read(run) == before
    backbone = read_backbone(run / "backbone.safetensors", "resnet18").eval()
    stored = load_file(run / "transfer-imagefolder/features/test.safetensors")
    assert stored["features"].shape == (60, backbone.num_features)


def test_a_class_that_only_the_test_set_has_is_unknown(command, tmp_path, digit_folders):
    torch.save(ResNet("resnet18", width=8).state_dict(), tmp_path / "a.pth")
    shutil.copytree(digit_folders, tmp_path / "other")
    shutil.rmtree(tmp_path / "other/train/digit 4")
    arguments = ("checkpoint=a.pth", "encoder=resnet18", *FOLDER, "data.root=other", "out=out")
    result = command("eval", *arguments)
    assert result.code == 0, result.err
    labels = load_file(tmp_path / "out/features/test.safetensors")["labels"]
    assert (labels == -1).sum() == 20 and 0 < read(tmp_path / "out")["osr/deep_knn/auroc"] < 1


def test_bad_input(command, tmp_path, digit_folders, digits_run):
    torch.save(ResNet("resnet18", width=8).state_dict(), tmp_path / "a.pth")
    shutil.copytree(digit_folders, tmp_path / "other")
    shutil.rmtree(tmp_path / "other/test/digit 4")
    (tmp_path / "other/test/digit 1").rename(tmp_path / "other/test/digit 9")
    root = f"data.root={digit_folders}"
    checkpoint = ("checkpoint=a.pth", "encoder=resnet18", *FOLDER, "out=out")
    for arguments, message in (
        ((), "run: missing; give run=DIR, or checkpoint=FILE"),
        (("checkpoint=a.pth",), "encoder: missing; checkpoint= needs it, encoder=NAME"),
        (("checkpoint=a.pth", "encoder=resnet18"), "data: missing"),
        (("checkpoint=a.pth", "encoder=resnet18", "data=digits"), "out: missing; checkpoint= needs it, out=DIR"),
        (("checkpoint=a.pth", "encoder=resnet50", *checkpoint[2:], root), "tensors match; missing: layer1.0.conv3"),
        (("checkpoint=b.pth", *checkpoint[1:], root), "b.pth: no such file"),
        (
            ("checkpoint=a.pth", "encoder=resnet19", *checkpoint[2:], root),
            "encoder: no option 'resnet19'; did you mean",
        ),
        (("checkpoint=a.pth", "encoder=timm/vgg", *checkpoint[2:], root), "timm has no 'vgg'; did you mean vgg"),
        (("checkpoint=a.pth", "encoder=timm/test_resnet", *checkpoint[2:], root), "tensors match; missing: "),
        ((*checkpoint, root, "encoder.width=4"), "other shape: conv1.weight [8, 3, 7, 7] for [4, 3, 7, 7]"),
        ((f"run={digits_run}", "data.root=x"), "data.root: needs data=NAME; root=PATH"),
        (
            (*checkpoint, "data.root=other"),
            "only the training set has digit 1, digit 4; only the test set has digit 9; data.known=[...]",
        ),
    ):
        result = command("eval", *arguments)
        assert result.code == 2 and message in result.err, result.err
        assert len(result.err.strip().splitlines()) == 1, result.err
    assert not (tmp_path / "out/config.yaml").exists()  # nothing was claimed, so that the corrected command can run


def test_a_failed_evaluation_leaves_its_folder_free(command, tmp_path, digit_folders, monkeypatch):
    torch.save(ResNet("resnet18", width=8).state_dict(), tmp_path / "a.pth")
    typed = ("checkpoint=a.pth", "encoder=resnet18", *FOLDER, f"data.root={digit_folders}", "out=out")
    with monkeypatch.context() as patch:  # the disk is full halfway
        patch.setattr("gradmix.eval.commands.work.evaluate.evaluate", Mock(side_effect=OSError("no space")))
        assert command("eval", *typed, "data.image_size=8").code == 2
    assert (tmp_path / "out/config.yaml").exists() and not (tmp_path / "out/metrics.json").exists()
    result = command("eval", *typed)
    assert result.code == 0, result.err
    result = command("eval", *typed, "data.image_size=8")
    assert result.code == 2
    assert "out: out belongs to another config (data.image_size is 16 there and 8 here)" in result.err
    assert "choose another out=, or delete that folder" in result.err
