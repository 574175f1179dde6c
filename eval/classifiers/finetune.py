"""Probes that see augmented images: a linear classifier on the frozen backbone (``augmented``), and fine-tuning.

SimCLR's protocols (arXiv 2002.05709, appendix B.5 to B.8): random resized crop and flip, momentum SGD or LARS, a cosine
to 0, the last weights. The classifier stands behind a BatchNorm without parameters, as in MAE's probe, so that one
learning rate fits features of any scale.
"""

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from lightly.utils.lars import LARS
from torch import Tensor, nn

from gradmix.eval.config import ProbeConfig
from gradmix.eval.counted import counted
from gradmix.eval.features.cache import frozen
from gradmix.eval.features.extraction import batches
from gradmix.ssl.augment import TwoViews
from gradmix.ssl.checks import check_values
from gradmix.ssl.config import AugmentConfig
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.loader import TrainLoader, seed_of
from gradmix.ssl.data.views import Crops
from gradmix.ssl.networks.backbones import Backbone

LEARNING_RATES = {"augmented": 0.1, "finetune": 0.02}  # for a batch of 256


class ImageProbe:
    """A classifier of images, trained on augmented ones.

    Args:
        protocol: ``augmented`` (the backbone stays as it is) or ``finetune`` (a copy of it is trained too).
        settings: of the optimizer.
        augment: crop and flip are taken from it; colours stay.
        seed: of the order, the crops and the classifier.
    """

    def __init__(self, protocol: str, settings: ProbeConfig, augment: AugmentConfig, seed: int = 0) -> None:
        if protocol not in LEARNING_RATES:
            raise ValueError(f"protocols: expected some of cached, {', '.join(LEARNING_RATES)}, got {protocol!r}")
        check_values(settings, "probe.")
        self.protocol, self.settings, self.seed = protocol, settings, seed
        kept = ("crop", "ratio", "flip")
        off: dict[str, Any] = {field.name: 0.0 for field in fields(augment) if field.name not in kept}
        self.augment = replace(augment, **off)  # 0 switches a step off

    def fit(self, backbone: Backbone, images: ImageSet, classes: int, workers: int | None = 0) -> "ImageProbe":
        """Train on images with labels 0..classes-1; ``backbone`` itself is never changed."""
        device = self.device = next(backbone.parameters()).device
        tuned = self.protocol == "finetune"
        with frozen(backbone), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            self.backbone = copy.deepcopy(backbone).requires_grad_(True) if tuned else backbone
            norm = nn.BatchNorm1d(backbone.num_features, affine=False)
            self.head = nn.Sequential(norm, nn.Linear(backbone.num_features, classes)).to(device)
            augment = TwoViews(self.augment, images.size, views=1, constants=backbone.encoder.constants)
            self._train(images, augment, tuned, workers)
        self.backbone.eval().requires_grad_(False)
        self.head.eval()
        return self

    def _train(self, images: ImageSet, augment: TwoViews, tuned: bool, workers: int | None) -> None:
        settings, device = self.settings, self.device
        batch_size = min(settings.batch_size, len(images))
        crops = Crops(1, self.augment.crop, self.augment.ratio)
        loader = TrainLoader(images, batch_size, self.seed, settings.epochs, 0, device, workers=workers, crops=crops)
        optimizer = self._optimizer(
            [*self.head.parameters(), *(self.backbone.parameters() if tuned else ())], batch_size
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))
        self.backbone.train(tuned)
        for batch in loader:
            views = augment(batch.images.to(device), seed_of(self.seed, batch.epoch, batch.step))
            with torch.set_grad_enabled(tuned):
                features = self.backbone.encoder(views)
            loss = F.cross_entropy(self.head(features), batch.labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def _optimizer(self, parameters: list[nn.Parameter], batch_size: int) -> torch.optim.Optimizer:
        settings = self.settings
        base = LEARNING_RATES[self.protocol] if settings.base_lr is None else settings.base_lr
        self.lr = base * batch_size / 256
        if settings.optimizer == "lars":
            return LARS(parameters, self.lr, momentum=0.9, weight_decay=settings.weight_decay)
        return torch.optim.SGD(parameters, self.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)

    @torch.inference_mode()
    def predict(self, images: ImageSet, workers: int | None = 0) -> Tensor:
        """Labels ``[N]`` of images as they are, without augmentation."""
        return torch.cat([self.head(features).argmax(dim=1).cpu() for features in self._features(images, workers)])

    def _features(self, images: ImageSet, workers: int | None) -> Iterator[Tensor]:
        return batches(self.backbone, images, self.device, workers)

    def __str__(self) -> str:
        s = self.settings
        how = f"lr {self.lr:.3g}, weight decay {s.weight_decay:.3g}, last weights"
        return f"{self.protocol}: {s.optimizer}, {counted(s.epochs, 'epoch')}, {how}"
