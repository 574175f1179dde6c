"""Probes on augmented images, with a tiny untrained ResNet on real digits."""

import math

import pytest
import torch
from sklearn.datasets import load_digits

from gradmix.eval.classifiers.finetune import ImageProbe
from gradmix.eval.config import ProbeConfig
from gradmix.eval.features.cache import weights_key
from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import AugmentConfig
from gradmix.ssl.data.images import ImageSet, from_array
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.networks.backbones import Backbone, ResNet

AUGMENT = AugmentConfig(crop=(0.6, 1.0), flip=0.0)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    rows = (data.target < 3).nonzero()[0]
    images = from_array((data.images[rows] * (255 / 16)).round().astype("uint8"), 8)
    everything = ImageSet(torch.from_numpy(data.target[rows]).long(), 8, images)
    return everything.select(torch.arange(0, 400)), everything.select(torch.arange(400, len(rows)))


def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backbone(ResNet("resnet18", 4, "small"), 8)


def accuracy(probe, images):
    return (probe.predict(images) == images.labels).double().mean().item()


@pytest.mark.parametrize(("protocol", "optimizer", "lr"), [("augmented", "sgd", 1.0), ("finetune", "sgd", 0.1)])
def test_learns_and_leaves_the_backbone_bit_identical(digits, protocol, optimizer, lr):
    network, (train, test) = backbone(), digits
    before, state = weights_key(network), torch.get_rng_state()
    settings = ProbeConfig(optimizer, epochs=8, batch_size=64, base_lr=lr)
    probe = ImageProbe(protocol, settings, AUGMENT).fit(network, train, 3)
    assert weights_key(network) == before and torch.equal(torch.get_rng_state(), state)
    assert accuracy(probe, test) > 0.6  # a third is chance
    assert (weights_key(probe.backbone) == before) == (protocol == "augmented")
    after = weights_key(probe.backbone)
    alone = [probe.predict(test.select(torch.tensor([row]))).item() for row in range(10)]
    assert alone == probe.predict(test)[:10].tolist()  # whatever else is in the batch
    assert weights_key(probe.backbone) == after
    again = ImageProbe(protocol, settings, AUGMENT).fit(network, train, 3)
    assert torch.equal(again.head[1].weight, probe.head[1].weight)
    assert str(probe) == f"{protocol}: sgd, 8 epochs, lr {lr / 4:.3g}, weight decay 0, last weights"


def test_the_probe_is_torchs_own_training_on_the_frozen_features(digits):
    """Without crops and flips, every epoch sees the same features: of the backbone as it is evaluated."""
    network, train = backbone(), digits[0]
    settings = ProbeConfig("sgd", epochs=3, batch_size=64, base_lr=2.0, weight_decay=0.01)
    loud = AugmentConfig((1.0, 1.0), flip=0.0, jitter=1.0, brightness=0.8, hue=0.5, greyscale=0.5, blur=1.0, rotate=30)
    probe = ImageProbe("augmented", settings, loud, seed=5).fit(network, train, 3)
    with torch.no_grad():
        features = network.eval()(train.images)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        norm = torch.nn.BatchNorm1d(network.num_features, affine=False)
        head = torch.nn.Sequential(norm, torch.nn.Linear(network.num_features, 3))
    optimizer = torch.optim.SGD(head[1].parameters(), 0.5, momentum=0.9, nesterov=True, weight_decay=0.01)  # 2 / 4
    steps = 3 * (len(train) // 64)
    for step, batch in enumerate(TrainLoader(train, 64, 5, epochs=3)):
        optimizer.param_groups[0]["lr"] = 0.25 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features[batch.index]), batch.labels).backward()
        optimizer.step()
    torch.testing.assert_close(probe.head[1].weight, head[1].weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(probe.head[0].running_var, head[0].running_var, atol=1e-3, rtol=1e-3)


def test_no_two_batches_are_cropped_alike(digits, monkeypatch):
    seeds, draw = [], TwoViews.forward
    monkeypatch.setattr(TwoViews, "forward", lambda self, images, seed: seeds.append(seed) or draw(self, images, seed))
    ImageProbe("augmented", ProbeConfig(epochs=3, batch_size=100), AUGMENT).fit(backbone(), digits[0], 3)
    assert len(set(seeds)) == len(seeds) == 12


def test_lars(digits):
    probe = ImageProbe("augmented", ProbeConfig("lars", epochs=4, batch_size=64, base_lr=40), AUGMENT)
    assert accuracy(probe.fit(backbone(), digits[0], 3), digits[1]) > 0.6


def test_a_backbone_that_moves_is_an_error(digits, monkeypatch):
    """The assertion is in the code: train mode moves BatchNorm's statistics, and is noticed."""
    network = backbone()
    monkeypatch.setattr(type(network), "train", lambda self, mode=True: torch.nn.Module.train(self, True))
    with pytest.raises(RuntimeError, match="changed weights or BatchNorm statistics"):
        ImageProbe("augmented", ProbeConfig(epochs=1), AUGMENT).fit(network, digits[0], 3)


def test_bad_settings():
    for arguments, message in (
        (("linear", ProbeConfig()), "protocols: expected some of cached, augmented, finetune, got 'linear'"),
        (("augmented", ProbeConfig("adam")), "probe.optimizer: expected sgd or lars, got 'adam'"),
        (("augmented", ProbeConfig(epochs=0)), "probe.epochs: expected at least 1, got 0"),
        (("augmented", ProbeConfig(batch_size=1)), "probe.batch_size: expected at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageProbe(*arguments, AUGMENT)
