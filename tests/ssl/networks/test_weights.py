"""Weights from elsewhere: found under any prefix, refused when they don't fit, and files that run code do not."""

import io
import os
import pickle
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from lightly.models.modules import SimCLRProjectionHead
from pytorch_lightning import LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn

from gradmix.ssl.config import EncoderConfig
from gradmix.ssl.networks.backbones import ResNet, build_backbone, read_backbone
from gradmix.ssl.networks.weights import load_weights


def used(network):
    """The network with BatchNorm statistics that are not the initial ones, images, and the features before its head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = torch.randn(8, 3, 32, 32)
        network.train()(images)
        body = nn.Sequential(*list(network.eval().children())[:-1])
        with torch.inference_mode():
            return network, images, body(images).flatten(1)


@pytest.fixture(scope="module")
def network():
    """A narrow ResNet-18 under torchvision's names, with a classifier."""
    network = ResNet("resnet18", width=8)
    network.fc = nn.Linear(64, 10)
    return used(network)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def lightning(network, path):
    """A checkpoint as Lightning's Trainer writes it after a step of training with plain hyper-parameters."""

    class Model(LightningModule):
        def __init__(self, lr=0.0, name="simclr", sizes=(1, 2)):
            super().__init__()
            self.save_hyperparameters()
            self.backbone, self.head = network, nn.Linear(10, 2)

        def training_step(self, batch):
            return self.head(self.backbone(batch[0])).mean()

        def on_train_batch_start(self, *_):
            self.backbone.eval()  # the statistics must stay

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(2, 3, 32, 32)), 2)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), self.hparams.lr)

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, **quiet)
    trainer.fit(Model())
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["name"] == "simclr" and stored["optimizer_states"][0]["state"]


def shortcuts(state):
    return {name.replace("downsample", "shortcut"): tensor for name, tensor in state.items()}


def moco(state):
    momentum = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    both = prefixed(state, "module.encoder_q.") | prefixed(momentum, "module.encoder_k.")
    return {"epoch": 3, "arch": "resnet18", "state_dict": both, "optimizer": {"state": {0: {"m": torch.ones(2)}}}}


WHOLE = {
    "torchvision": torchvision.models.resnet18,
    "timm": lambda: timm.create_model("resnet18", num_classes=7, global_pool="avg"),
}


@pytest.mark.parametrize(
    "kind", ["torchvision", "timm", "supcontrast", "moco", "lightning", "lightly", "solo", "compiled", "safetensors"]
)
def test_features_are_the_same_whoever_saved_them(network, tmp_path, kind, capsys):
    network, images, expected = network if kind not in WHOLE else used(WHOLE[kind]())
    state, path = network.state_dict(), tmp_path / "weights.pt"
    match kind:
        case "torchvision":
            torch.save(state, path)
        case "timm":
            torch.save({"state_dict": state, "epoch": 1}, path)
        case "supcontrast":
            model = prefixed(shortcuts(state), "module.encoder.") | {"module.head.0.weight": torch.ones(3, 3)}
            torch.save({"opt": Namespace(model="resnet18", cosine=True), "model": model, "epoch": 1}, path)
        case "moco":
            torch.save(moco(state), path)
        case "lightning":
            lightning(network, path)
        case "lightly":  # its examples' module: a Sequential backbone and a head
            body = nn.Sequential(*list(network.children())[:-1])
            module = nn.ModuleDict({"backbone": body, "projection_head": SimCLRProjectionHead(64, 64, 16)})
            torch.save({"state_dict": module.state_dict()}, path)
        case "solo":
            weights = prefixed(state, "backbone.") | prefixed(state, "momentum_backbone.")
            torch.save({"state_dict": weights | {"classifier.weight": torch.ones(10, 64)}}, path)
        case "compiled":
            torch.save(torch.compile(nn.ModuleDict({"encoder": network})).state_dict(), path)
        case "safetensors":
            path = tmp_path / "weights.safetensors"
            save_file(prefixed(state, "model."), path)
    backbone = read_backbone(path, "resnet18").eval()
    with torch.inference_mode():
        assert torch.equal(backbone(images), expected)
    printed = capsys.readouterr().out
    assert "120 tensors matched" in printed and "missing: none" in printed
    dropped = {"moco": "(also there: 'state_dict.module.encoder_k.'; encoder.part=WORD", "supcontrast": "head.0.weight"}
    assert dropped.get(kind, "unused: ") in printed


