"""Features of a frozen network, extracted once."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from gradmix.ssl.backbones import Backbone, load_backbone
from gradmix.ssl.images import ImageSet
from gradmix.ssl.limits import usable_cpus
from gradmix.ssl.weights import load_weights


class Model:
    """A run's frozen backbone, and its projection head where it has one.

    Args:
        run_dir: folder with ``backbone.safetensors`` and ``head.safetensors``.
    """

    def __init__(self, run_dir: Path, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.backbone: Backbone = load_backbone(run_dir).to(device)
        self.head: nn.Module | None = None
        if not (run_dir / "head.safetensors").is_file():  # a checkpoint from elsewhere
            return
        weights = load_weights(run_dir / "head.safetensors")
        width, out = weights["layers.0.weight"].shape[0], weights["layers.2.weight"].shape[0]
        head = nn.Sequential(nn.Linear(self.backbone.num_features, width), nn.ReLU(), nn.Linear(width, out))
        head.load_state_dict({name.removeprefix("layers."): value for name, value in weights.items()})
        self.head = head.eval().requires_grad_(False).to(device)

    def extract(self, images: ImageSet, workers: int = 0, progress: bool = False) -> dict[str, Tensor]:
        """``features`` [N, F], ``projections`` [N, D] (L2-normalised) and ``labels`` [N], on the CPU, in order."""
        found = extract(self.backbone, images, self.device, workers, progress)
        if self.head is None:
            return {"features": found, "labels": images.labels.clone()}
        with torch.inference_mode():
            parts = [F.normalize(self.head(part.to(self.device)), dim=1).cpu() for part in found.split(4096)]
        return {"features": found, "projections": torch.cat(parts), "labels": images.labels.clone()}


@torch.inference_mode()
def extract(
    backbone: nn.Module, images: ImageSet, device: torch.device, workers: int = 0, progress: bool = False
) -> Tensor:
    """Features ``[N, F]`` float32 on the CPU, in the order of ``images``.

    Args:
        backbone: uint8 images ``[n, 3, S, S]`` to features, in eval mode.
        workers: decoder processes for images that are still files.
    """
    workers = min(workers, usable_cpus()) if images.images is None else 0
    loader = DataLoader(images, batch_size=256, num_workers=workers)
    bar = tqdm(loader, desc="features", disable=not progress, leave=False)
    return torch.cat([backbone(batch.to(device)).float().cpu() for batch, _, _ in bar])


def raw_pixels(images: ImageSet) -> Tensor:
    """The baseline that needs no learning: pixels ``[N, P]`` in [0, 1], images above 32 x 32 averaged down to that."""
    parts = []
    for first in range(0, len(images), 1024):
        last = min(first + 1024, len(images))
        if images.images is not None:
            batch = images.images[first:last].float() / 255
        else:
            batch = torch.stack([images[i][0] for i in range(first, last)]).float() / 255
        if batch.shape[-1] > 32:
            batch = F.interpolate(batch, size=(32, 32), mode="area")
        parts.append(batch.flatten(1))
    return torch.cat(parts)
