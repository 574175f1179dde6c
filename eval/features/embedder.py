"""Whatever network is asked for, ready to embed images: of a run, of a checkpoint trained anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmix.eval.config import EmbedConfig
from gradmix.eval.features.extraction import Model
from gradmix.ssl.config import EncoderConfig
from gradmix.ssl.data.sizes import sample_sizes, usual_image_size
from gradmix.ssl.machine import pick_device
from gradmix.ssl.networks.backbones import Backbone, build_backbone
from gradmix.ssl.networks.timm_encoders import PREFIX, PRETRAINED, own_image_size


@dataclass(frozen=True)
class Embedder:
    """A frozen network, and its projection head where it has one.

    Attributes:
        widths: F of the features, and D of the projections (0 without a head).
    """

    backbone: Backbone
    head: nn.Module | None
    widths: tuple[int, int]
    device: str

    @torch.inference_mode()
    def look(self, images: Tensor) -> Tensor:
        """``[n, 3, S, S]`` uint8 to features and L2-normalised projections side by side, ``[n, F + D]`` on the CPU."""
        features = self.backbone(images.to(self.device)).float()
        parts = [features] if self.head is None else [features, F.normalize(self.head(features), dim=1)]
        return torch.cat(parts, dim=1).cpu()

    def decode(self, image: Any) -> Tensor | str:
        """A file, PIL image or array to ``[3, S, S]`` uint8, or to the reason why it can't be read."""
        try:
            return self.backbone.transform(image)
        except ValueError as error:
            return str(error)


def find_embedder(config: EmbedConfig, files: Sequence[str]) -> Embedder:
    """
    Args:
        files: what is to be embedded; the image size of a checkpoint follows them, unless it is given.

    Raises:
        ValueError: no network, or two, are asked for; or it can't be had.
    """
    device = pick_device(config.device)
    if (config.run is None) == (config.checkpoint is None):
        raise ValueError("run: missing; give run=DIR, or checkpoint=FILE with encoder=NAME")
    if config.run is not None:
        folder = Path(config.run).expanduser()
        if not (folder / "backbone.safetensors").is_file():
            raise ValueError(
                f"run: {folder} is no finished run's folder and no detector's, backbone.safetensors is missing"
            )
        model = Model(folder, device)
        return Embedder(
            model.backbone, model.head, (model.widths["features"], model.widths.get("projections", 0)), device
        )
    assert config.checkpoint is not None
    asked = config.encoder
    if not asked.name:
        raise ValueError("encoder: missing; checkpoint= needs it, encoder=NAME")
    if config.image_size is None and config.checkpoint == PRETRAINED and asked.name.startswith(PREFIX):
        size = own_image_size(asked.name)
    else:
        size = config.image_size or usual_image_size(sample_sizes(files))
    weights = str(Path(config.checkpoint).expanduser())
    encoder = build_backbone(EncoderConfig(asked.name, asked.width, asked.stem, weights, asked.part), size)
    return Embedder(Backbone(encoder, size, config.fit).to(device), None, (encoder.num_features, 0), device)
