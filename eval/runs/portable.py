"""A whole saved detector as one ONNX file: network, normalisation, distances, threshold."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit_length
from torch.nn.functional import one_hot

from gradmix.eval.classifiers.knn import VOTE_TEMPERATURE
from gradmix.eval.detectors import NCI, ClassKNN, DeepKNN, Detector, Energy, MeanShift, NNGuide
from gradmix.eval.features.search import Neighbours
from gradmix.eval.runs.export import write_onnx
from gradmix.eval.scoring.scorer import Scorer
from gradmix.ssl.runs.files import write_atomically

MOST_ROWS = 10_000  # vectors that every image is compared with: they lie in the file, and no index does
Arrays = dict[str, Tensor]
Answer = tuple[Tensor, Tensor]  # scores [N] and class positions [N]


def export_scorer(scorer: Scorer, path: Path) -> None:
    """Write a detector as ONNX.

    ``images`` float32 ``[N, 3, S, S]`` in [0, 1], prepared as the metadata's ``image_size`` and ``fit`` say, for any N,
    to ``score`` float32 ``[N]``, ``class_index`` int64 ``[N]`` (in the metadata's ``classes``; -1 where there are none)
    and ``is_unknown`` bool ``[N]``.

    Raises:
        ValueError: a detector of another kind, without a threshold, or with more than ``MOST_ROWS`` vectors; or a
            package that ONNX needs is missing.
    """
    about = {
        "classes": scorer.classes,
        "detector": scorer.detector.NAME,
        "image_size": scorer.backbone.image_size,
        "fit": scorer.backbone.fit,
        "threshold": scorer.detector.threshold,
        "detector_sha256": scorer.sha256,
    }
    model, said = Portable(scorer).eval(), {name: json.dumps(value) for name, value in about.items()}
    names = ["score", "class_index", "is_unknown"]
    write_atomically(path, lambda temporary: write_onnx(model, scorer.backbone.image_size, names, temporary, said))


class Portable(nn.Module):
    """What :meth:`Scorer.score` does with an image, in operations that other runtimes have."""

    classes: Tensor
    limits: Tensor

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        detector = scorer.detector
        if detector.NAME not in SCORES:
            raise ValueError(f"detector: {detector.NAME} has no ONNX form; {', '.join(SCORES)} have one")
        if detector.threshold is None:
            raise ValueError("detector: it has no threshold, so that nothing would be called unknown")
        self.backbone = scorer.backbone
        self.head = scorer.model.head if scorer.space == "projections" else None
        self.answer, self.detector, self.classless = SCORES[detector.NAME], detector, detector.classes_ is None
        for name in detector.ARRAYS:
            value = getattr(detector, name)
            if value is not None:
                self.register_buffer(name, _tensor(name, value))
        classes = np.zeros(1, np.int64) if detector.classes_ is None else detector.classes_
        verdict = detector.calibration_
        limits = np.full(len(classes), detector.threshold)
        if verdict is not None and verdict.per_class:
            limits = verdict.thresholds(np.arange(len(classes)), len(classes))
        self.register_buffer("classes", torch.from_numpy(classes))
        self.register_buffer("limits", torch.from_numpy(limits))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.backbone(images)
        if self.head is not None:
            features = unit_length(self.head(features), dim=1)
        return self.judge(features)

    def judge(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score, class and whether unknown, ``[N]`` each, of what the detector looks at, ``[N, F]``."""
        score, position = self.answer(dict(self.named_buffers(recurse=False)), self.detector, features)
        score = score.float()
        unknown = score.double() > self.limits[position]
        return score, torch.full_like(position, -1) if self.classless else self.classes[position], unknown


def _tensor(name: str, value: np.ndarray | Neighbours) -> Tensor:
    rows = value[:]
    if name in ("bank_", "rows_") and len(rows) > MOST_ROWS:
        raise ValueError(
            f"detector: {len(rows)} training features are too many for an ONNX file, at most {MOST_ROWS} are compared; "
            "class_mean and mahalanobis keep one vector a class"
        )
    return torch.from_numpy(np.array(rows))


def _vote(similarity: Tensor, positions: Tensor, classes: int) -> Tensor:
    weights = torch.exp((similarity - similarity[:, :1]) / VOTE_TEMPERATURE)
    return (weights[:, :, None] * one_hot(positions, classes)).sum(1).argmax(1)


def _voted(a: Arrays, detector: Detector, similarity: Tensor, rows: Tensor) -> Tensor:
    if detector.classes_ is None:
        return torch.zeros_like(rows[:, 0])
    return _vote(similarity, a["positions_"][rows], len(detector.classes_))


def _length(x: Tensor) -> Tensor:
    return (x * x).sum(1).sqrt()


def _logits(a: Arrays, features: Tensor) -> Tensor:
    return features.double() @ a["head_"][:, :-1].T + a["head_"][:, -1]


def deep_knn(a: Arrays, detector: DeepKNN, features: Tensor) -> Answer:
    unit = unit_length(features, dim=1)
    similarity, rows = (unit @ a["bank_"].T).topk(detector.k)
    return _length(unit - a["bank_"][rows[:, -1]]), _voted(a, detector, similarity, rows)


def mean_shift(a: Arrays, detector: MeanShift, features: Tensor) -> Answer:
    unit = unit_length(features, dim=1)
    similarity, rows = (unit @ a["bank_"].T).topk(detector.k)
    return _length(unit.double() - a["bank_"][rows].double().mean(1)), _voted(a, detector, similarity, rows)


def class_knn(a: Arrays, detector: ClassKNN, features: Tensor) -> Answer:
    every, starts = unit_length(features, dim=1) @ a["rows_"].T, detector.starts_.tolist()
    parts = []
    for start, end in pairwise(starts):
        k = min(detector.k, end - start)
        parts.append(every[:, start:end].topk(k)[0].double().sum(1) * detector.k / k)
    similarity = torch.stack(parts, 1)
    return -similarity.amax(1) / similarity.sum(1).clamp(min=1e-6), similarity.argmax(1)


def class_mean(a: Arrays, detector: Detector, features: Tensor) -> Answer:
    similarity = unit_length(features, dim=1) @ a["means_"].T
    return -similarity.amax(1), similarity.argmax(1)


def mahalanobis(a: Arrays, detector: Detector, features: Tensor) -> Answer:
    whitened = (features.double() - a["centre_"]) @ a["whitening_"]
    squares = (whitened * whitened).sum(1, keepdim=True) + (a["means_"] ** 2).sum(1)
    position = (squares - 2 * whitened @ a["means_"].T).argmin(1)
    return ((whitened - a["means_"][position]) ** 2).sum(1), position


def relative_mahalanobis(a: Arrays, detector: Detector, features: Tensor) -> Answer:
    distance, position = mahalanobis(a, detector, features)
    return distance - (((features.double() - a["centre_"]) @ a["background_"]) ** 2).sum(1), position


def vim(a: Arrays, detector: Detector, features: Tensor) -> Answer:
    residual = _length((features.double() - a["origin_"]) @ a["residual_space_"])
    if "head_" in a:
        values = _logits(a, features)
        return a["alpha_"] * residual - values.logsumexp(1), values.argmax(1)
    position = class_mean(a, detector, features)[1] if "means_" in a else torch.zeros_like(residual).long()
    return residual, position


def nnguide(a: Arrays, detector: NNGuide, features: Tensor) -> Answer:
    values = _logits(a, features)
    guidance = (unit_length(features, dim=1) @ a["bank_"].T).topk(detector.k)[0].double().mean(1)
    return -values.logsumexp(1) * guidance, values.argmax(1)


def msp(a: Arrays, detector: Detector, features: Tensor) -> Answer:
    values = _logits(a, features)
    shares = (values - values.logsumexp(1, keepdim=True)).exp().topk(len(a["head_"]))[0]
    return shares[:, 1:].sum(1), values.argmax(1)


def max_logit(a: Arrays, detector: Detector, features: Tensor) -> Answer:
    values = _logits(a, features)
    return -values.amax(1), values.argmax(1)


def energy(a: Arrays, detector: Energy, features: Tensor) -> Answer:
    values = _logits(a, features)
    return -detector.temperature * (values / detector.temperature).logsumexp(1), values.argmax(1)


def react(a: Arrays, detector: Detector, features: Tensor) -> Answer:
    values = _logits(a, torch.minimum(features.double(), a["limit_"]))
    return -values.logsumexp(1), values.argmax(1)


def fdbd(a: Arrays, detector: Detector, features: Tensor) -> Answer:
    values = _logits(a, features)
    position = values.argmax(1)
    distance = ((values.amax(1, keepdim=True) - values) / a["gaps_"][position]).sum(1) / max(1, values.shape[1] - 1)
    return -distance / _length(features.double() - a["mean_"]).clamp(min=1e-12), position


def nci(a: Arrays, detector: NCI, features: Tensor) -> Answer:
    position, away = _logits(a, features).argmax(1), features.double() - a["mean_"]
    along = (a["head_"][position, :-1] * away).sum(1) / _length(away).clamp(min=1e-12)
    return -along - detector.alpha * features.double().abs().sum(1), position


KNOWN = (
    *(deep_knn, mean_shift, class_knn, class_mean, mahalanobis, relative_mahalanobis, vim, nnguide),
    *(msp, max_logit, energy, react, fdbd, nci),
)
SCORES: dict[str, Callable[[Arrays, Any, Tensor], Answer]] = {function.__name__: function for function in KNOWN}
