"""Every exported file, loaded again by the program it is for, gives the run's features."""

import shutil

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from safetensors.torch import load_file

import gradmix
from gradmix.eval.export import export_backbone
from gradmix.ssl.backbones import ResNet, backbone_metadata
from gradmix.ssl.config import EncoderConfig
from gradmix.ssl.files import write_tensors
from gradmix.ssl.images import normalize

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(folder, width=4, stem="small"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ResNet("resnet18", width, stem)
        encoder.train()(torch.randn(8, 3, 16, 16))  # statistics that are not the initial ones
    metadata = backbone_metadata(EncoderConfig("resnet18", width), stem, 16)
    write_tensors(folder / "backbone.safetensors", encoder.state_dict(), metadata)
    with torch.inference_mode():
        return gradmix.load(folder)(IMAGES)


def test_safetensors_fit_torchvision(tmp_path):
    expected = run(tmp_path, 64, "imagenet")
    (path,) = export_backbone(tmp_path, ["safetensors"], tmp_path / "out")
    theirs = torchvision.models.resnet18().eval()
    unfit = theirs.load_state_dict(load_file(path), strict=False)
    assert unfit.missing_keys == ["fc.weight", "fc.bias"] and not unfit.unexpected_keys
    theirs.fc = torch.nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(normalize(IMAGES)), expected)


def test_onnx(tmp_path):
    expected = run(tmp_path)
    (path,) = export_backbone(tmp_path, ["onnx"], tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["backbone.onnx"]  # the weights are inside
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (5, 1):  # any batch
        (features,) = session.run(["features"], {"images": IMAGES[:count].numpy()})
        np.testing.assert_allclose(features, expected[:count], atol=1e-4, rtol=1e-4)


def test_torch_export(tmp_path):
    expected = run(tmp_path)
    (path,) = export_backbone(tmp_path, ["torch_export"], tmp_path / "out")
    program = torch.export.load(path).module()
    for count in (5, 1):
        torch.testing.assert_close(program(IMAGES[:count]), expected[:count], atol=1e-4, rtol=1e-4)


def test_the_command(command, tmp_path, digits_run):
    shutil.copytree(digits_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    before = (tmp_path / "run/metrics.json").read_bytes()
    result = command("eval", "run=run", "export=[safetensors]")
    assert result.code == 0 and "run/export/backbone.safetensors" in result.out, result.err
    ours, theirs = load_file("run/export/backbone.safetensors"), load_file("run/backbone.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "run/metrics.json").read_bytes() == before  # exporting evaluates nothing
    result = command("eval", "run=run", "export=[tflite]")
    assert result.code == 2 and "export: expected some of safetensors, onnx, torch_export, got 'tflite'" in result.err


def test_without_onnxs_packages(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"pip install 'gradmix\[export\]'"):
        export_backbone(tmp_path, ["onnx"], tmp_path / "out")
