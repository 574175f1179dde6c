"""Every exported file, loaded again by the program it is for, gives the run's features."""

import shutil

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file

import gradmix
from gradmix.eval.runs.export import export_backbone
from gradmix.ssl.data.images import normalize
from gradmix.ssl.networks.backbones import backbone_metadata, build_encoder
from gradmix.ssl.runs.files import write_tensors

ONNX = torch.__version__ >= "2.11"
IMAGES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run(folder, name="resnet18", **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build_encoder({"name": name, **settings}, 32)
        encoder.train()(torch.randn(8, 3, 32, 32))  # statistics that are not the initial ones
    write_tensors(folder / "backbone.safetensors", encoder.state_dict(), backbone_metadata(encoder, 32))
    with torch.inference_mode():
        return gradmix.load(folder)(IMAGES)


ENCODERS = pytest.mark.parametrize(
    "encoder",
    [
        {"width": 4, "stem": "small"},
        {"name": "timm/test_resnet"},
        {"name": "timm/test_vit"},
        {"name": "timm/test_convnext"},
    ],
    ids=lambda encoder: encoder.get("name", "resnet18"),
)


def test_safetensors_fit_torchvision(tmp_path):
    expected = run(tmp_path, width=64, stem="imagenet")
    (path,) = export_backbone(tmp_path, ["safetensors"], tmp_path / "out")
    theirs = torchvision.models.resnet18().eval()
    unfit = theirs.load_state_dict(load_file(path), strict=False)
    assert unfit.missing_keys == ["fc.weight", "fc.bias"] and not unfit.unexpected_keys
    theirs.fc = torch.nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(normalize(IMAGES)), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_safetensors_fit_timm(tmp_path, name):
    expected = run(tmp_path, f"timm/{name}")
    (path,) = export_backbone(tmp_path, ["safetensors"], tmp_path / "out")
    sized = {"img_size": 32} if name == "test_vit" else {}
    theirs = timm.create_model(name, num_classes=0, checkpoint_path=path, **sized).eval()  # strict
    own = timm.data.resolve_model_data_config(theirs)
    with torch.inference_mode():
        features = theirs(torchvision.transforms.functional.normalize(IMAGES, own["mean"], own["std"]))
    assert torch.equal(features, expected)


@pytest.mark.skipif(not ONNX, reason="torch before 2.11")
@ENCODERS
def test_onnx(tmp_path, encoder):
    expected = run(tmp_path, **encoder)
    (path,) = export_backbone(tmp_path, ["onnx"], tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["backbone.onnx"]  # the weights are inside
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (5, 1):  # any batch
        (features,) = session.run(["features"], {"images": IMAGES[:count].numpy()})
        np.testing.assert_allclose(features, expected[:count], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(ONNX, reason="this torch writes ONNX")
def test_older_torch_says_so(tmp_path):
    run(tmp_path, width=4, stem="small")
    with pytest.raises(ValueError, match=r"export: onnx needs torch 2\.11 or newer, this is 2\."):
        export_backbone(tmp_path, ["onnx"], tmp_path / "out")


@ENCODERS
def test_torch_export(tmp_path, encoder):
    expected = run(tmp_path, **encoder)
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
    run(tmp_path, width=4, stem="small")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"pip install onnx onnxscript"):
        export_backbone(tmp_path, ["onnx"], tmp_path / "out")
