"""The optimizer, what weight decay falls on, and the schedule of the learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import nn

from gradmix.ssl.config import Config
from gradmix.ssl.machine import precision


def learning_rate(config: Config) -> float:
    """The linear scaling rule of arXiv 1706.02677."""
    return config.optimizer.base_lr * config.batch_size / 256


def build_optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a config asks for, on ``parameters``, with weight decay where :func:`decayed` has it.

    Raises:
        ValueError: no such optimizer.
    """
    lr, weight_decay = learning_rate(config), config.optimizer.weight_decay
    groups = decayed(parameters, weight_decay)
    # A fused step unscales float16's gradients by itself; before it they can't be clipped, or taken away to skip it.
    skips_scaled = config.on_nonfinite == "skip" and str(precision(config)) in ("16-mixed", "16")
    fused = config.speed.fused and not config.trainer.get("gradient_clip_val") and not skips_scaled
    match config.optimizer.name:
        case "adam":
            return torch.optim.Adam(groups, lr, weight_decay=weight_decay, fused=fused)
        case "adamw":
            return torch.optim.AdamW(groups, lr, weight_decay=weight_decay, fused=fused)
        case "sgd":
            return torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=weight_decay, fused=fused)
        case "lars":
            return LARS(groups, lr, momentum=0.9, weight_decay=weight_decay)
        case name:
            raise ValueError(f"optimizer.name: no {name!r}")


def decayed(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights, and without decay what has one dimension at most: biases, and what normalises.

    As in SimCLR's paper and code (arXiv 2002.05709). lightly's LARS does not scale the steps of a group without decay
    either. Without any decay there is one group, as in checkpoints from before there were two.
    """
    parameters = list(parameters)
    if not weight_decay:
        return [{"params": parameters}]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


class Schedule(CosineWarmupScheduler):
    """lightly's, in Python's numbers: NumPy's, which older ones give, not every torch reads back from a checkpoint."""

    def scale_lr(self, epoch: int) -> float:
        """As lightly's: the factor of the learning rate at a step."""
        return float(super().scale_lr(epoch))


def build_schedule(config: Config, optimizer: torch.optim.Optimizer, steps_per_epoch: float) -> Schedule:
    """Linear warm-up, then a cosine that ends with the training; one step of it per optimizer step."""
    warmup = round(config.optimizer.warmup_epochs * steps_per_epoch)
    total = math.ceil(round(config.epochs * steps_per_epoch, 6))  # the last batches make a step, however few
    total = max(2, total)  # the last step has the end's learning rate, and one at least has to learn
    return Schedule(optimizer, warmup, total, end_value=config.optimizer.final_lr)
