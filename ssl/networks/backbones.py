"""Encoders: torchvision's ResNets at any width, with SimCLR's stem for small images, and timm's networks."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor, nn
from torchvision.models import resnet

from gradmix.ssl.checks import check_values
from gradmix.ssl.config import FITS, EncoderConfig
from gradmix.ssl.data.images import IMAGENET, Constants, decode, normalize, to_square
from gradmix.ssl.keys import Key
from gradmix.ssl.networks.timm_encoders import PREFIX, PRETRAINED, check_timm, timm_encoder
from gradmix.ssl.networks.weights import find_backbone, load_found, load_weights
from gradmix.ssl.processes import is_first
from gradmix.ssl.runs.documents import parse_json
from gradmix.ssl.runs.tensors import read_header

RESNETS: dict[str, tuple[type[resnet.BasicBlock | resnet.Bottleneck], list[int]]] = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3]),
}
STEMS = {  # first convolution: kernel, stride, padding; whether a max-pool follows
    "small": (3, 1, 1, False),  # SimCLR's for CIFAR
    "padded": (3, 1, 2, False),  # solo-learn's for CIFAR
    "imagenet": (7, 2, 3, True),
}
SMALL_IMAGE = 64  # up to this side, the ImageNet stem would throw away most of the picture


class Encoder(nn.Module):
    """What a module has to have that makes features ``[N, F]`` of normalised images ``[N, 3, S, S]``.

    No module is asked whether it is a subclass; the class stands here for type checkers and readers.

    Attributes:
        num_features: F.
        constants: mean and deviation per channel that :func:`gradmix.ssl.data.images.normalize` removes for it.
        description: what :func:`build_encoder` makes it again from, beside the image size.
    """

    num_features: int
    constants: Constants
    description: dict[str, Any]


class ResNet(resnet.ResNet):
    """torchvision's ResNet without its classifier, under torchvision's parameter names; an :class:`Encoder`.

    Args:
        name: key of ``RESNETS``.
        width: channels of the first stage; 64 is the standard network. F = 8 * width (32 * width for bottlenecks).
        stem: key of ``STEMS``.
    """

    constants = IMAGENET

    def __init__(self, name: str, width: int = 64, stem: str = "imagenet"):
        block, depths = RESNETS[name]
        super().__init__(block, depths)
        if width != 64:  # torchvision has no such argument, so its stages are built again at the other width
            self.inplanes = width
            self.bn1 = nn.BatchNorm2d(width)
            self.layer1 = self._make_layer(block, width, depths[0])
            self.layer2 = self._make_layer(block, 2 * width, depths[1], stride=2)
            self.layer3 = self._make_layer(block, 4 * width, depths[2], stride=2)
            self.layer4 = self._make_layer(block, 8 * width, depths[3], stride=2)
        kernel, stride, padding, pool = STEMS[stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False)
        if not pool:
            self.maxpool = nn.Identity()
        self.num_features = 8 * width * block.expansion
        self.description = {"name": name, "width": width, "stem": stem}
        self.fc = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def build_encoder(description: dict[str, Any], image_size: int) -> Encoder:
    """A freshly initialised encoder from its ``description``."""
    if description["name"].startswith(PREFIX):
        return cast(Encoder, timm_encoder(**description, image_size=image_size))
    return ResNet(**description)


def build_backbone(config: EncoderConfig, image_size: int) -> Encoder:
    """The encoder that a config asks for, freshly initialised, or from ``config.init``.

    Raises:
        ValueError: unknown encoder or stem, or weights that do not fit.
    """
    check_encoder(config)
    if config.init == PRETRAINED:
        if not config.name.startswith(PREFIX) or config.part is not None:
            wrong = "encoder.part: chooses among the networks of a file" if config.part else f"encoder: {config.name}"
            raise ValueError(f"{wrong}; only timm's networks have weights of their own, encoder={PREFIX}NAME")
        return cast(Encoder, timm_encoder(config.name, image_size, pretrained=True))
    if config.init is not None:
        path = Path(config.init).expanduser()
        return read_backbone(path, config.name, config.width, config.stem, image_size, config.part)
    if config.part is not None:
        raise ValueError("encoder.part: chooses among the networks of encoder.init=FILE, which is missing")
    if config.name.startswith(PREFIX):
        return build_encoder({"name": config.name}, image_size)
    stem = config.stem or ("small" if image_size <= SMALL_IMAGE else "imagenet")
    return build_encoder({"name": config.name, "width": config.width or 64, "stem": stem}, image_size)


def check_encoder(config: EncoderConfig) -> None:
    """
    Raises:
        ValueError: unknown encoder, stem or width; or timm is missing.
    """
    if config.name.startswith(PREFIX):
        for key in ("width", "stem"):
            if getattr(config, key) is not None:
                raise ValueError(f"encoder.{key}: timm's networks have none to set; encoder.{key}=null leaves it out")
        check_timm(config.name)
        return
    if config.name not in RESNETS:
        raise ValueError(f"encoder.name: expected one of {', '.join(RESNETS)}, {PREFIX}NAME, got {config.name!r}")
    if config.stem not in (*STEMS, None):
        raise ValueError(f"encoder.stem: expected {', '.join(STEMS)} or null, got {config.stem!r}")
    check_values(config, "encoder.")


def read_backbone(
    path: Path,
    name: str,
    width: int | None = None,
    stem: str | None = None,
    image_size: int = 224,
    part: str | None = None,
) -> Encoder:
    """An encoder with weights trained anywhere; prints what was matched.

    Args:
        width, stem: of a ResNet; None: read off the first convolution.
        image_size: S, for a network of timm's.
        part: of a file with several networks, a word that stands before the names of the one to take.

    Raises:
        ValueError: unreadable weights, or too few of them match the encoder.
    """
    weights = load_weights(path)
    if name.startswith(PREFIX):
        backbone = build_encoder({"name": name}, image_size)
        found = find_backbone(weights, list(backbone.state_dict()), part)
        load_found(backbone, found, path, "encoder.name and data.image_size")
        mean, std = backbone.constants
        if is_first():
            print(f"{path}: {found}; images with mean {mean} and deviation {std} removed, as timm has it")
        return backbone
    found = find_backbone(weights, list(ResNet(name, 1).state_dict()), part)
    conv1 = found.tensors.get("conv1.weight")
    if conv1 is not None and conv1.ndim == 4:
        width = width or conv1.shape[0]
        stem = stem or ("small" if conv1.shape[2] == 3 else "imagenet")
    backbone = ResNet(name, width or 64, stem or "imagenet")
    load_found(backbone, found, path, "encoder.name and encoder.width")
    if is_first():
        print(f"{path}: {found}")
    return backbone


class Backbone(nn.Module):
    """A pretrained backbone with its transform, as :func:`gradmix.load` returns it.

    Attributes:
        image_size: side of the square images it was trained on.
        fit: how an image becomes such a square: crop, pad or squash.
        num_features: F.
    """

    def __init__(self, encoder: Encoder, image_size: int, fit: str = "crop"):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.image_size, self.fit = image_size, fit
        self.num_features = encoder.num_features
        self.eval()

    def transform(self, image: Image | str | Path | np.ndarray) -> Tensor:
        """A PIL image, an array ``[H, W]`` or ``[H, W, 3]`` uint8, or a path, to ``[3, S, S]`` uint8, as in training.

        Raises:
            ValueError: a file that can't be read, or an array of another shape or type.
        """
        if isinstance(image, str | Path):
            return decode(image, self.image_size, self.fit)
        if isinstance(image, np.ndarray):
            grey_or_colour = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
            if image.dtype != np.uint8 or not grey_or_colour or not image.size:
                raise ValueError(f"image: expected [H, W] or [H, W, 3] uint8, got {[*image.shape]} {image.dtype}")
            image = fromarray(image)
        return to_square(image, self.image_size, self.fit)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` uint8, or float in [0, 1], to features ``[N, F]``."""
        return self.encoder(normalize(images, self.encoder.constants))


