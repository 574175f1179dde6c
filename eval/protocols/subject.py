"""What is measured: a frozen network, the images, and what the network makes of them."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.config import EvalConfig
from gradmix.eval.detectors import Detector
from gradmix.eval.detectors.options import build_detector
from gradmix.eval.features.extraction import Model, extract, raw_pixels, raw_pixels_bytes
from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import Config
from gradmix.ssl.data.images import normalize
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.networks.backbones import Encoder

MOST_VIEWED = 2048  # images whose two views are compared
ALL = 2**62  # bytes
Space = dict[str, Tensor | np.memmap]  # by set (train, held_out, test) [N, D]


@dataclass
class Subject:
    """What every measure is given.

    Attributes:
        encoder: normalised images to features, in eval mode.
        spaces: the images as ``features``, and where there is a head as ``projections`` (L2-normalised). A training
            set of features beyond ``data.memory_gib`` is memory-mapped.
        asked: what gradmix-eval was asked for beside the usual.
        scores: what measures say of each test image, by name: ``[N]`` each, kept in ``features/scores.safetensors``.
        detectors: fitted ones, by name and space.
    """

    config: Config
    data: OpenSetData
    encoder: Encoder
    device: torch.device
    spaces: dict[str, Space]
    asked: EvalConfig = field(default_factory=EvalConfig)
    scores: dict[str, Tensor] = field(default_factory=dict)
    detectors: dict[tuple[str, str], Detector] = field(default_factory=dict)

    def lacks(self, need: str) -> str | None:
        """Why a need (one of :data:`gradmix.eval.protocols.measures.NEEDS`) can't be met; None: it can be."""
        if need == "projections" and need not in self.spaces:
            return "the checkpoint has no projection head"
        if need == "classes" and not self.data.classes:
            return "the images have no classes"
        if need == "classes" and not self.known.any():
            return "the test set has no images of known classes"
        if need == "unknown images" and self.known.all():
            return "the test set has no unknown classes"
        size = sum(map(raw_pixels_bytes, self.data.sets().values()))
        if need == "pixels" and need not in self.spaces and size > self.config.data.memory_gib * 2**30:
            return "they exceed data.memory_gib"
        return None

    def space(self, name: str) -> Space:
        """The images as ``features``, ``projections`` or ``pixels`` (in [0, 1], at most 32 x 32)."""
        if name == "pixels" and name not in self.spaces:
            self.spaces[name] = {part: raw_pixels(images) for part, images in self.data.sets().items()}
        return self.spaces[name]

    @cached_property
    def known(self) -> Tensor:
        """Which test images are of known classes, ``[N]``."""
        return self.data.test.labels >= 0

    def known_test(self, space: str) -> tuple[Tensor, Tensor]:
        """The test images of known classes ``[n, D]``, and their labels ``[n]``."""
        return self.space(space)["test"][self.known], self.data.test.labels[self.known]

    @cached_property
    def linear_probe(self) -> LinearProbe:
        """Fitted to the training features."""
        probe = LinearProbe(seed=self.config.seed, device=self.device)
        return probe.fit(self.space("features")["train"], self.data.train.labels)

    def detector(self, name: str, space: str) -> Detector:
        """A detector with the run's options, fitted to the training images in a space, once; calibrated where images
        were held out. Where it takes a head, it gets the linear probe's.
        """
        if (name, space) in self.detectors:
            return self.detectors[name, space]
        detector, images = build_detector(name, self.config.detector_options), self.space(space)
        labels = self.data.train.labels if self.data.classes else None
        head = {}
        if labels is not None and space == "features" and "head" in inspect.signature(detector.fit).parameters:
            head = {"head": (self.linear_probe.weight_, self.linear_probe.bias_)}
        detector.fit(images["train"], labels, **head)
        if "held_out" in images:
            detector.calibrate(images["held_out"], self.config.accept, self.config.per_class and labels is not None)
        self.detectors[name, space] = detector
        return detector

    def look(self, images: Tensor) -> Tensor:
        """Images ``[n, 3, S, S]`` uint8 to features ``[n, F]``, on the images' device."""
        return self.encoder(normalize(images, self.encoder.constants))

    def two_views(self) -> tuple[Tensor, Tensor]:
        """Features of two random views of up to ``MOST_VIEWED`` evenly spaced training images, always the same."""
        images = self.data.train
        rows = torch.linspace(0, len(images) - 1, min(len(images), MOST_VIEWED)).long()
        views = TwoViews(self.config.data.augment, images.size, views=1, constants=self.encoder.constants)

        def features(seed: int) -> Tensor:
            return extract(lambda batch: self.encoder(views(batch, seed)), images.select(rows), self.device)

        return features(0), features(1)


def subject_of(
    run_dir: Path, out: Path, config: Config, data: OpenSetData, device: str, asked: EvalConfig, names: Iterable[str]
) -> Subject:
    """A trained run with the features of some sets, by name.

    They are read from ``features/`` of ``out``, its parent (``out`` may be a new folder inside the one that it is about
    to replace) or ``run_dir`` where they are of the same weights and images; else extracted, and written to ``out``.
    """
    model, sets, limit = Model(run_dir, device), data.sets(), int(config.data.memory_gib * 2**30)
    spaces: dict[str, Space] = {space: {} for space in model.widths}
    for name in names:
        here, *there = (folder / "features" / f"{name}.safetensors" for folder in (out, out.parent, run_dir))
        most = limit if name == "train" else ALL
        arrays = model.features(sets[name], here, there, config.data.workers, most)
        for space in spaces:
            spaces[space][name] = arrays[space]
    return Subject(config, data, model.backbone.encoder, model.device, spaces, asked)
