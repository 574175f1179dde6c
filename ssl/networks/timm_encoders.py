"""timm's networks as encoders, under timm's parameter names. timm is an optional package."""

import difflib
from types import ModuleType
from typing import Any

import torch
from torch import nn

PREFIX = "timm/"  # of their names
PRETRAINED = "pretrained"  # instead of a file: timm's own weights


def timm_encoder(name: str, image_size: int, mean: Any = None, std: Any = None, pretrained: bool = False) -> nn.Module:
    """A network of timm's without its classifier: images ``[N, 3, S, S]`` to features ``[N, F]``.

    Args:
        name: ``timm/NAME`` or ``timm/NAME.TAG``.
        image_size: S; networks of one size, such as ViTs, are built for it.
        mean, std: of the images; what timm says of the name (and tag) unless given.
        pretrained: with timm's own weights, from the hub's cache or the hub; else randomly initialised. Positions of
            another image size are resampled.

    Returns:
        timm's module, with the attributes of :class:`gradmix.ssl.networks.backbones.Encoder`.

    Raises:
        ValueError: timm is missing, has no such network, the network does not work at this image size, or its weights
            can't be had.
    """
    timm, own = import_timm(), check_timm(name)
    sized = {"img_size": image_size} if own.fixed_input_size else {}
    try:
        network = timm.create_model(name.removeprefix(PREFIX), pretrained=False, num_classes=0, **sized)
        network.num_features = _features(network, image_size)  # timm's own number is another one in some networks
    except Exception as error:  # each network has its own ways to refuse a size
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"encoder.name: {name} does not work with data.image_size={image_size} ({reason}); "
            f"timm's own size of it is {own.input_size[-1]}"
        ) from error
    if pretrained:
        network = _with_weights(timm, name, sized, network.num_features)
    network.constants = tuple(mean or own.mean), tuple(std or own.std)
    network.description = {"name": name, **dict(zip(("mean", "std"), network.constants, strict=True))}
    return network


def _with_weights(timm: ModuleType, name: str, sized: dict[str, int], num_features: int) -> Any:
    """The network again, with timm's own weights of it.

    Raises:
        ValueError: timm has none, or they can't be had.
    """
    own = check_timm(name)
    if not own.has_weights:
        raise ValueError(f"encoder.init: timm has no weights of {name}; timm.list_pretrained() names those it has")
    try:
        network = timm.create_model(name.removeprefix(PREFIX), pretrained=True, num_classes=0, **sized)
    except Exception as error:  # of the hub, the network, a file: without a common base
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        where = (
            f"the folder models--{own.hf_hub_id.replace('/', '--')} of another machine's cache"
            if own.hf_hub_id
            else "them"
        )
        raise ValueError(
            f"encoder.init: timm's own weights of {name} can't be had ({type(error).__name__}: {reason}); run this "
            f"where the hub can be reached, copy {where} into the hub's cache here (HF_HOME), or give a file instead "
            f"of {PRETRAINED}"
        ) from error
    network.num_features = num_features
    return network


def check_timm(name: str) -> Any:
    """What timm says of a network: its ``PretrainedCfg``.

    Raises:
        ValueError: timm is missing, or has no such network or tag; the message names near ones.
    """
    timm, (model, _, tag) = import_timm(), name.removeprefix(PREFIX).partition(".")
    if not timm.is_model(model):
        raise ValueError(f"encoder.name: timm has no {model!r}; {_near(model, timm.list_models())}")
    tags = timm.list_pretrained(f"{model}.*") if tag else []
    if tag and f"{model}.{tag}" not in tags:
        raise ValueError(f"encoder.name: timm's {model} has no tag {tag!r}; {_near(f'{model}.{tag}', tags)}")
    return timm.get_pretrained_cfg(name.removeprefix(PREFIX))


def own_image_size(name: str) -> int:
    """Side of the images that timm trained a network on."""
    return int(check_timm(name).input_size[-1])


def import_timm() -> ModuleType:
    """
    Raises:
        ValueError: timm is not installed.
    """
    try:
        import timm  # only here: it takes seconds, and need not be there
    except ImportError as error:
        raise ValueError("encoder.name: timm's networks need one more package, pip install timm") from error
    return timm


def _features(network: nn.Module, image_size: int) -> int:
    """F, by trying: the number of features of one black image."""
    with torch.no_grad():
        features = network.eval()(torch.zeros(1, 3, image_size, image_size))
    network.train()
    if features.ndim != 2:
        raise ValueError(f"it gives {list(features.shape)}, not one row of features per image")
    return features.shape[1]


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 3) or [other for other in names if name in other][:5]
    return f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
