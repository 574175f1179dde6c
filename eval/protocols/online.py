"""Evaluation while training: kNN accuracy on held-out and on test images, open-set AUROC, and feature quality."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pytorch_lightning import Callback, Trainer

from gradmix.eval.classifiers.knn import KNNClassifier
from gradmix.eval.detectors import DeepKNN
from gradmix.eval.features.cache import frozen
from gradmix.eval.features.extraction import extract
from gradmix.eval.metrics import auroc, closed_set_accuracy
from gradmix.eval.protocols.probes import quality_numbers, two_views
from gradmix.ssl.callbacks import EpochCallback, Progress
from gradmix.ssl.config import Config
from gradmix.ssl.data.images import ImageSet, normalize
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.pretrain import Pretraining

BANK = 5000  # training images compared with; enough to watch a trend


class OnlineKNN(EpochCallback):
    """Logs ``knn/held_out`` every so many epochs. Nothing is chosen by it: the last weights are the result."""

    def __init__(self, data: OpenSetData, every_epochs: int, k: int, temperature: float):
        rows = torch.linspace(0, len(data.train) - 1, min(BANK, len(data.train))).long()
        self.bank, self.held_out = data.train.select(rows), data.held_out
        self.every_epochs, self.k, self.temperature = every_epochs, min(k, len(rows)), temperature

    def on_epoch(self, trainer: Trainer, module: Pretraining) -> None:
        accuracy = self.accuracy(module)
        module.logger.log_metrics({"knn/held_out": accuracy}, module.steps)
        for callback in trainer.callbacks:
            if isinstance(callback, Progress):
                callback.knn = 100 * accuracy

    def accuracy(self, module: Pretraining) -> float:
        """kNN accuracy of the backbone as it is, in [0, 1]."""
        with evaluated(module):
            knn = KNNClassifier(self.k, self.temperature).fit(features_now(module, self.bank), self.bank.labels)
            return closed_set_accuracy(knn.predict(features_now(module, self.held_out)), self.held_out.labels)


class OnlineTest(EpochCallback):
    """Logs ``test/knn/top1`` and ``test/osr/deep_knn/auroc`` every so many epochs: the numbers that the run would have
    if it ended there. For curves; nothing is chosen by them, the last weights are the result.
    """

    def __init__(self, data: OpenSetData, every_epochs: int, k: int, temperature: float):
        self.train, self.test = data.train, data.test
        self.every_epochs, self.k, self.temperature = every_epochs, min(k, len(data.train)), temperature

    def on_epoch(self, trainer: Trainer, module: Pretraining) -> None:
        with evaluated(module):
            bank, features = features_now(module, self.train), features_now(module, self.test)
        known = self.test.labels >= 0
        knn = KNNClassifier(self.k, self.temperature).fit(bank, self.train.labels)
        numbers = {"test/knn/top1": closed_set_accuracy(knn.predict(features[known]), self.test.labels[known])}
        if not known.all():
            scores = DeepKNN().fit(bank, self.train.labels).score(features)
            numbers["test/osr/deep_knn/auroc"] = auroc(scores[known], scores[~known])
        module.logger.log_metrics(numbers, module.steps)


class OnlineQuality(EpochCallback):
    """Logs ``quality/...`` of the training images (see :mod:`gradmix.eval.quality`) every so many epochs."""

    def __init__(self, data: OpenSetData, every_epochs: int):
        rows = torch.linspace(0, len(data.train) - 1, min(BANK, len(data.train))).long()
        self.images, self.every_epochs = data.train.select(rows), every_epochs
        self.labels = self.images.labels if data.classes else None

    def on_epoch(self, trainer: Trainer, module: Pretraining) -> None:
        with evaluated(module):
            pair = two_views(module.backbone, self.images, module.config.data.augment, module.device)
            numbers = quality_numbers(features_now(module, self.images), self.labels, pair)
        module.logger.log_metrics(numbers, module.steps)


@contextmanager
def evaluated(module: Pretraining) -> Iterator[None]:
    """The backbone in eval mode, and not a bit of it changed."""
    was_training = module.backbone.training
    module.backbone.eval()
    with frozen(module.backbone):
        yield
    module.backbone.train(was_training)


def features_now(module: Pretraining, images: ImageSet) -> torch.Tensor:
    return extract(lambda batch: module.backbone(normalize(batch, module.backbone.constants)), images, module.device)


def watchers(data: OpenSetData, config: Config) -> list[Callback]:
    """What a config asks to be measured while training, as far as there are classes and held-out images."""
    callbacks: list[Callback] = []
    if config.knn_every and data.classes and len(data.held_out):
        callbacks.append(OnlineKNN(data, config.knn_every, config.knn_k, config.knn_temperature))
    if config.test_every and data.classes and len(data.test):
        callbacks.append(OnlineTest(data, config.test_every, config.knn_k, config.knn_temperature))
    if config.quality_every:
        callbacks.append(OnlineQuality(data, config.quality_every))
    return callbacks
