"""LayerCAM on a contrastive loss: against slow loops and pytorch-grad-cam, and that taking it moves nothing."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

from gradmix import GradMix, layercam
from gradmix.attribution import default_layers, record
from gradmix.ssl.losses import NTXentLoss, SupConLoss

STAGES = ["layer2", "layer3", "layer4"]


class Encoder(resnet.ResNet):
    """torchvision's ResNet, narrow, one block per stage, a small-image stem, and dropout in the head."""

    def __init__(self, checkpointing: bool = False):
        super().__init__(resnet.BasicBlock, [1, 1, 1, 1])
        self.inplanes = 8
        self.conv1, self.bn1, self.maxpool = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Identity()
        self.layer1 = self._make_layer(resnet.BasicBlock, 8, 1)
        self.layer2 = self._make_layer(resnet.BasicBlock, 16, 1, stride=2)
        self.layer3 = self._make_layer(resnet.BasicBlock, 32, 1, stride=2)
        self.layer4 = self._make_layer(resnet.BasicBlock, 64, 1, stride=2)
        self.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 32))
        if checkpointing:
            forward = self.layer3.forward
            self.layer3.forward = lambda x: checkpoint(forward, x, use_reentrant=False)


def encoder_and_views(dtype=torch.float32, rows: int = 8, size=(16, 16), seed: int = 0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder(**options).to(dtype), torch.rand(rows, 3, *size, dtype=dtype)


def project(encoder: nn.Module, views: torch.Tensor) -> torch.Tensor:
    return F.normalize(encoder(views), dim=1)


def recorded(encoder: nn.Module, views: torch.Tensor, layers=STAGES):
    activations: list[torch.Tensor] = []
    with record(encoder, layers, activations):
        loss = NTXentLoss(0.1)(project(encoder, views))
    return loss, activations


def slow_layercam(activations, gradients, size, sign):
    """One image and one layer at a time, in float64, from equations 5 and 6 of the LayerCAM paper."""
    maps = []
    for image in range(len(activations[0])):
        layers = []
        for activation, gradient in zip(activations, gradients, strict=True):
            _, height, width = activation[image].shape
            cam = np.zeros((height, width))
            for a, g in zip(activation[image].double().numpy(), gradient[image].double().numpy(), strict=True):
                cam += np.maximum(sign * g, 0) * a
            spread = cam.max() - cam.min()
            cam = (cam - cam.min()) / spread if spread > 0 else np.zeros_like(cam)
            layers.append(slow_bilinear(cam, size))
        maps.append(np.mean(layers, axis=0))
    return torch.from_numpy(np.stack(maps))


def slow_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation between pixel centres, pixel by pixel."""
    height, width = image.shape
    out = np.zeros(size)
    for i in range(size[0]):
        y = min(max((i + 0.5) * height / size[0] - 0.5, 0), height - 1)
        y0 = int(y)
        y1 = min(y0 + 1, height - 1)
        for j in range(size[1]):
            x = min(max((j + 0.5) * width / size[1] - 0.5, 0), width - 1)
            x0 = int(x)
            x1 = min(x0 + 1, width - 1)
            top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("evidence", ["loss", "agreement"])
@pytest.mark.parametrize("size", [(16, 16), (19, 11)])
def test_layercam_is_the_papers(dtype, evidence, size):
    encoder, views = encoder_and_views(dtype, size=size)
    loss, activations = recorded(encoder, views)
    gradients = torch.autograd.grad(loss, activations, retain_graph=True)
    maps = layercam(loss, activations, size, evidence)
    detached = [a.detach() for a in activations]
    slow = slow_layercam(detached, gradients, size, 1 if evidence == "loss" else -1)
    assert maps.dtype == torch.float32 and maps.shape == (8, *size) and not maps.requires_grad
    assert maps.min() >= 0 and maps.max() <= 1
    torch.testing.assert_close(maps.double(), slow, rtol=1e-5, atol=1e-6)
    assert (maps.amax((1, 2)) > 0.3).all()  # something was seen in every image


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_layercam_is_pytorch_grad_cams(layer, supervised):
    cams = pytest.importorskip("pytorch_grad_cam")
    encoder, views = encoder_and_views()
    encoder.eval()  # it insists
    labels = torch.tensor([0, 0, 1, 1]).repeat(2)

    def scalar(features):
        z = F.normalize(features, dim=1)
        return SupConLoss(0.1)(z, labels) if supervised else NTXentLoss(0.1)(z)

    activations: list[torch.Tensor] = []
    with record(encoder, [layer], activations):
        loss = scalar(encoder(views))
    maps = layercam(loss, activations, (16, 16))

    rows: list[torch.Tensor] = []

    def target(row):
        """It sums one target per image: here the last one is the loss of all, the others are nothing."""
        rows.append(row)
        return scalar(torch.stack(rows)) if len(rows) == len(views) else row.sum() * 0

    with cams.LayerCAM(encoder, [getattr(encoder, layer)]) as cam:
        theirs = torch.from_numpy(cam(views, targets=[target] * len(views)))
    # It scales to [0, 1] once more after resizing; the size of layer1's maps is the images'.
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    torch.testing.assert_close((maps - low) / (high - low), theirs, rtol=1e-4, atol=1e-5)
    if layer == "layer1":
        torch.testing.assert_close(maps, theirs, rtol=1e-4, atol=1e-5)


def snapshot(encoder: nn.Module, *tensors: torch.Tensor):
    """Everything that taking the attribution could move, as bytes."""
    parts = {f"grad {n}": None if p.grad is None else p.grad for n, p in encoder.named_parameters()}
    parts |= {f"state {n}": t for n, t in encoder.state_dict().items()}
    parts |= {f"input {i}": t for i, t in enumerate(tensors)}
    frozen = {name: None if t is None else t.detach().numpy().tobytes() for name, t in parts.items()}
    frozen["modes"] = [m.training for m in encoder.modules()]
    frozen["buffers"] = [id(b) for b in encoder.buffers()]
    frozen["torch"] = torch.get_rng_state().numpy().tobytes()
    frozen["numpy"] = repr(np.random.get_state())
    frozen["python"] = random.getstate()
    frozen["hooks"] = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in encoder.modules()
    ]
    return frozen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("earlier_gradients", [False, True])
def test_nothing_moves(checkpointing, inside, earlier_gradients):
    encoder, views = encoder_and_views(checkpointing=checkpointing)
    encoder.layer1.eval()  # a mixed state must survive as well
    if earlier_gradients:
        project(encoder, views).square().mean().backward()
        (project(encoder, views) ** 3).sum().backward()
    mixer = GradMix()
    before_watch = snapshot(encoder)["hooks"]
    with mixer.watch(encoder):
        z = project(encoder, views)
        loss = NTXentLoss(0.1)(z)
        if inside:
            before = snapshot(encoder, views, z, loss)
            mixed = mixer(views, loss)
            assert snapshot(encoder, views, z, loss) == before
    if not inside:
        before = snapshot(encoder, views, z, loss)
        mixed = mixer(views, loss)
        assert snapshot(encoder, views, z, loss) == before
    assert snapshot(encoder)["hooks"] == before_watch
    assert (mixed.attribution.amax((1, 2)) > 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_gives_the_same_gradient_and_statistics_as_without(checkpointing):
    found = []
    for attribution in (False, True):
        encoder, views = encoder_and_views(checkpointing=checkpointing)
        mixer = GradMix()
        torch.manual_seed(0)  # dropout
        with mixer.watch(encoder) if attribution else nullcontext():
            loss = NTXentLoss(0.1)(project(encoder, views))
        if attribution:
            mixer(views, loss)
        second = NTXentLoss(0.1)(project(encoder, 1 - views))
        (loss + second).backward()
        found.append([p.grad for p in encoder.parameters()] + list(encoder.buffers()))
    for without, with_attribution in zip(*found, strict=True):
        assert torch.equal(without, with_attribution)


def test_hooks_are_gone_after_an_exception():
    encoder, views = encoder_and_views()
    mixer = GradMix()
    with pytest.raises(RuntimeError, match="channels"), mixer.watch(encoder):
        encoder(views[:, :2])
    assert not any(m._forward_hooks for m in encoder.modules())
    with mixer.watch(encoder):
        loss = NTXentLoss(0.1)(project(encoder, views))
    assert mixer(views, loss).attribution.shape == (8, 16, 16)


def test_a_second_forward_pass_replaces_the_first():
    encoder, views = encoder_and_views()
    encoder.eval()
    mixer = GradMix()
    with mixer.watch(encoder):
        NTXentLoss(0.1)(project(encoder, 1 - views))
        loss = NTXentLoss(0.1)(project(encoder, views))
    again = GradMix()
    with again.watch(encoder):
        loss_again = NTXentLoss(0.1)(project(encoder, views))
    assert torch.equal(mixer(views, loss).attribution, again(views, loss_again).attribution)


def test_tokens_that_do_not_stand_row_by_row_have_no_default():
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match="no default for the last 3 stages of Hiera"):
        GradMix().watch(timm.create_model("hiera_tiny_224")).__enter__()


def test_wrong_layers_name_the_right_ones():
    encoder, _ = encoder_and_views()
    with pytest.raises(ValueError, match=r"no submodule 'layer5'; did you mean 'layer\d'\? It has: .*layer4"):
        GradMix(["layer5"]).watch(encoder).__enter__()
    with pytest.raises(ValueError, match=r"layer1, layer1\.0, .*layer4"):
        GradMix([""]).watch(encoder).__enter__()
    with pytest.raises(
        ValueError, match="no default for the last 3 stages of Sequential; name some of its submodules: 0, 1"
    ):
        GradMix().watch(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())).__enter__()
    with pytest.raises(ValueError, match="last 5 stages"):
        GradMix(5).watch(encoder).__enter__()
    for layers in ("layer4", [], 0, -1):
        with pytest.raises(ValueError, match="layers: expected a list of names or how many"):
            GradMix(layers)
    assert not any(m._forward_hooks for m in encoder.modules())


def test_layers_that_give_no_map_are_refused():
    encoder, views = encoder_and_views()
    with pytest.raises(ValueError, match=r"layers: 'fc' gives \(8, 32\), not \[N, C, h, w\] or \[N, T, C\]"):
        with GradMix(["fc"]).watch(encoder):
            encoder(views)


def test_layers_that_the_forward_pass_passes_by_are_refused():
    """Such as stages whose blocks the network calls one by one: the other layers alone would be another map."""

    class PassesBy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1))

        def forward(self, x):
            return self.second[0](self.first(x)).mean((2, 3))

    with pytest.raises(ValueError, match="layers: PassesBy does not call 'second' in its forward pass; name others"):
        with GradMix(["first", "second"]).watch(network := PassesBy()):
            network(torch.rand(4, 3, 8, 8))
    with GradMix(["first", "second.0"]).watch(network):
        network(torch.rand(4, 3, 8, 8))


def test_default_layers_are_the_last_stages_wherever_the_encoder_lies():
    encoder, _ = encoder_and_views()
    assert default_layers(encoder) == STAGES
    assert default_layers(encoder, 2) == STAGES[1:]
    assert default_layers(encoder, 4) == ["layer1", *STAGES]
    assert default_layers(nn.ModuleDict({"net": encoder})) == [f"net.{stage}" for stage in STAGES]


def test_loss_without_a_graph_is_a_value_error():
    encoder, views = encoder_and_views()
    loss, activations = recorded(encoder, views)
    for wrong in (loss.detach(), activations[0].new_ones((), requires_grad=True) * 2):
        with pytest.raises(ValueError, match="loss: it does not depend on the watched activations"):
            layercam(wrong, activations, (16, 16))
    with pytest.raises(ValueError, match="loss: it does not depend on the watched activations"):
        layercam(loss, [a.detach() for a in activations], (16, 16))
    with pytest.raises(ValueError, match=r"loss: expected a scalar, got shape \(2,\)"):
        layercam(loss.repeat(2), activations, (16, 16))
    with pytest.raises(ValueError, match="activations: got none"):
        layercam(loss, [], (16, 16))
    with pytest.raises(ValueError, match="evidence: expected one of loss, agreement, got 'Loss'"):
        layercam(loss, activations, (16, 16), "Loss")
    loss.backward()
    with pytest.raises(ValueError, match="call the mixer before backward"):
        layercam(loss, activations, (16, 16))


def test_misuse_of_the_mixer_says_what_is_missing():
    encoder, views = encoder_and_views()
    mixer = GradMix()
    loss, _ = recorded(encoder, views)
    with pytest.raises(ValueError, match="loss: no forward pass was recorded"):
        mixer(views, loss)
    with mixer.watch(encoder):
        loss = NTXentLoss(0.1)(project(encoder, views))
    with pytest.raises(ValueError, match="loss: GradMix needs the contrastive loss"):
        mixer(views)
    with pytest.raises(ValueError, match="images: 4 rows, but the watched forward pass had 8; both views"):
        mixer(views[:4], loss)
    with mixer.watch(encoder):
        loss = NTXentLoss(0.1)(project(encoder, views))
    with pytest.raises(ValueError, match="loss: expected the loss's tensor, whose graph is asked, got float"):
        mixer(views, loss.item())
    with torch.no_grad(), mixer.watch(encoder):
        loss = NTXentLoss(0.1)(project(encoder, views))
    with pytest.raises(ValueError, match="loss: it does not depend on the watched activations"):
        mixer(views, loss)


def test_the_steps_graph_is_let_go():
    encoder, views = encoder_and_views()
    mixer = GradMix()
    with mixer.watch(encoder):
        loss = NTXentLoss(0.1)(project(encoder, views))
    mixer(views, loss)
    assert not mixer._activations


def test_flat_and_damaged_maps_are_zero():
    activation = torch.ones(4, 2, 3, 3, requires_grad=True)
    weight = torch.ones(4, 2, 3, 3)
    weight[1] = 0
    weight[2, 0, 0, 0] = torch.nan
    weight[3, 0, 0, 0] = 5
    maps = layercam((activation * weight).sum(), [activation], (6, 6))
    assert torch.equal(maps[:3], torch.zeros(3, 6, 6))
    assert maps[3].max() == 1 and maps[3].min() == 0


@pytest.mark.parametrize(
    ("size", "grid", "prefix"),
    [
        ((32, 32), (4, 4), 0),
        ((32, 32), (4, 4), 1),
        ((224, 224), (14, 14), 5),
        ((64, 96), (4, 6), 1),
        ((96, 32), (6, 2), 2),
        ((32, 48), (2, 3), 5),
        ((65, 97), (5, 7), 1),  # padded to whole patches of 16
        ((65, 97), (4, 6), 4),  # cut to whole patches
        ((8, 8), (1, 1), 0),
    ],
)
def test_tokens_return_to_their_grid(size, grid, prefix):
    h, w = grid
    tokens = torch.rand(3, prefix + h * w, 5, requires_grad=True)
    weight = torch.rand(tokens.shape) - 0.3
    weight[:, :prefix] = 1e6  # class and register tokens would drown the rest
    as_grid = tokens.detach()[:, prefix:].transpose(1, 2).unflatten(2, grid).requires_grad_()
    grid_weight = weight[:, prefix:].transpose(1, 2).unflatten(2, grid)
    maps = layercam((tokens * weight).sum(), [tokens], size)
    torch.testing.assert_close(maps, layercam((as_grid * grid_weight).sum(), [as_grid], size))


def test_tokens_that_form_no_grid_are_refused():
    tokens = torch.rand(2, 47, 4, requires_grad=True)
    with pytest.raises(ValueError, match="47 tokens form no grid over an image of 32 x 32"):
        layercam(tokens.sum(), [tokens], (32, 32))
