"""Measures while training: kNN accuracy on held-out and on test images, open-set AUROC, and feature quality."""

from dataclasses import replace

import torch
from pytorch_lightning import Callback, Trainer

from gradmix.eval.detectors import PRIMARY
from gradmix.eval.features.cache import frozen
from gradmix.eval.features.extraction import extract
from gradmix.eval.protocols.closed_set import KNN, Quality
from gradmix.eval.protocols.measure import Measure
from gradmix.eval.protocols.measures import measure_all
from gradmix.eval.protocols.open_set import OpenSet
from gradmix.eval.protocols.subject import Subject
from gradmix.ssl.callbacks import EpochCallback, Progress
from gradmix.ssl.config import Config
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.loggers import log
from gradmix.ssl.pretrain import Pretraining

BANK = 5000  # training images compared with; enough to watch a trend


class OnlineKNN(EpochCallback):
    """Logs ``knn/held_out`` every so many epochs. Nothing is chosen by it: the last weights are the result."""

    def __init__(self, data: OpenSetData, config: Config):
        self.data, self.every_epochs = watched(data, data.held_out), config.knn_every
        self.config = replace(config, knn_k=min(config.knn_k, len(self.data.train)))

    def on_epoch(self, trainer: Trainer, module: Pretraining) -> None:
        accuracy = self.accuracy(module)
        log(module, {"knn/held_out": accuracy}, module.steps)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it from another class
            if isinstance(callback, Progress):
                callback.knn = 100 * accuracy

    def accuracy(self, module: Pretraining) -> float:
        """kNN accuracy of the backbone as it is, in [0, 1]."""
        with frozen(module.backbone):
            return dict(KNN().measure(subject_now(module, self.config, self.data)))["knn/top1"]


class OnlineTest(EpochCallback):
    """Logs ``test/knn/top1`` and ``test/osr/deep_knn/auroc`` every so many epochs: the numbers that the run would have
    if it ended there. For curves; nothing is chosen by them, the last weights are the result.
    """

    KEYS = ("knn/top1", f"osr/{PRIMARY}/auroc")

    def __init__(self, data: OpenSetData, config: Config):
        no_images = data.test.select(torch.zeros(0, dtype=torch.int64))
        self.data, self.config, self.every_epochs = replace(data, held_out=no_images), config, config.test_every
        self.measures: list[Measure] = [KNN()]
        if (data.test.labels < 0).any():
            self.measures.append(OpenSet(PRIMARY, PRIMARY, "features"))

    def on_epoch(self, trainer: Trainer, module: Pretraining) -> None:
        with frozen(module.backbone):
            numbers, _ = measure_all(self.measures, subject_now(module, self.config, self.data))
        curves = {f"test/{key}": numbers[key] for key in self.KEYS if key in numbers}
        log(module, curves, module.steps)


class OnlineQuality(EpochCallback):
    """Logs ``quality/...`` of the training images (see :mod:`gradmix.eval.quality`) every so many epochs."""

    def __init__(self, data: OpenSetData, config: Config):
        nothing = data.test.select(torch.zeros(0, dtype=torch.int64))
        self.data, self.config, self.every_epochs = watched(data, nothing), config, config.quality_every

    def on_epoch(self, trainer: Trainer, module: Pretraining) -> None:
        with frozen(module.backbone):
            numbers, _ = measure_all([Quality()], subject_now(module, self.config, self.data))
        log(module, numbers, module.steps)


def watched(data: OpenSetData, test: ImageSet) -> OpenSetData:
    """Up to ``BANK`` evenly spaced training images, and others in the place of the test images."""
    rows = torch.linspace(0, len(data.train) - 1, min(BANK, len(data.train))).long()
    return replace(data, train=data.train.select(rows), held_out=test.select(rows[:0]), test=test)


def subject_now(module: Pretraining, config: Config, data: OpenSetData) -> Subject:
    """The backbone as it is, with the features of ``data``; for as long as it is frozen."""
    subject = Subject(config, data, module.backbone, module.device, {})
    sets = data.sets().items()
    look, device, workers = subject.look, module.device, config.data.workers
    subject.spaces["features"] = {name: extract(look, images, device, workers) for name, images in sets}
    return subject


def watchers(data: OpenSetData, config: Config) -> list[Callback]:
    """What a config asks to be measured while training, as far as there are classes and held-out images."""
    callbacks: list[Callback] = []
    if config.knn_every and data.classes and len(data.held_out):
        callbacks.append(OnlineKNN(data, config))
    if config.test_every and data.classes and len(data.test):
        callbacks.append(OnlineTest(data, config))
    if config.quality_every:
        callbacks.append(OnlineQuality(data, config))
    return callbacks
