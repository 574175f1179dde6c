"""From a trained run to its numbers: kNN, linear probe, open-set detectors, and the raw-pixel baseline."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmix.eval import catalogue, metrics
from gradmix.eval.classifiers.knn import KNNClassifier
from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.config import EvalConfig
from gradmix.eval.detectors import DETECTORS, PRIMARY, Detector
from gradmix.eval.features.extraction import Model, raw_pixels, raw_pixels_bytes
from gradmix.eval.protocols.probes import check_asked, further_probes, knn_accuracies, quality_numbers, two_views
from gradmix.eval.runs.compare import image_hashes
from gradmix.eval.scoring.scorer import save_scorer
from gradmix.registry import nearest
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.runs.files import write_json, write_tensors
from gradmix.ssl.runs.folder import provenance

# ClassKNN looks at the projections, as its authors do; every other detector at the backbone's features.
SPACES = {"class_knn": "projections"}
ALL = 2**62  # bytes


def evaluate(
    run_dir: Path,
    config: Config,
    data: OpenSetData,
    device: str = "cpu",
    out: Path | None = None,
    asked: EvalConfig | None = None,
) -> dict[str, Any]:
    """Evaluate a trained run; writes ``features/``, ``detector/`` and ``metrics.json``, and returns the metrics.

    Args:
        run_dir: where the weights are.
        out: folder to write to, ``run_dir`` unless given.
        asked: what gradmix-eval was asked for beside the usual; its kNN settings, protocols and few labels count here.

    Features are read from ``features/`` where they are of the same weights and images.
    ``features/scores.safetensors`` holds what every detector says of every test image, for
    :func:`gradmix.eval.runs.compare.compare`. What the data can't answer is left out and listed under ``skipped``: no
    classes, no known or no unknown test images; so is a class spread that is infinite.

    Raises:
        ValueError: bad settings, such as k larger than the training set.
    """
    out = run_dir if out is None else out
    asked = EvalConfig() if asked is None else asked
    check_asked(asked, config, data)
    check_neighbours(config, data)
    options = dict(config.detector_options)
    detectors = [(key, build_detector(kind.NAME, options), space) for key, kind, space in check_detectors(config)]
    model = Model(run_dir, device)
    result: dict[str, Any] = {"skipped": {}, "data/bad_images": len(data.bad)}
    if model.head is None:
        for key in [key for key, _, space in detectors if space == "projections"]:
            result["skipped"][f"osr/{key}"] = "the checkpoint has no projection head"
        detectors = [entry for entry in detectors if entry[2] == "features"]
    sets = data.sets()
    found: dict[str, dict[str, Any]] = {}
    limit = int(config.data.memory_gib * 2**30)
    for name, images in sets.items():
        # the folder may be a new one inside that which it is about to replace
        here, *there = (folder / "features" / f"{name}.safetensors" for folder in (out, out.parent, run_dir))
        found[name] = model.features(images, here, there, config.data.workers, limit if name == "train" else ALL)
    if data.bad:
        write_json(out / "bad_images.json", data.bad)
    known = data.test.labels >= 0
    measurable = bool(data.classes) and bool(known.any())
    if measurable:
        knn, probe = classifiers(config, found["train"], model.device)
        features, labels = found["test"]["features"][known], data.test.labels[known]
        result |= knn_accuracies(asked, knn, features, labels, data.classes)
        result |= catalogue.of_predictions("linear", probe.predict(features), labels, data.classes)
        result["protocol/linear"] = str(probe)
        result |= further_probes(asked, config, model, data, found)
        pixels = {}
        if sum(raw_pixels_bytes(sets[name]) for name in found) <= limit:
            pixels = {name: raw_pixels(sets[name]) for name in found}
            knn = KNNClassifier(config.knn_k, config.knn_temperature).fit(pixels["train"], data.train.labels)
            result |= catalogue.of_predictions("knn_pixels", knn.predict(pixels["test"][known]), labels)
        else:
            result["skipped"]["raw pixels"] = "they exceed data.memory_gib"
        result |= catalogue.of_predictions("majority", data.train.labels.mode().values.expand_as(labels), labels)
        if absent := [name for label, name in enumerate(data.classes) if not (labels == label).any()]:
            result["skipped"][f"recall of {', '.join(absent)}"] = "the test set has no such images"
    else:
        why = "the test set has no images of known classes" if data.classes else "the images have no classes"
        result["skipped"]["knn, linear, osr"] = why
    pair = two_views(model.backbone.encoder, data.train, config.data.augment, model.device)
    result |= quality_numbers(found["train"]["features"], data.train.labels if data.classes else None, pair)
    if data.classes and "quality/class_spread" not in result:
        result["skipped"]["quality/class_spread"] = "the class means coincide, which makes it infinite"
    (out / "features" / "scores.safetensors").unlink(missing_ok=True)  # an earlier evaluation's, of other images
    if measurable and not known.all():
        scores = {"labels": data.test.labels, "images": image_hashes(data.test)}
        baseline = [("pixels", build_detector(PRIMARY, options), None)] if pixels else []
        for key, detector, space in [*detectors, *baseline]:
            spaces = pixels if space is None else {name: part[space] for name, part in found.items()}
            head = (probe.weight_, probe.bias_) if space == "features" else None
            values, score, correct = open_set(detector, spaces, data, head)
            if key == PRIMARY:
                interval = metrics.bootstrap(metrics.auroc, score[known], score[~known])
                values |= {"auroc_low": interval.low, "auroc_high": interval.high}
            result |= {f"osr/{key}/{name}": value for name, value in values.items()}
            scores |= {f"{key}/score": score, f"{key}/correct": correct}
        write_tensors(out / "features" / "scores.safetensors", scores)
    elif measurable:
        result["skipped"]["osr"] = "the test set has no unknown classes"
    primary = build_detector(PRIMARY, options)
    primary.fit(found["train"]["features"], data.train.labels if data.classes else None)
    if "held_out" in found:
        primary.calibrate(found["held_out"]["features"])
    else:
        result["skipped"]["threshold"] = "data.holdout=0 leaves no known images to calibrate on"
    save_scorer(out / "detector", primary, run_dir / "backbone.safetensors", data.classes, data.train)
    if options:
        result["detector_options"] = options
    if config.data.unknown_root is not None:
        result["data/unknown_root"] = config.data.unknown_root
    training = run_dir / "training.json"
    result |= json.loads(training.read_text()) if training.is_file() else {}
    result |= provenance()
    write_json(out / "metrics.json", result)
    return result


def classifiers(
    config: Config, train: dict[str, Any], device: torch.device | None = None
) -> tuple[KNNClassifier, LinearProbe]:
    """kNN and linear probe, fitted to the training set's backbone features."""
    knn = KNNClassifier(config.knn_k, config.knn_temperature).fit(train["features"], train["labels"])
    return knn, LinearProbe(seed=config.seed, device=device).fit(train["features"], train["labels"])


