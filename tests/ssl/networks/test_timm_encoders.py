"""timm's networks as encoders, against timm itself."""

import json
import sys

import pytest
import timm
import torch
from pytorch_lightning import Callback
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import normalize

import gradmix
import gradmix.ssl.pretrain
from gradmix.ssl.config import EncoderConfig
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.networks.backbones import backbone_metadata, build_backbone, read_backbone
from gradmix.ssl.runs.files import write_tensors
from gradmix.ssl.train import train

IMAGES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = ["test_vit", "test_convnext", "test_resnet", "test_efficientnet", "test_mambaout"]


def theirs(name, size=32, **settings):
    """timm's own network, with BatchNorm statistics that are not the initial ones."""
    settings |= {"img_size": size} if "vit" in name else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=False, **settings)
        network.train()(torch.randn(8, 3, size, size))
    return network.eval()


def encoder(name, **settings):
    return EncoderConfig(f"timm/{name}", width=None, **settings)


@pytest.mark.parametrize("kind", ["alone", "lightning", "module", "safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_timms(name, kind, tmp_path, capsys):
    """With their classifier, under whatever prefix: what ``num_classes=0`` leaves gives the same features."""
    network, path = theirs(name, num_classes=7), tmp_path / "weights.pth"
    prefix = {"lightning": "model.backbone.", "module": "module.", "safetensors": "backbone."}.get(kind, "")
    state = {prefix + key: value for key, value in network.state_dict().items()}
    if kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "lightning" else state, path)
    ours = build_backbone(encoder(name, init=str(path)), 32).eval()
    network.reset_classifier(0)
    with torch.inference_mode():
        expected = network(IMAGES)
        assert torch.equal(ours(IMAGES), expected) and ours.num_features == expected.shape[1]
    printed = capsys.readouterr().out
    assert f"{len(network.state_dict())} tensors matched" in printed and "missing: none; unused: " in printed
    assert "fc." in printed or "head." in printed or "classifier." in printed


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_one_is_loaded_with_its_own_constants(name, tmp_path):
    """From uint8 images, as timm's own transform prepares them."""
    torch.save(theirs(name, num_classes=0).state_dict(), tmp_path / "a.pt")
    ours = read_backbone(tmp_path / "a.pt", f"timm/{name}", image_size=32)
    write_tensors(tmp_path / "backbone.safetensors", ours.state_dict(), backbone_metadata(ours, 32))
    network = theirs(name, num_classes=0)
    own = timm.data.resolve_model_data_config(network)
    pixels = (IMAGES * 255).byte()
    with torch.inference_mode():
        expected = network(normalize(pixels / 255, own["mean"], own["std"]))
        assert torch.equal(gradmix.load(tmp_path)(pixels), expected)
    assert (own["mean"] == (0.5, 0.5, 0.5)) == (name in ("test_vit", "test_convnext", "test_resnet"))  # both kinds


def test_a_tag_chooses_the_constants():
    vit = build_backbone(encoder("vit_tiny_patch16_224.augreg_in21k"), 32)
    assert vit.constants == ((0.5,) * 3, (0.5,) * 3)
    assert build_backbone(encoder("deit_tiny_patch16_224.fb_in1k"), 32).constants[0] == (0.485, 0.456, 0.406)


def test_features_that_are_more_than_timm_says():
    network = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    with torch.inference_mode():
        width = network(IMAGES).shape[1]
    assert build_backbone(encoder("mobilenetv3_small_050"), 32).num_features == width != network.num_features


def test_metadata_of_runs_before_timm(tmp_path):
    resnet = build_backbone(EncoderConfig("resnet18", 4, "small"), 8)
    described = {"encoder": {"name": "resnet18", "width": 4, "stem": "small"}, "image_size": 8}
    assert json.loads(backbone_metadata(resnet, 8)["gradmix"]) == described | {"fit": "crop"}
    write_tensors(tmp_path / "backbone.safetensors", resnet.state_dict(), {"gradmix": json.dumps(described)})
    images = torch.rand(2, 3, 8, 8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with torch.inference_mode():
        assert torch.equal(gradmix.load(tmp_path)(images), resnet.eval()(normalize(images, mean, std)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (encoder("convnext_atta"), r"timm has no 'convnext_atta'; did you mean convnext_atto"),
        (encoder("vit_tiny"), r"timm has no 'vit_tiny'; did you mean .*vit_tiny"),
        (encoder("qqqqqqqq"), r"timm has no 'qqqqqqqq'; timm.list_models\(\) has the names"),
        (encoder("hf-hub:timm/resnet18"), r"timm has no 'hf-hub:timm/resnet18'"),
        (encoder("test_vit.r160_in2k"), r"timm's test_vit has no tag 'r160_in2k'; did you mean test_vit.r160_in1k\?"),
        (encoder("test_vit", stem="small"), r"encoder.stem: timm's networks have none to set"),
        (EncoderConfig("timm/test_vit", width=8), r"encoder.width: timm's networks have none to set"),
        (
            encoder("test_vit"),
            r"timm/test_vit does not work with data.image_size=8 \(.+\); timm's own size of it is 160",
        ),
    ],
)
def test_bad_input(config, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(config, 8)


def test_positions_of_another_grid(tmp_path):
    torch.save(theirs("test_vit", size=64).state_dict(), tmp_path / "a.pt")
    message = r"other shape: pos_embed \[1, 17, 64\] for \[1, 5, 64\]; choose the encoder.name and data.image_size"
    with pytest.raises(ValueError, match=message):
        read_backbone(tmp_path / "a.pt", "timm/test_vit", image_size=32)
    read_backbone(tmp_path / "a.pt", "timm/test_vit", image_size=64)


def test_without_timm(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install timm"):
        build_backbone(encoder("test_vit"), 32)
    build_backbone(EncoderConfig("resnet18", 4), 32)


@pytest.fixture
def with_dropout(monkeypatch):
    """Networks drop a fifth of some features at random, as a few of timm's do by themselves."""
    build = gradmix.ssl.pretrain.build_backbone

    def build_with_dropout(*arguments):
        backbone = build(*arguments)
        dropouts = [module for module in backbone.modules() if isinstance(module, torch.nn.Dropout)]
        for module in dropouts:
            module.p = 0.2
        assert dropouts
        return backbone

    monkeypatch.setattr(gradmix.ssl.pretrain, "build_backbone", build_with_dropout)


class PowerCut(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.steps == 3:
            raise RuntimeError("power cut")


def test_a_run_that_died_goes_on_to_the_same_weights(tmp_path, config, with_dropout):
    runs = {}
    for name in ("whole", "cut"):
        runs[name] = config(tmp_path / name, epochs=1, checkpoint_seconds=0)
        runs[name].encoder, runs[name].data.image_size = encoder("test_vit"), 32
    data = load_data(runs["whole"].data, 0)
    train(runs["whole"], data)
    with pytest.raises(RuntimeError, match="power cut"):
        train(runs["cut"], data, [PowerCut()])
    train(runs["cut"], data)
    assert json.loads((tmp_path / "cut/training.json").read_text())["train/resumed_from_step"] == 2
    whole, cut = (load_file(tmp_path / name / "backbone.safetensors") for name in runs)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    fresh = timm.create_model("test_vit", num_classes=0, img_size=32)
    fresh.load_state_dict(cut)  # under timm's names