def test_of_student_and_teacher_the_teacher_is_taken_unless_asked(network, tmp_path, capsys):
    """DINO's own checkpoints: the student first, under a DistributedDataParallel's name."""
    network, images, expected = network
    state, path = network.state_dict(), tmp_path / "dino.pth"
    student = {name: 2 * tensor for name, tensor in state.items()}
    both = {"student": prefixed(student, "module.backbone."), "teacher": prefixed(state, "backbone."), "epoch": 3}
    torch.save(both, path)
    with torch.inference_mode():
        assert torch.equal(read_backbone(path, "resnet18").eval()(images), expected)
        printed = capsys.readouterr().out
        assert "under 'teacher.backbone.' (also there: 'student.module.backbone.'; encoder.part=WORD takes" in printed
        for part in ("teacher", "backbone.", "student"):
            config = EncoderConfig("resnet18", None, init=str(path), part=part)
            same = torch.equal(build_backbone(config, 32).eval()(images), expected)
            assert same == (part == "teacher")  # "backbone." is in both: the first in the file
    with pytest.raises(ValueError, match=r"encoder\.part: no weights with 'king' before .*'student\.module\.backbone"):
        read_backbone(path, "resnet18", part="king")
    with pytest.raises(ValueError, match=r"encoder\.part: chooses among the networks of encoder\.init=FILE"):
        build_backbone(EncoderConfig("resnet18", part="teacher"), 32)


def test_a_sequential_without_the_first_relu_is_called_what_it_is(network, tmp_path):
    children = list(network[0].children())
    for left_out in (2, 3):  # the ReLU or the max-pool: the names are the same
        body = nn.Sequential(*children[:left_out], *children[left_out + 1 : -1])
        torch.save({"backbone." + name: tensor for name, tensor in body.state_dict().items()}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"stand at backbone\.3 to 6 .*: the first ReLU or the max-pool is miss"):
            read_backbone(tmp_path / "a.pt", "resnet18")


def test_pretraining_starts_from_them(network, tmp_path):
    network, images, expected = network
    torch.save(prefixed(network.state_dict(), "module.encoder."), tmp_path / "a.pt")
    config = EncoderConfig("resnet18", 8, init=str(tmp_path / "a.pt"))
    backbone = build_backbone(config, image_size=32).eval()  # at this size, a small stem unless the file says otherwise
    with torch.inference_mode():
        assert torch.equal(backbone(images), expected)
    with pytest.raises(
        ValueError, match=r"only 20 of the encoder's 120 tensors match; other shape: conv1.weight \[8, 3"
    ):
        build_backbone(EncoderConfig("resnet18", 16, init=str(tmp_path / "a.pt")), 32)


def test_width_and_stem_are_read_off_the_first_convolution(tmp_path):
    for width, stem in ((4, "small"), (8, "imagenet")):
        theirs = build_backbone(EncoderConfig("resnet18", width, stem), 32)
        torch.save(theirs.state_dict(), tmp_path / "a.pt")
        ours = read_backbone(tmp_path / "a.pt", "resnet18")
        assert ours.description == {"name": "resnet18", "width": width, "stem": stem}
        assert repr(ours) == repr(theirs)
    with pytest.raises(ValueError, match=r"other shape: conv1\.weight \[8, 3, 7, 7\] for \[8, 3, 3, 3\]"):
        read_backbone(tmp_path / "a.pt", "resnet18", stem="padded")


def test_solo_learns_stem_for_cifar():
    theirs = ResNet("resnet18", width=8).eval()
    theirs.conv1 = nn.Conv2d(3, 8, 3, 1, 2, bias=False)
    theirs.maxpool = nn.Identity()
    ours = build_backbone(EncoderConfig("resnet18", 8, stem="padded"), 32).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images)) and ours.description["stem"] == "padded"


