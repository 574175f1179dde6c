"""A run's backbone as files for other programs: torchvision's or timm's weights, ONNX, torch.export."""

import logging
import warnings
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from gradmix.ssl.networks.backbones import Backbone, load_backbone
from gradmix.ssl.runs.files import write_atomically, write_tensors

FORMATS = {"safetensors": "backbone.safetensors", "onnx": "backbone.onnx", "torch_export": "backbone.pt2"}
ONNX_TORCH = "2.11"  # the exporter of 2.6 fails on BatchNorm, or fixes the batch size; none in between was tried


def export_backbone(run_dir: Path, formats: list[str], folder: Path) -> list[Path]:
    """Write the backbone in each of ``formats``; returns the files.

    - ``safetensors``: the weights under torchvision's names (``load_state_dict(..., strict=False)``; only ``fc`` is
      missing), or timm's (``create_model(..., num_classes=0, checkpoint_path=...)``; with ``img_size=S`` for a ViT).
      The network wants images with its mean and deviation removed: ImageNet's for torchvision's, timm's own for timm's.
    - ``onnx`` and ``torch_export``: the network, from ``images`` float32 ``[N, 3, S, S]`` in [0, 1], for any N, to
      ``features`` ``[N, F]``. Normalisation is inside.

    Raises:
        ValueError: unknown format, or a package that ONNX needs is missing.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"export: expected some of {', '.join(FORMATS)}, got {name!r}")
    backbone = load_backbone(run_dir)
    writers = {"safetensors": _safetensors, "onnx": _onnx, "torch_export": _torch_export}
    for name in formats:
        write_atomically(folder / FORMATS[name], partial(writers[name], backbone))
    return [folder / FORMATS[name] for name in formats]


def _safetensors(backbone: Backbone, path: Path) -> None:
    write_tensors(path, backbone.encoder.state_dict(), {"format": "pt"})


def _onnx(backbone: Backbone, path: Path) -> None:
    write_onnx(backbone, backbone.image_size, ["features"], path)


def write_onnx(
    model: nn.Module, side: int, outputs: list[str], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a module that takes ``images`` float32 ``[N, 3, side, side]``, any N, as ONNX.

    Raises:
        ValueError: a package that ONNX needs is missing, or too old.
    """
    if not find_spec("onnxscript"):  # what torch.onnx writes with
        raise ValueError("export: onnx needs two more packages, pip install onnx onnxscript")
    if torch.__version__ < ONNX_TORCH:
        raise ValueError(f"export: onnx needs torch {ONNX_TORCH} or newer, this is {torch.__version__}")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's own exporter
        program = torch.onnx.export(
            model,
            (_example(side),),
            input_names=["images"],
            output_names=outputs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=_any_batch(),
        )
        assert program is not None  # with dynamo
        program.model.metadata_props.update(metadata or {})
        program.save(path)


def _torch_export(backbone: Backbone, path: Path) -> None:
    program = torch.export.export(backbone, (_example(backbone.image_size),), dynamic_shapes=_any_batch())
    with open(path, "wb") as file:
        torch.export.save(program, file)


def _example(side: int) -> torch.Tensor:
    return torch.zeros(2, 3, side, side)


def _any_batch() -> dict[str, dict[int, torch.export.Dim]]:
    # The bound is for torch 2.6: it cannot rule out N = 2**63 - 1, its slices' "to the end", in a ViT.
    return {"images": {0: torch.export.Dim("N", max=2**31)}}
