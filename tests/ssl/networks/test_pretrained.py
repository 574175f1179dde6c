"""timm's own weights, from the hub's cache as huggingface_hub lays it out, loaded by timm's own code; no network."""

import json
import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from gradmix.ssl.config import EncoderConfig
from gradmix.ssl.networks.backbones import build_backbone

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with the weights of test_vit (160 x 160) and test_resnet, of whatever seed; and no way to the hub."""
    cache, networks = tmp_path / "hub", {}
    for name in ("test_vit", "test_resnet"):
        folder = cache / f"models--timm--{name}.r160_in1k"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(COMMIT)
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            networks[name] = timm.create_model(name, pretrained=False).eval()
        save_file(networks[name].state_dict(), snapshot / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return networks


def pretrained(name, size):
    return build_backbone(EncoderConfig(name, width=None, init="pretrained"), size).eval()


def test_features_are_timms(hub):
    ours, theirs = pretrained("timm/test_resnet", 64), hub["test_resnet"]
    theirs.reset_classifier(0)
    with torch.inference_mode():
        assert torch.equal(ours(IMAGES), theirs(IMAGES))
    assert ours.constants == ((0.5,) * 3, (0.5,) * 3)  # timm's pretrained_cfg of it
    random = build_backbone(EncoderConfig("timm/test_resnet", width=None), 64).eval()
    assert not torch.equal(ours.state_dict()["conv1.0.weight"], random.state_dict()["conv1.0.weight"])


def test_a_vits_positions_are_resampled(hub):
    """At its own size they are the file's; at another what timm's interpolation makes of them."""
    saved = hub["test_vit"].state_dict()["pos_embed"]
    assert torch.equal(pretrained("timm/test_vit.r160_in1k", 160).state_dict()["pos_embed"], saved)
    ours = pretrained("timm/test_vit", 64).state_dict()["pos_embed"]
    prefix = saved.shape[1] - 100
    grid = saved[:, prefix:].reshape(1, 10, 10, -1).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True, align_corners=False)
    expected = torch.cat([saved[:, :prefix], small.permute(0, 2, 3, 1).reshape(1, 16, -1)], dim=1)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "timm/test_efficientnet",
            r"timm's own weights of timm/test_efficientnet can't be had \(.*models--timm--test_eff",
        ),
        ("timm/resnet18d_", "timm has no 'resnet18d_'"),
        ("resnet18", "encoder: resnet18; only timm's networks have weights of their own, encoder=timm/NAME"),
    ],
)
def test_weights_that_are_missing_are_one_line(hub, name, message):
    with pytest.raises(ValueError, match=message) as raised:
        pretrained(name, 32)
    assert len(str(raised.value).splitlines()) == 1


def test_a_network_without_weights(hub):
    without = next(
        name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights and "resnet" in name
    )
    with pytest.raises(ValueError, match=f"timm has no weights of timm/{without}; timm.list_pretrained"):
        pretrained(f"timm/{without}", 64)


@pytest.fixture
def photos(tmp_path):
    data = load_digits()
    for digit in (1, 4, 7):
        for i, image in enumerate(data.images[data.target == digit][:30]):
            path = tmp_path / f"photos/{digit}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype(np.uint8)).save(path)
    return tmp_path / "photos"


FOLDER = ("data=imagefolder", "data.root=photos", "data.known=['1','4']", "data.holdout=0.1", "data.image_size=32")


def test_scoring_without_any_training(hub, photos, command, tmp_path):
    words = ("checkpoint=pretrained", "encoder=timm/test_vit", *FOLDER, "detectors=[deep_knn]", "out=frozen")
    result = command("eval", *words)
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "frozen/metrics.json").read_text())
    assert (
        0 <= numbers["osr/deep_knn/auroc"] <= 1 and "osr/deep_knn_start/auroc" not in numbers
    )  # it is the start itself
    assert command("score", "detector=frozen/detector", "images=photos/7").code == 0
    result = command("embed", "checkpoint=pretrained", "encoder=timm/test_vit", "images=photos", "image_size=32")
    assert result.code == 0 and "features.npy: 90 images, 64 features" in result.out, result.err
    assert np.isfinite(np.load(tmp_path / "features.npy")).all()


def test_a_run_stands_beside_its_start(hub, photos, command, tmp_path):
    """The same detector on the network that it started from: as gradmix-eval checkpoint=pretrained measures it."""
    small = ("epochs=1", "batch_size=16", "knn_k=3", "knn_every=0", "pictures_every=0", "trainer.accelerator=cpu")
    words = ("encoder=timm/test_vit", *FOLDER, "detectors=[deep_knn,mahalanobis]")
    result = command("pretrain", *words, "encoder.init=pretrained", *small, "run_dir=run")
    assert result.code == 0, result.err
    result = command("eval", "checkpoint=pretrained", *words, "knn_k=[3]", "out=frozen")
    assert result.code == 0, result.err
    run, frozen = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "frozen"))
    for name in ("deep_knn", "mahalanobis"):
        assert run[f"osr/{name}_start/auroc"] == pytest.approx(frozen[f"osr/{name}/auroc"], abs=1e-6)
    assert "AUROC of deep_knn, network at the start" in (tmp_path / "run/report.html").read_text()
    weights = load_file(tmp_path / "run/backbone.safetensors")
    assert not torch.equal(weights["pos_embed"], load_file(tmp_path / "frozen/backbone.safetensors")["pos_embed"])
    # without the cache the run is evaluated again, and says what it could not measure
    os.rename(tmp_path / "hub", tmp_path / "gone")
    result = command("eval", "run=run", "out=again")
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert result.code == 0 and "can't be had" in again["skipped"]["the network at the start"]
    assert again["osr/deep_knn/auroc"] == run["osr/deep_knn/auroc"]


def test_the_command_says_what_to_do_where_weights_are_missing(photos, tmp_path):
    code = "from gradmix.eval.commands.embed import main; main()"
    words = ["checkpoint=pretrained", "encoder=timm/vit_small_patch14_dinov2.lvd142m", "image_size=28", "images=photos"]
    place = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "empty")}
    told = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=os.environ | place, capture_output=True, text=True
    )
    assert told.returncode == 2 and "models--timm--vit_small_patch14_dinov2.lvd142m" in told.stderr
    assert len(told.stderr.splitlines()) == 1 and not list(tmp_path.glob("features*"))