def open_set(
    detector: Detector, found: dict[str, Tensor], data: OpenSetData, head: tuple | None = None
) -> tuple[dict[str, float], Tensor, Tensor]:
    """What one detector is worth.

    Args:
        found: features of ``train``, ``test`` and, for the calibrated threshold, ``held_out``.
        head: weight ``[K, F]`` and bias ``[K]`` of a linear classifier, for the detectors that use one.

    Returns:
        Its numbers in [0, 1] by name; for each test image the score ``[N]``, and whether the image is known and its
        closest class is the right one ``[N]``.
    """
    known = data.test.labels >= 0
    takes_head = head is not None and "head" in inspect.signature(detector.fit).parameters
    detector.fit(found["train"], data.train.labels, **({"head": head} if takes_head else {}))
    score = detector.score(found["test"])
    correct = (detector.classify(found["test"]) == data.test.labels) & known
    if "held_out" in found:
        detector.calibrate(found["held_out"])
    scores = catalogue.Scores(score[known], score[~known], correct[known], detector.threshold)
    return catalogue.of_scores(scores), score, correct


def check_detectors(config: Config) -> list[tuple[str, type[Detector], str]]:
    """Every entry of ``detectors`` as :func:`parse_detector` reads it.

    Raises:
        ValueError: unknown detectors, or ``detector_options`` that they don't have.
    """
    for name in config.detector_options:
        build_detector(name, config.detector_options)
    return [parse_detector(entry) for entry in config.detectors]


def check_neighbours(config: Config, data: OpenSetData) -> None:
    """
    Raises:
        ValueError: a number of neighbours that the training set does not have, said before anything is computed.
    """
    names = [PRIMARY, *(kind.NAME for _, kind, _ in check_detectors(config) if data.classes)]
    asked = {
        f"detector_options.{name}.k": getattr(build_detector(name, config.detector_options), "k", 1) for name in names
    }
    if data.classes:
        asked["knn_k"] = config.knn_k
    for key, k in asked.items():
        if not 1 <= k <= len(data.train):
            raise ValueError(f"{key}: expected 1 to {len(data.train)}, the size of the training set, got {k}")


def build_detector(name: str, options: dict[str, dict[str, Any]]) -> Detector:
    """An unfitted detector with its part of ``detector_options``.

    Raises:
        ValueError: unknown detector or parameter, or a value of another type.
    """
    kind = DETECTORS.pick("detector_options", name)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    given = options.get(name) or {}
    if not isinstance(given, dict):
        raise ValueError(f"detector_options.{name}: expected parameters, such as detector_options.deep_knn.k=10")
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(f"detector_options.{name}.{key}: no such parameter; {nearest(key, defaults)}")
        expected = int if defaults[key] is None else type(defaults[key])
        if type(value) is not expected and not (expected is float and type(value) is int) and value != defaults[key]:
            raise ValueError(f"detector_options.{name}.{key}: expected {expected.__name__}, got {value!r}")
    return kind(**given)


def parse_detector(entry: str) -> tuple[str, type[Detector], str]:
    """``NAME`` or ``NAME@features`` or ``NAME@projections`` to (metric key, class, space).

    Raises:
        ValueError: unknown detector or space.
    """
    name, _, space = entry.partition("@")
    kind = DETECTORS.pick("detectors", name)
    if space not in ("", "features", "projections"):
        raise ValueError(f"detectors: {entry!r}: expected @features or @projections")
    return entry.replace("@", "_"), kind, space or SPACES.get(name, "features")


def device_of(config: Config) -> str:
    """Where to extract features: the accelerator that training would use."""
    wants_cpu = config.trainer.get("accelerator", "auto") == "cpu"
    return "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"
