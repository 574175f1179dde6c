"""kNN accuracy while training, on images held out from the training set."""

import torch
from pytorch_lightning import Callback, Trainer

from gradmix.eval.features import extract
from gradmix.eval.knn import KNNClassifier
from gradmix.eval.metrics import closed_set_accuracy
from gradmix.ssl.callbacks import EpochCallback, Progress
from gradmix.ssl.data import OpenSetData
from gradmix.ssl.images import ImageSet, normalize
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
        """kNN accuracy of the backbone as it is, in [0, 1]; leaves it in the mode it was in."""
        was_training = module.backbone.training
        module.backbone.eval()

        def features(images: ImageSet) -> torch.Tensor:
            return extract(lambda batch: module.backbone(normalize(batch)), images, module.device)

        knn = KNNClassifier(self.k, self.temperature).fit(features(self.bank), self.bank.labels)
        accuracy = closed_set_accuracy(knn.predict(features(self.held_out)), self.held_out.labels)
        module.backbone.train(was_training)
        return accuracy


def online_knn(data: OpenSetData, every_epochs: int, k: int, temperature: float) -> list[Callback]:
    """The callback, where there are classes and held-out images to watch."""
    usable = every_epochs and data.classes and len(data.held_out)
    return [OnlineKNN(data, every_epochs, k, temperature)] if usable else []