def test_too_few_matches_are_refused_with_the_numbers(network, tmp_path):
    state = network[0].state_dict()
    torch.save(state, tmp_path / "18.pt")
    larger = {name: tensor.shape for name, tensor in ResNet("resnet50", width=8).state_dict().items()}
    fit = sum(name in state and state[name].shape == shape for name, shape in larger.items())
    message = rf"only {fit} of the encoder's {len(larger)} tensors match; missing: layer1\.0\.conv3"
    with pytest.raises(ValueError, match=message):
        read_backbone(tmp_path / "18.pt", "resnet50")
    torch.save({name: state[name] for name in state if "layer4" not in name}, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"only 90 of the encoder's 120 tensors match; missing: layer4\.0\.conv1"):
        read_backbone(tmp_path / "cut.pt", "resnet18")
    torch.save({name: state[name] for name in state if "num_batches" not in name}, tmp_path / "old.pt")
    read_backbone(tmp_path / "old.pt", "resnet18")  # counters that old files lack change nothing


CANARY = "canary"


class Hostile:
    """Writes the canary when it is unpickled."""

    def __init__(self, function=os.system, *arguments):
        self.call = function, arguments or (f"touch {CANARY}",)

    def __reduce__(self):
        return self.call


def zipped(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _raw_pickle(path):
    path.write_bytes(pickle.dumps(Hostile()))


def _beside_the_weights(path):
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "extra": Hostile()}, path)


def _legacy_format(path):
    torch.save({"a": Hostile(eval, f"open('{CANARY}', 'w')")}, path, _use_new_zipfile_serialization=False)


def _reduce_in_the_zip(path):
    zipped(path, {"x/data.pkl": pickle.dumps(Hostile()), "x/version": "3"})


def _target(path):
    call = {"_target_": "os.system", "command": f"touch {CANARY}"}
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "hyper_parameters": {"model": call}}, path)


def _instantiator(path):
    call = {"_instantiator": "os.system", "_class_path": f"touch {CANARY}"}
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "hyper_parameters": call}, path)


def _whole_module(path):
    torch.save(nn.Linear(2, 2), path)


def _zip_bomb(path):
    zipped(path, {"x/data.pkl": b"\x80\x02}.", "x/data/0": bytes(2**26), "x/version": "3"}, zipfile.ZIP_DEFLATED)


def _path_out_of_the_zip(path):
    zipped(path, {f"../{CANARY}": b"x", f"/{CANARY}": b"x", f"x/../../{CANARY}": b"x"})


def _two_formats_in_one(path):
    """A pickle at the start, a zip at the end: readers disagree on what it is."""
    zipped(path, {"x/data.pkl": pickle.dumps({}), "x/version": "3"})
    path.write_bytes(pickle.dumps(Hostile()) + path.read_bytes())


def _tar(path):
    with tarfile.open(path, "w") as archive:
        content = pickle.dumps(Hostile())
        for name in ("pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _script(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def _namespace_with_more(path):
    torch.save({"opt": Namespace(call=Hostile()), "model": {"conv1.weight": torch.ones(1)}}, path)


def _holds_itself(path):
    knot = {}
    knot["again"] = [knot]
    torch.save(knot, path)


HOSTILE = [value for name, value in dict(globals()).items() if name.startswith("_") and callable(value)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [m for m in HOSTILE if m.__module__ == __name__], ids=lambda m: m.__name__)
def test_hostile_files_run_nothing_and_end_in_one_clear_line(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("inner").mkdir()
    path = Path("inner/weights.pt")
    make(path)
    with pytest.raises(ValueError) as caught:
        read_backbone(path, "resnet18")
    message = str(caught.value)
    assert message.startswith("inner/weights.pt: ") and len(message.splitlines()) == 1 and len(message) < 500
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["inner", "weights.pt"]


def test_the_canary_would_have_sung(tmp_path, monkeypatch):
    """The test above can fail: the same file, loaded as pickles usually are, runs its code."""
    monkeypatch.chdir(tmp_path)
    _beside_the_weights(Path("weights.pt"))
    torch.load("weights.pt", weights_only=False)
    assert Path(CANARY).exists()


def test_damaged_files_are_named(tmp_path):
    torch.save({"conv1.weight": torch.ones(100)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for content in (b"", b"\x00", whole[:200], whole[:-100], b"<html>"):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pt: not a readable weights file"):
            load_weights(tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"a\.safetensors: not a readable weights file"):
        load_weights(tmp_path / "a.safetensors")