def backbone_metadata(encoder: Encoder, image_size: int, fit: str = "crop") -> dict[str, str]:
    """What a weights file must say of itself to be rebuilt; goes into its safetensors header."""
    return {"gradmix": json.dumps({"encoder": encoder.description, "image_size": image_size, "fit": fit})}


def load_backbone(run: str | Path) -> Backbone:
    """The pretrained backbone of a run's folder, or of a detector's, ready for features.

    Args:
        run: path of a run (it holds ``backbone.safetensors``) or of its ``detector/`` folder.

    Returns:
        A module in eval mode: ``model(images)`` takes float images ``[N, 3, H, W]`` in [0, 1] or uint8 and gives
        features ``[N, F]``; ``model.transform(image)`` turns a PIL image, an array or a path into such an image.

    Raises:
        ValueError: no backbone there, or not one of ours.
    """
    path = Path(run).expanduser()
    path = path / "backbone.safetensors" if path.is_dir() else path
    header = read_header(path)
    if header.gradmix is None:
        raise ValueError(f"{path}: does not say which encoder it belongs to; it was not written by gradmix-pretrain")
    about = parse_json(header.gradmix, Header, f"{path}: header")
    try:
        described = {key: value for key, value in asdict(about.encoder).items() if value is not None}
        check_encoder(EncoderConfig(about.encoder.name, about.encoder.width, about.encoder.stem))
        if about.encoder.name.startswith(PREFIX):
            for name in ("mean", "std"):
                if len(described.get(name, ())) != 3:
                    raise ValueError(f"{name}: expected one number for each of three channels")
        else:
            if {"mean", "std"} & set(described):
                raise ValueError(f"encoder: {about.encoder.name} has no mean and std of its own")
            with torch.device("meta"):  # nothing is allocated before the file is known to fill it
                check_same_shapes(build_encoder(described, about.image_size), header.shapes)
    except ValueError as error:
        raise ValueError(f"{path}: header: {error}") from error
    encoder = build_encoder(described, about.image_size)
    weights = load_weights(path)
    try:
        check_same_shapes(encoder, header.shapes)
    except ValueError as error:
        raise ValueError(f"{path}: header: {error}") from error
    wrong = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]}: non-finite values")
    encoder.load_state_dict(weights)
    return Backbone(encoder, about.image_size, about.fit)


@dataclass
class Description:
    """An encoder's ``description``."""

    name: str
    width: Annotated[int, Key(at_least=1, at_most=2**14)] | None = None
    stem: str | None = None
    mean: list[float] | None = None
    std: list[Annotated[float, Key(above=0)]] | None = None


@dataclass
class Header:
    """What :func:`backbone_metadata` writes."""

    encoder: Description
    image_size: Annotated[int, Key(at_least=1, at_most=4096)]
    fit: Annotated[str, Key(choices=FITS)] = "crop"  # older files don't say


def check_same_shapes(encoder: Encoder, shapes: dict[str, list[int]]) -> None:
    """
    Raises:
        ValueError: the tensors of a file are not the encoder's, by name and shape.
    """
    ours = {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()}
    for name in sorted({*ours, *shapes}):
        if ours.get(name) != shapes.get(name):
            raise ValueError(f"the encoder's {name!a:.60} has shape {ours.get(name)}, the file's {shapes.get(name)}")
