"""Where in an image does a loss come from: LayerCAM on the gradient of a contrastive loss.

LayerCAM: Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", TIP 2021.
On a contrastive loss, for mixing: GradMix, arXiv 2505.12803.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VIT = {"blocks": "norm1", "layers": "ln_1"}  # blocks, and the norm each begins with: timm's, torchvision's encoder's
EVIDENCE = {"loss": 1.0, "agreement": -1.0}  # the sign of the gradient that counts as evidence


def layercam(loss: Tensor, activations: Sequence[Tensor], size: tuple[int, int], evidence: str = "loss") -> Tensor:
    """Attribution maps of a scalar loss, one per row of the activations, averaged over layers.

    The gradient is taken with ``torch.autograd.grad`` on the activations alone and the graph is kept: no
    ``.grad`` is written, no second forward pass runs, and ``loss.backward()`` works afterwards as if nothing
    had happened.

    Args:
        loss: scalar that depends on every tensor in ``activations``; not yet multiplied by a gradient scaler.
        activations: one tensor per layer, ``[N, C, h, w]``, or ``[N, T, C]`` from a transformer (the tokens are
            put back on their grid; class and register tokens in front are left out), or ``[N, h, w, C]``, known by
            the image's proportions.
        size: ``(H, W)`` of the images, to which each map is resized bilinearly (``align_corners=False``).
        evidence: ``"loss"`` keeps what raises the loss, ``"agreement"`` what lowers it (the views' common ground).

    Returns:
        ``[N, H, W]``, float32, in [0, 1]: per layer and image, ``sum_c A * relu(s * dL/dA)``, min-max scaled
        (a flat map becomes 0), resized, then the mean over layers. Detached.

    Raises:
        ValueError: no activations, an unknown ``evidence``, or a loss that does not depend on an activation.
    """
    activations = tuple(activations)  # a copy: activation checkpointing may record again while the gradient is taken
    if not activations:
        raise ValueError("activations: got none; run the forward pass inside `with mixer.watch(encoder):`")
    if evidence not in EVIDENCE:
        raise ValueError(f"evidence: expected one of {', '.join(EVIDENCE)}, got {evidence!r}")
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss: expected the loss's tensor, whose graph is asked, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected a scalar, got shape {tuple(loss.shape)}")
    # Autocast off: gradients then keep the precision of the forward pass, wherever the caller stands.
    with torch.no_grad(), torch.autocast(loss.device.type, enabled=False):
        maps = []
        for activation, gradient in zip(activations, _gradients(loss, activations), strict=True):
            activation, gradient = _at_least_float32(activation), _at_least_float32(gradient)
            relevance = activation * (EVIDENCE[evidence] * gradient).clamp(min=0)
            if relevance.ndim == 3:
                cam = _tokens_to_grid(relevance.sum(2), size)  # [N, h, w]
            else:
                cam = relevance.sum(3 if _channels_last(relevance, size) else 1)
            cam = F.interpolate(_min_max(cam)[:, None], size=size, mode="bilinear", align_corners=False)
            maps.append(cam[:, 0].float())
        return torch.stack(maps).mean(0)


def _gradients(loss: Tensor, activations: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``dL/dA`` of every activation, times a constant."""
    # The loss is a mean over rows, so its gradient shrinks with the batch until fp16 flushes it to zero. A constant
    # factor brings it back, and the maps' min-max cancels it: exactly, because it is a power of two.
    rows = activations[0].shape[0]
    factor = torch.full_like(loss, 2.0 ** min((rows - 1).bit_length(), 15))  # 2 ** 16 would overflow fp16
    try:
        return torch.autograd.grad(loss, activations, grad_outputs=factor, retain_graph=True)
    except RuntimeError as error:
        reason = str(error)
        if "donated buffer" in reason:
            raise ValueError(
                "loss: its graph was compiled with donated buffers and can be walked only once; set "
                "torch._functorch.config.donated_buffer = False before the first compiled forward pass"
            ) from error
        if "second time" in reason:
            raise ValueError("loss: its graph is gone; call the mixer before backward()") from error
        if "used in the graph" in reason or "does not require grad" in reason:
            raise ValueError(
                "loss: it does not depend on the watched activations; compute it from the same forward pass, with "
                "gradients (a frozen network has none), and watch layers that lie before it (torch.compile: compile "
                "stage by stage)"
            ) from error
        raise


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _min_max(cam: Tensor) -> Tensor:
    """Scale each map of ``[N, h, w]`` to [0, 1]; flat or non-finite maps become 0."""
    low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    spread = high - low
    flat = ~((spread > 0) & spread.isfinite())
    return ((cam - low) / spread.masked_fill(flat, 1)).masked_fill(flat, 0)


def _channels_last(activation: Tensor, size: tuple[int, int]) -> bool:
    """Whether only the second and third of its four dimensions have the image's proportions, up to rounding."""
    (height, width), (_, a, b, c) = size, activation.shape
    fits = [abs(h / height - w / width) <= 1 / height + 1 / width for h, w in ((b, c), (a, b))]
    return fits == [False, True]


def _tokens_to_grid(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """``[N, T]`` to ``[N, h, w]``; class and register tokens in front are dropped."""
    h, w = _grid(tokens.shape[1], size)
    return tokens[:, tokens.shape[1] - h * w :].unflatten(1, (h, w))


@cache
def _grid(tokens: int, size: tuple[int, int], most_extra: int = 8) -> tuple[int, int]:
    """The largest grid of square patches on the image that leaves up to ``most_extra`` tokens over."""
    height, width = size
    exact = [(height // p, width // p) for p in range(1, max(size) + 1) if height % p == width % p == 0]
    cut = [(height // p, width // p) for p in range(1, max(size) + 1)]
    padded = [(-(-height // p), -(-width // p)) for p in range(1, max(size) + 1)]
    for grids in (exact, cut + padded):
        fitting = [(h * w, h, w) for h, w in grids if max(0, tokens - most_extra - 1) < h * w <= tokens]
        if fitting:
            return max(fitting)[1:]
    raise ValueError(f"activations: {tokens} tokens form no grid over an image of {height} x {width}")


def default_layers(module: nn.Module, count: int = 3) -> list[str]:
    """Names of the last ``count`` stages of a ResNet, ConvNeXt, ViT or another network of timm's.

    It may lie anywhere inside ``module``. Of a ViT's blocks it is where they read the tokens.

    Raises:
        ValueError: no known family inside, or it has fewer stages; the message lists the submodules to choose from.
    """
    for path, submodule in module.named_modules():
        stages = find_stages(submodule)
        if len(stages) >= count:
            watched = [_where_it_reads(submodule, stage) for stage in stages[-count:]]
            return [f"{path}.{name}" if path else name for name in watched]
    raise ValueError(
        f"layers: no default for the last {count} stages of {type(module).__name__}; "
        f"name some of its submodules: {_choices(module)}"
    )


def find_stages(module: nn.Module) -> list[str]:
    """Names of the stages of a known family, shallow to deep; empty for any other module."""
    children = dict(module.named_children())
    if "reroll" in children:  # Hiera, whose tokens do not stand row by row
        return []
    if "layer1" in children and "layer4" in children:  # ResNet of torchvision and timm
        return ["layer1", "layer2", "layer3", "layer4"]
    if "stages" in children:  # ConvNeXt of timm, and its like
        return [f"stages.{name}" for name, _ in children["stages"].named_children()]
    parts = list(children["features"].children()) if "features" in children else []
    if len(parts) == 8 and all(hasattr(block, "layer_scale") for part in parts[1::2] for block in part.children()):
        return [f"features.{index}" for index in (1, 3, 5, 7)]  # ConvNeXt of torchvision; the others lead to them
    for blocks, norm in VIT.items():
        if blocks in children:
            named = [f"{blocks}.{name}" for name, block in children[blocks].named_children() if hasattr(block, norm)]
            if named:
                return named
    info = getattr(module, "feature_info", None)  # what timm's other networks say of themselves
    named = [stage["module"] for stage in info] if isinstance(info, list) else []
    return named if set(named) <= dict(module.named_modules()).keys() and len(set(named)) == len(named) else []


def _where_it_reads(module: nn.Module, stage: str) -> str:
    """In a ViT that reads its class token, nothing flows back to the patch tokens that leave the last block."""
    block = module.get_submodule(stage)
    return next((f"{stage}.{norm}" for norm in VIT.values() if hasattr(block, norm)), stage)


def _choices(module: nn.Module) -> str:
    """Submodules down to depth two: enough to find the stages, short enough to read."""
    return ", ".join(name for name, _ in module.named_modules() if name and name.count(".") < 2)


@contextmanager
def record(module: nn.Module, layers: Sequence[str], into: list[Tensor]) -> Iterator[None]:
    """While open, a forward pass of ``module`` puts the outputs of the submodules ``layers`` into ``into``.

    A second forward pass replaces the first one's. The hooks are gone afterwards, also after an exception.

    Raises:
        ValueError: a name in ``layers`` that ``module`` does not have (the message lists those it has), or a layer
            that the forward pass does not call, or that gives anything but a tensor of three or four dimensions.
    """
    known = dict(module.named_modules())
    for name in layers:
        if name not in known or not name:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"layers: {type(module).__name__} has no submodule {name!r}{hint} It has: {_choices(module)}"
            )
    seen: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim not in (3, 4):
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"layers: {name!r} gives {shape}, not [N, C, h, w] or [N, T, C]; name others")
            seen[name] = output
            into[:] = [seen[layer] for layer in layers if layer in seen]

        return hook

    def complete(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        if missing := [name for name in layers if name not in seen]:
            raise ValueError(
                f"layers: {type(module).__name__} does not call {missing[0]!r} in its forward pass; name others. "
                f"It has: {_choices(module)}"
            )

    handles = [known[name].register_forward_hook(hook_for(name)) for name in layers]
    handles.append(module.register_forward_hook(complete))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """While open, forward passes leave the buffers of ``module`` (BatchNorm's statistics) as they are.

    Activation checkpointing repeats forward passes while a gradient is taken; that of the attribution must not
    count as one more training step. Costs nothing where nothing is repeated.
    """
    originals: dict[nn.Module, dict[str, Tensor | None]] = {}

    def use_copies(submodule: nn.Module, _inputs: Any) -> None:
        if submodule not in originals:
            originals[submodule] = dict(submodule._buffers)
            for name, buffer in submodule.named_buffers(recurse=False):
                submodule._buffers[name] = buffer.clone()

    handles = [m.register_forward_pre_hook(use_copies) for m in module.modules() if m._buffers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for submodule, buffers in originals.items():
            submodule._buffers.update(buffers)
