"""What is measured: a frozen network, the images, and what the network makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as normalize_rows

from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.config import EvalConfig
from gradmix.eval.detectors import Detector
from gradmix.eval.detectors.options import build_detector
from gradmix.eval.features.arrays import Array
from gradmix.eval.features.extraction import Model, extract, raw_pixels, raw_pixels_bytes
from gradmix.eval.features.feature_sets import Parts, write_space
from gradmix.eval.runs.foreign import ELSEWHERE
from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import Config
from gradmix.ssl.data.images import ImageSet, normalize
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.networks.backbones import Backbone, Encoder, build_backbone

MOST_VIEWED = 2048  # images whose two views are compared
ALL = 2**62  # bytes
Space = dict[str, Tensor | np.memmap]  # by set (train, held_out, test) [N, D]


@dataclass
class Subject:
    """What every measure is given.

    Attributes:
        encoder: normalised images to features, in eval mode; None where there are features alone, and no images.
        spaces: the images as ``features``, and where there is a head as ``projections`` (L2-normalised). A training
            set of features beyond ``data.memory_gib`` is memory-mapped.
        asked: what gradmix-eval was asked for beside the usual.
        scores: what measures say of each test image, by name: ``[N]`` each, kept in ``features/scores.safetensors``.
        detectors: fitted ones, by name and space.
        probes: fitted linear ones, by space.
        head: features to projections, which are not normalised yet; None where there is none.
    """

    config: Config
    data: OpenSetData
    encoder: Encoder | None
    device: torch.device
    spaces: dict[str, Space]
    asked: EvalConfig = field(default_factory=EvalConfig)
    scores: dict[str, Tensor] = field(default_factory=dict)
    detectors: dict[tuple[str, str], Detector] = field(default_factory=dict)
    probes: dict[str, LinearProbe] = field(default_factory=dict)
    head: nn.Module | None = None

    def lacks(self, need: str) -> str | None:
        """Why a need (one of :data:`gradmix.eval.protocols.measure.NEEDS`) can't be met; None: it can be."""
        if need in ("images", "pixels") and self.encoder is None:
            return "there are features, and no images"
        if need == "start":
            return self.start if isinstance(self.start, str) else None
        if need == "projections" and need not in self.spaces:
            return (
                "there are features, and no projections"
                if self.encoder is None
                else "the checkpoint has no projection head"
            )
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
        """The images as ``features``, ``projections``, ``pixels`` (in [0, 1], at most 32 x 32), or as ``start``: the
        features of the network that training began with.
        """
        if name == "start" and name not in self.spaces:
            encoder, workers = self.start, self.config.data.workers
            assert isinstance(encoder, nn.Module)
            backbone = Backbone(encoder, self.data.train.size).to(self.device)
            sets = self.data.sets().items()
            self.spaces[name] = {part: extract(backbone, images, self.device, workers) for part, images in sets}
        if name == "pixels" and name not in self.spaces:
            self.spaces[name] = {part: raw_pixels(images) for part, images in self.data.sets().items()}
        return self.spaces[name]

    @cached_property
    def start(self) -> Encoder | str:
        """The network that training began with, ``encoder.init``; or why it can't be had."""
        config = self.config.encoder
        if config.init is None or self.config.method.name == ELSEWHERE or self.config.data.image_size is None:
            return "it was random, or there was no training here"
        try:
            return build_backbone(config, self.config.data.image_size)
        except (ValueError, OSError) as error:
            return str(error)

    @cached_property
    def known(self) -> Tensor:
        """Which test images are of known classes, ``[N]``."""
        return self.data.test.labels >= 0

    def known_test(self, space: str) -> tuple[Tensor, Tensor]:
        """The test images of known classes ``[n, D]``, and their labels ``[n]``."""
        return self.space(space)["test"][self.known], self.data.test.labels[self.known]

    def linear_probe(self, space: str = "features") -> LinearProbe:
        """Fitted to the training images in a space, once."""
        if space not in self.probes:
            probe = LinearProbe(seed=self.config.seed, device=self.device)
            self.probes[space] = probe.fit(self.space(space)["train"], self.data.train.labels)
        return self.probes[space]

    def detector(self, name: str, space: str) -> Detector:
        """A detector with the run's options, fitted to the training images in a space, once; calibrated where images
        were held out. Where it takes a head, it gets the linear probe's of that space.
        """
        if (name, space) in self.detectors:
            return self.detectors[name, space]
        detector, images = build_detector(name, self.config.detector_options), self.space(space)
        labels = self.data.train.labels if self.data.classes else None
        head = {}  # other packages' detectors may have a fit of their own, of features and labels
        if detector.TAKES_HEAD and labels is not None:
            probe = self.linear_probe(space)
            head = {"head": (probe.weight_, probe.bias_)}
        detector.fit(images["train"], labels, **head)
        if "held_out" in images:
            detector.calibrate(images["held_out"], self.config.accept, self.config.per_class and labels is not None)
        self.detectors[name, space] = detector
        return detector

    def look(self, images: Tensor) -> Tensor:
        """Images ``[n, 3, S, S]`` uint8 to features ``[n, F]``, on the images' device."""
        assert self.encoder is not None
        return self.encoder(normalize(images, self.encoder.constants))

    @torch.inference_mode()
    def in_all_spaces(self, images: Tensor) -> dict[str, Array]:
        """Other images, ``[n, 3, S, S]`` uint8, in every space that can be had (see `space`): ``[n, D]`` on the CPU."""
        features = self.look(images.to(self.device)).float()
        pixels = raw_pixels(ImageSet(torch.zeros(len(images), dtype=torch.long), images.shape[-1], images))
        seen: dict[str, Array] = {"features": features.cpu(), "pixels": pixels}
        if self.head is not None:
            seen["projections"] = normalize_rows(self.head(features), dim=1).cpu()
        return seen

    def two_views(self) -> tuple[Tensor, Tensor]:
        """Features of two random views of up to ``MOST_VIEWED`` evenly spaced training images, always the same."""
        images, encoder = self.data.train, self.encoder
        assert encoder is not None
        rows = torch.linspace(0, len(images) - 1, min(len(images), MOST_VIEWED)).long()
        views = TwoViews(self.config.data.augment, images.size, views=1, constants=encoder.constants)

        def features(seed: int) -> Tensor:
            look, workers = (lambda batch: encoder(views(batch, seed))), self.config.data.workers
            return extract(look, images.select(rows), self.device, workers)

        return features(0), features(1)


