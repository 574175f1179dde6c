"""Closed-set accuracy as asked for: kNN with many settings, probes by protocol, few labels; and feature quality."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradmix.eval import quality
from gradmix.eval.catalogue import of_predictions
from gradmix.eval.classifiers.few_labels import few_labels, subset
from gradmix.eval.classifiers.finetune import ImageProbe
from gradmix.eval.classifiers.knn import KNNClassifier
from gradmix.eval.config import EvalConfig
from gradmix.eval.features.extraction import Model, extract
from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import AugmentConfig, Config
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.networks.backbones import Encoder

MOST_VIEWED = 2048  # images whose two views are compared


def check_asked(asked: EvalConfig, run: Config, data: OpenSetData) -> None:
    """
    Raises:
        ValueError: settings that make no sense; said before anything is computed.
    """
    for k in asked.knn_k:
        if not 1 <= k <= len(data.train):
            raise ValueError(f"knn_k: expected 1 to {len(data.train)}, the size of the training set, got {k}")
    for temperature in asked.knn_temperature:
        if temperature <= 0:
            raise ValueError(f"knn_temperature: expected positive numbers, got {temperature}")
    for protocol in asked.protocols:
        if protocol != "cached":
            ImageProbe(protocol, asked.probe, run.data.augment)
    for amount in asked.few_labels if data.classes else ():
        subset(data.train.labels, amount, 0)


def knn_accuracies(
    asked: EvalConfig, knn: KNNClassifier, features, labels, classes: Sequence[str] = ()
) -> dict[str, Any]:
    """``knn/...`` of the classifier's own k and temperature, ``knn/k=K,t=T/...`` of those asked for; one search."""
    ks, temperatures = asked.knn_k or [knn.k], asked.knn_temperature or [knn.temperature]
    found = knn.neighbours(features, max(knn.k, *ks))

    def predicted(k: int, temperature: float) -> np.ndarray:
        return knn.classes_[knn.vote(*found, k=k, temperature=temperature).argmax(axis=1)]

    result = of_predictions("knn", predicted(knn.k, knn.temperature), labels, classes)
    if asked.knn_k or asked.knn_temperature:
        for k, temperature in product(ks, temperatures):
            result |= of_predictions(f"knn/k={k},t={temperature:g}", predicted(k, temperature), labels)
    return result


def further_probes(
    asked: EvalConfig, run: Config, model: Model, data: OpenSetData, found: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """``linear_augmented/...``, ``finetune/...``, ``few_labels/AMOUNT/top1`` with ``_std``: what was asked for."""
    known = data.test.labels >= 0
    test = data.test.select(known.nonzero()[:, 0])
    result: dict[str, Any] = {}
    for protocol in asked.protocols:
        if protocol != "cached":
            name = "finetune" if protocol == "finetune" else f"linear_{protocol}"
            probe = ImageProbe(protocol, asked.probe, run.data.augment, run.seed)
            probe.fit(model.backbone, data.train, len(data.classes), run.data.workers)
            result |= of_predictions(name, probe.predict(test, run.data.workers), test.labels, data.classes)
            result[f"protocol/{name}"] = str(probe)
    for amount in asked.few_labels:
        sets = found["train"]["features"], data.train.labels.numpy(), found["test"]["features"][known], test.labels
        accuracies = few_labels(*sets, amount, device=model.device)
        result[f"few_labels/{amount}/top1"] = float(accuracies.mean())
        result[f"few_labels/{amount}/top1_std"] = float(accuracies.std(ddof=1))
    return result


def quality_numbers(features, labels: Tensor | None, pair: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
    """``quality/...`` of features ``[N, F]``; with labels of known classes, of two views, where they are given.

    Without ``quality/class_spread`` where it is infinite, which JSON can't say.
    """
    result = {
        "quality/uniformity": quality.uniformity(features),
        "quality/effective_rank": quality.effective_rank(features),
    }
    if labels is not None and math.isfinite(spread := quality.class_spread(features, labels)):
        result["quality/class_spread"] = spread
    if pair is not None:
        result["quality/alignment"] = quality.alignment(*pair)
    return result


def two_views(
    encoder: Encoder, images: ImageSet, augment: AugmentConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features of two random views of up to ``MOST_VIEWED`` evenly spaced images, always the same views.

    Args:
        encoder: normalised images to features, in eval mode.
    """
    rows = torch.linspace(0, len(images) - 1, min(len(images), MOST_VIEWED)).long()
    chosen, views = images.select(rows), TwoViews(augment, images.size, views=1, constants=encoder.constants)

    def features(seed: int) -> Tensor:
        return extract(lambda batch: encoder(views(batch, seed)), chosen, device)

    return features(0), features(1)
