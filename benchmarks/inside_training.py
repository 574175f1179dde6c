"""A small training whose mixing is watched: what inside.py looks into. Called by inside.py.

ResNet-18 of width 16 on TinyImageNet's images at 32 x 32, which is the study's network and size; there the objects'
boxes are known. Weights are kept at some epochs, and at every step where the attribution peaks and what is hidden.
"""

import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from pytorch_lightning import Trainer
from safetensors.torch import save_file
from torch import Tensor

from gradmix.boxes import boxes_inside
from gradmix.mixer import Mixed
from gradmix.ssl.callbacks import EpochCallback
from gradmix.ssl.config import Config, register_configs
from gradmix.ssl.data.loader import Batch
from gradmix.ssl.data.open_set import OpenSetData, load_data
from gradmix.ssl.networks.backbones import backbone_metadata
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.runs.files import write_json
from gradmix.ssl.train import train

IMAGES = 60  # of each of 20 classes: 1,200 in all, as in the study
SIZE = 32
KEEP_EPOCHS = (1, 4, 8, 16, 30)
SETTING = (
    *("data=tinyimagenet", "data.split=0", f"data.image_size={SIZE}", "data.holdout=0", "method=joint"),
    *("encoder=resnet18", "encoder.width=16", "batch_size=128", "optimizer=adam", "optimizer.base_lr=2e-3"),
    *(f"epochs={KEEP_EPOCHS[-1]}", "knn_every=0", "pictures_every=0", "trainer.precision=32-true"),
    *("trainer.accelerator=cpu", "mix=gradmix", "+mix.options.evidence=loss"),
)


class Watch(EpochCallback):
    """Writes ``epoch-N/`` with backbone and head, and ``watched.json``: means over the steps of each epoch."""

    every_epochs = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.epoch: list[dict[str, float]] = []
        path = folder / "watched.json"  # a training that was stopped goes on
        self.watched: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:
        if not module.start:
            self.keep(module, 0)

    def on_train_batch_end(
        self, trainer: Trainer, module: Pretraining, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.epoch.append(of_step(*module.pictures) | {n: v.item() for n, v in module.scalars.items()})
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_epoch(self, trainer: Trainer, module: Pretraining) -> None:
        epoch = module.steps // module.loader.steps_per_epoch
        self.watched[str(epoch)] = {name: statistics.mean(row[name] for row in self.epoch) for name in self.epoch[0]}
        self.epoch = []
        if epoch in KEEP_EPOCHS:
            self.keep(module, epoch)
        write_json(self.folder / "watched.json", self.watched)

    def keep(self, module: Pretraining, epoch: int) -> None:
        folder = self.folder / f"epoch-{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in module.backbone.state_dict().items()}
        save_file(state, folder / "backbone.safetensors", backbone_metadata(module.backbone, SIZE))
        save_file(module.head.state_dict(), folder / "head.safetensors")


def of_step(views: Tensor, mixed: Mixed) -> dict[str, float]:
    """What the mixing of one step did, with chance beside it: boxes of the same sizes at random places."""
    maps, boxes = mixed.attribution, mixed.boxes
    height, width = maps.shape[1:]
    peak = peaks(maps)
    share = ((boxes[:, 2] - boxes[:, 0]) / height).float()
    centres = (torch.rand(len(boxes), 2) * torch.tensor([height, width])).long()
    return {
        "hidden share": 1 - mixed.kept.mean().item(),
        "evidence hidden": evidence_in(maps, boxes).mean().item(),
        "evidence hidden, random": evidence_in(maps, boxes_inside(centres, share, (height, width))).mean().item(),
        "peak from the centre": from_centre(peak, (height, width)).mean().item(),
        "peaks at the border": at_border(peak, (height, width)).float().mean().item(),
    }


def peaks(maps: Tensor) -> Tensor:
    """(row, column) of the highest pixel, ``[N, 2]``."""
    flat = maps.flatten(1).argmax(1)
    return torch.stack([flat // maps.shape[2], flat % maps.shape[2]], 1)


def from_centre(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Distance to the image's centre, in sides of the image."""
    return ((pixels + 0.5) / torch.tensor(size) - 0.5).norm(dim=1)


def at_border(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether a pixel lies in the outer eighth on any side."""
    place = (pixels + 0.5) / torch.tensor(size)
    return ((place < 1 / 8) | (place > 7 / 8)).any(1)


def evidence_in(maps: Tensor, boxes: Tensor) -> Tensor:
    """Share of each map's sum that lies in its box; flat maps count as spread evenly."""
    inside = masks(boxes, (maps.shape[1], maps.shape[2]))
    maps = maps + 1e-12
    return (maps * inside).sum((1, 2)) / maps.sum((1, 2))


def masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """``[N, H, W]`` bool: the pixels in each box."""
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    y, x = torch.arange(size[0]), torch.arange(size[1])
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None]


def subset(tiny: Path, folder: Path) -> Path:
    """``IMAGES`` training images of each class, the first by name, and all validation images, as links."""
    if not (folder / "val").exists():
        (folder / "train").mkdir(parents=True, exist_ok=True)
        for of_class in sorted((tiny / "train").iterdir()):
            target = folder / "train" / of_class.name / "images"
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((of_class / "images").iterdir())[:IMAGES]:
                if not (target / path.name).exists():
                    os.symlink(path.absolute(), target / path.name)
        os.symlink((tiny / "wnids.txt").absolute(), folder / "wnids.txt")
        os.symlink((tiny / "val").absolute(), folder / "val")
    return folder


def config_of(*overrides: str) -> Config:
    register_configs()
    with initialize_config_module("gradmix.configs", version_base="1.3"):
        return OmegaConf.to_object(compose("pretrain", [*overrides]))


def prepare(tiny: Path, runs: Path) -> tuple[OpenSetData, Path]:
    """The training's data, and its folder; trained if it was not yet."""
    root, run = subset(tiny, runs / "images"), runs / "tiny"
    config = config_of(*SETTING, f"data.root={root}", f"run_dir={run}")
    data = load_data(config.data, config.seed)
    if not (run / "training.json").exists():
        train(config, data, [Watch(run)])
    return data, run