def subject_of(run_dir: Path, out: Path, config: Config, data: OpenSetData, device: str, asked: EvalConfig) -> Subject:
    """A trained run with the features of its images.

    They are read from ``features/`` of ``out``, its parent (``out`` may be a new folder inside the one that it is about
    to replace) or ``run_dir`` where they are of the same weights and images; else extracted, and written to ``out``.
    """
    model, sets, limit = Model(run_dir, device), data.sets(), int(config.data.memory_gib * 2**30)
    spaces: dict[str, Space] = {space: {} for space in model.widths}
    for name, images in sets.items():
        here, *there = (folder / "features" / f"{name}.safetensors" for folder in (out, out.parent, run_dir))
        most = limit if name == "train" else ALL
        arrays = model.features(images, here, there, config.data.workers, most)
        for space in spaces:
            spaces[space][name] = arrays[space]
    return Subject(config, data, model.backbone.encoder, model.device, spaces, asked, head=model.head)


def subject_of_features(
    out: Path, config: Config, data: OpenSetData, device: str, asked: EvalConfig, parts: Mapping[str, Parts]
) -> Subject:
    """Features from elsewhere, without network and images; they are written to ``features/`` of ``out``.

    Args:
        data, parts: as :func:`gradmix.eval.features.feature_sets.divide` gives them.
    """
    limit, spaces = int(config.data.memory_gib * 2**30), dict[str, Space]()
    for name, images in data.sets().items():
        arrays = write_space(out / "features" / f"{name}.safetensors", parts[name], images.labels)
        for space in set(arrays) - {"labels"}:
            large = name == "train" and arrays[space].nbytes > limit
            spaces.setdefault(space, {})[name] = arrays[space] if large else torch.from_numpy(arrays[space])
    if any(set(one) != set(data.sets()) for one in spaces.values()):
        del spaces["projections"]  # of some sets only
    return Subject(config, data, None, torch.device(device), spaces, asked)
