"""GradMix in other people's training loops: half precision, accumulation, torch.compile, timm."""

import shutil

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import nn

from gradmix import GradMix, layercam
from gradmix.attribution import default_layers, record
from gradmix.ssl.losses import NTXentLoss


class Block(nn.Module):
    """Convolution, BatchNorm and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + self.shortcut(x))


class Encoder(nn.Module):
    """As small as a network with four stages and a projection head can be."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = Block(3, 8, 1), Block(8, 16)
        self.layer3, self.layer4 = Block(16, 32), Block(32, 64)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x):
        return self.head(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def encoder_and_views(rows: int = 12, size: int = 16, seed: int = 0):
    """Two views of smooth random images: pieces of the same picture, differently lit."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pictures = F.interpolate(torch.rand(rows // 2, 3, 4, 4), (size, size), mode="bicubic")
        other = pictures * 0.8 + 0.2 * torch.rand(rows // 2, 3, 1, 1) + 0.05 * torch.rand(rows // 2, 3, size, size)
        return Encoder(), torch.cat([pictures, other])


def step(encoder, mixer, views, temperature: float = 0.1):
    """One step of the README's loop up to backward(): the mixed batch and the loss."""
    ntxent = NTXentLoss(temperature)
    with mixer.watch(encoder):
        z = F.normalize(encoder(views).float(), dim=1)
    loss = ntxent(z)
    mixed = mixer(views, loss, torch.Generator().manual_seed(0))
    p = F.normalize(encoder(mixed.images).float(), dim=1)
    return mixed, loss + ntxent(z, p, mixed.kept)


def test_gradient_accumulation():
    """Two micro-batches: gradients and statistics are those of a loop that was handed the mixed images."""
    encoder, views = encoder_and_views()
    mixer, mixed = GradMix(), []
    for views_i in (views, 1 - views):
        mixed_i, loss = step(encoder, mixer, views_i)
        (loss / 2).backward()
        mixed.append(mixed_i)

    reference, _ = encoder_and_views()
    ntxent = NTXentLoss(0.1)
    for views_i, mixed_i in zip((views, 1 - views), mixed, strict=True):
        z = F.normalize(reference(views_i), dim=1)
        p = F.normalize(reference(mixed_i.images), dim=1)
        ((ntxent(z) + ntxent(z, p, mixed_i.kept)) / 2).backward()

    for ours, theirs in zip(encoder.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(encoder.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(params=[False])
def donated_buffers(request):
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=request.param):
        yield


@pytest.mark.parametrize(
    ("backend", "where"), [("aot_eager", "wrapped"), ("aot_eager", "in place"), ("inductor", "wrapped")]
)
def test_compiled_stage_by_stage(backend, where, donated_buffers):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    eager, views = encoder_and_views()
    compiled, _ = encoder_and_views()
    stages = ["layer4"] if backend == "inductor" else ["layer1", "layer2", "layer3", "layer4"]
    for name in stages:
        if where == "wrapped":
            setattr(compiled, name, torch.compile(getattr(compiled, name), backend=backend))
        else:
            getattr(compiled, name).compile(backend=backend)
    if where == "in place":
        compiled.eval()
        compiled(views)  # compiled before there was anything to watch
        compiled.train()
    for _ in range(2):
        expected, loss = step(eager, GradMix(2), views)
        loss.backward()
        mixed, loss = step(compiled, GradMix(2), views)
        loss.backward()
        torch.testing.assert_close(mixed.attribution, expected.attribution, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("donated_buffers", [True], indirect=True)
def test_stages_before_the_watched_ones_compile_without_any_setting(donated_buffers):
    eager, views = encoder_and_views()
    compiled, _ = encoder_and_views()
    for name in ("layer1", "layer2"):
        getattr(compiled, name).compile(backend="aot_eager")
    gradients = []
    for encoder in (eager, compiled):
        mixed, loss = step(encoder, GradMix(), views)
        loss.backward()
        gradients.append([mixed.attribution, *(p.grad for p in encoder.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("donated_buffers", [True], indirect=True)
def test_compiled_with_donated_buffers_says_so(donated_buffers):
    encoder, views = encoder_and_views()
    for name in ("layer2", "layer3", "layer4"):
        setattr(encoder, name, torch.compile(getattr(encoder, name), backend="aot_eager"))
    with pytest.raises(ValueError, match=r"set torch\._functorch\.config\.donated_buffer = False"):
        step(encoder, GradMix(), views)


def test_compiled_as_a_whole_says_so(donated_buffers):
    encoder, views = encoder_and_views()
    with pytest.raises(ValueError, match="compile stage by stage"):
        step(torch.compile(encoder, backend="aot_eager"), GradMix(), views)


def attribution(encoder, views, dtype=None, factor: float = 1.0):
    """Maps of the default stages for ``factor`` times the loss; under autocast if a dtype is given."""
    activations: list[torch.Tensor] = []
    with record(encoder, default_layers(encoder), activations):
        with torch.autocast("cpu", dtype or torch.float16, enabled=dtype is not None):
            z = encoder(views)
        loss = NTXentLoss(0.05)(F.normalize(z.float(), dim=1)) * factor
    assert dtype is None or all(a.dtype == dtype for a in activations)
    return layercam(loss, activations, views.shape[2:])


@pytest.fixture(scope="module")
def four_thousand():
    """Encoder, views [4096, 3, 12, 12], and their maps in fp32."""
    encoder, views = encoder_and_views(4096, 12)
    return encoder, views, attribution(encoder, views)


class Fp16Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().float()


@pytest.mark.parametrize("factor", [2.0**-10, 1.0, 2.0**10])
def test_fp16_gradients_of_4096_rows_give_the_same_maps(four_thousand, factor):
    """The gradient rounded to fp16 after every layer, its range included; with room to both sides."""
    encoder, views, expected = four_thousand
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: Fp16Gradient.apply(output))
        for module in encoder.modules()
    ]
    maps = attribution(encoder, views, factor=factor)
    for hook in hooks:
        hook.remove()
    assert (maps - expected).abs().max() < 1e-2


def test_fp16_autocast_of_4096_rows_gives_the_same_maps(four_thousand):
    encoder, views, expected = four_thousand
    maps = attribution(encoder, views, torch.float16)
    # Single pixels move further, where the forward pass, rounded to fp16, has an activation on the other side of 0.
    per_image = (maps - expected).abs().mean((1, 2))
    assert per_image.mean() < 1e-2 / 3
    assert per_image.quantile(0.9) < 1e-2
    assert (maps.flatten(1).argmax(1) == expected.flatten(1).argmax(1)).float().mean() > 0.97


def test_fp16_step_with_a_gradient_scaler():
    gradients = []
    for half in (False, True):
        encoder, views = encoder_and_views(64)
        scaler = torch.amp.GradScaler("cpu", enabled=half)
        optimizer = torch.optim.SGD(encoder.parameters())
        with torch.autocast("cpu", torch.float16, enabled=half):
            _, loss = step(encoder, GradMix(), views)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_whole_step_inside_autocast(dtype):
    encoder, views = encoder_and_views(32)
    with torch.autocast("cpu", dtype):
        mixed, loss = step(encoder, GradMix(), views)
        outside = attribution(encoder, views, dtype)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    assert mixed.images.dtype == views.dtype
    assert torch.isfinite(outside).all()


def vit(**options) -> nn.Module:
    models = pytest.importorskip("timm.models.vision_transformer")
    options = {
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 0,
    } | options
    return models.VisionTransformer(**options)


def convnext() -> nn.Module:
    models = pytest.importorskip("timm.models.convnext")
    return models.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=0)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    encoder = VisionTransformer(64, 16, num_layers=4, num_heads=2, hidden_dim=24, mlp_dim=48)
    encoder.heads = nn.Identity()
    return encoder


def torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    sizes = [(8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1)]
    encoder = ConvNeXt([CNBlockConfig(*size) for size in sizes])
    encoder.classifier = nn.Flatten()
    return encoder


BLOCKS = ["blocks.1.norm1", "blocks.2.norm1", "blocks.3.norm1"]
FAMILIES = {
    "convnext": (convnext, (64, 64), ["stages.1", "stages.2", "stages.3"]),
    "vit": (vit, (64, 64), BLOCKS),
    "vit, mean of the patches": (lambda: vit(class_token=False, global_pool="avg"), (64, 64), BLOCKS),
    "vit, 4 registers": (lambda: vit(reg_tokens=4), (64, 64), BLOCKS),
    "vit, wide": (lambda: vit(img_size=(64, 96)), (64, 96), BLOCKS),
    "torchvision's convnext": (torchvision_convnext, (64, 64), ["features.3", "features.5", "features.7"]),
    "torchvision's vit": (torchvision_vit, (64, 64), [f"encoder.layers.encoder_layer_{i}.ln_1" for i in (1, 2, 3)]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_encoders(family):
    build, size, layers = FAMILIES[family]
    torch.manual_seed(0)
    encoder, views = build(), torch.rand(6, 3, *size)
    assert default_layers(encoder) == layers
    mixer, activations = GradMix(), []
    with mixer.watch(encoder), record(encoder, layers, activations):
        loss = NTXentLoss(0.1)(F.normalize(encoder(views), dim=1))
    gradients = torch.autograd.grad(loss, activations, retain_graph=True)
    mixed = mixer(views, loss)
    assert mixed.attribution.shape == (6, *size)

    expected = torch.zeros(6, *size)
    patches = size[0] // 16 * (size[1] // 16)
    for activation, gradient in zip(activations, gradients, strict=True):
        relevance = activation.detach() * gradient.clamp(min=0)
        if relevance.ndim == 3:  # [N, class token, registers, patches row by row, C]
            grid = relevance[:, -patches:].sum(2).unflatten(1, (size[0] // 16, size[1] // 16))
        else:
            grid = relevance.sum(1)
        low, high = grid.amin((1, 2), True), grid.amax((1, 2), True)
        assert (high > low).all()  # every layer says something, the last one too
        grid = ((grid - low) / (high - low))[:, None]
        expected += F.interpolate(grid, size, mode="bilinear")[:, 0] / len(layers)
    torch.testing.assert_close(mixed.attribution, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_channels_last_networks(size):
    """timm's MambaOut hands ``[N, h, w, C]`` from stage to stage: the maps are those of the same values transposed."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder, views, activations = timm.create_model("test_mambaout", num_classes=0), torch.rand(6, 3, *size), []
    with GradMix().watch(encoder), record(encoder, ["stages.1", "stages.2", "stages.3"], activations):
        loss = NTXentLoss(0.1)(F.normalize(encoder(views), dim=1))
    maps = layercam(loss, activations, size)
    expected = torch.zeros(6, *size)
    for activation, gradient in zip(activations, torch.autograd.grad(loss, activations), strict=True):
        height, width = activation.shape[1:3]
        assert height * size[1] == width * size[0] and activation.shape[3] > width
        grid = (activation.detach() * gradient.clamp(min=0)).sum(3)
        low, high = grid.amin((1, 2), True), grid.amax((1, 2), True)
        expected += F.interpolate(((grid - low) / (high - low))[:, None], size, mode="bilinear")[:, 0] / 3
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size"), [((2, 8, 8, 8), (32, 32)), ((2, 4, 4, 6), (33, 47)), ((2, 8, 8, 4), (32, 16))]
)
def test_channels_first_wherever_the_shape_allows_it(shape, size):
    """Also when the channels are as many as the rows, and when the stride has rounded the sides."""
    activation = torch.rand(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(activation.pow(2).sum(), activation)
    grid = (activation.detach() * gradient).sum(1)
    low, high = grid.amin((1, 2), True), grid.amax((1, 2), True)
    expected = F.interpolate(((grid - low) / (high - low))[:, None], size, mode="bilinear")[:, 0]
    torch.testing.assert_close(layercam(activation.pow(2).sum(), [activation], size), expected)


def test_default_layers_are_what_timm_says_of_other_networks():
    timm = pytest.importorskip("timm")
    for name in ("test_efficientnet", "regnetx_002", "densenet121"):
        network = timm.create_model(name)
        stages = [stage["module"] for stage in network.feature_info]
        assert default_layers(network) == stages[-3:] and default_layers(network, 2) == stages[-2:]


def test_wrong_layers_of_a_vit_name_the_right_ones():
    with pytest.raises(ValueError, match=r"did you mean 'blocks\.3'\? It has: .*blocks, blocks\.0, blocks\.1"):
        GradMix(["block.3"]).watch(vit()).__enter__()
    with pytest.raises(ValueError, match=r"did you mean 'stages\.\d'\? It has: .*stages\.0, stages\.1"):
        GradMix(["stage.1"]).watch(convnext()).__enter__()
