"""From a trained run to its numbers: kNN, linear probe, open-set detectors, and the raw-pixel baseline."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradmix.eval import metrics
from gradmix.eval.detectors import DETECTORS, DeepKNN, Detector
from gradmix.eval.features import Model, raw_pixels
from gradmix.eval.knn import KNNClassifier
from gradmix.eval.linear import LinearProbe
from gradmix.eval.scoring import save_scorer
from gradmix.ssl.config import Config
from gradmix.ssl.data import OpenSetData
from gradmix.ssl.files import write_json, write_tensors
from gradmix.ssl.run import provenance

# ClassKNN looks at the projections, as its authors do; every other detector at the backbone's features.
SPACES = {"class_knn": "projections"}


def evaluate(run_dir: Path, config: Config, data: OpenSetData, device: str = "cpu") -> dict[str, Any]:
    """Evaluate a trained run; writes ``features/``, ``detector/`` and ``metrics.json``, and returns the metrics.

    What the data can't answer is left out and listed under ``skipped``: no classes, no unknown images.

    Raises:
        ValueError: bad settings, such as k larger than the training set.
    """
    detectors = [parse_detector(entry) for entry in config.detectors]
    model = Model(run_dir, device)
    sets = {"train": data.train, "held_out": data.held_out, "test": data.test}
    found: dict[str, dict[str, Tensor]] = {}
    for name, images in sets.items():
        if len(images):
            found[name] = model.extract(images, config.data.workers, progress=True)
            write_tensors(run_dir / "features" / f"{name}.safetensors", found[name])
    result: dict[str, Any] = {"skipped": {}}
    if data.classes:
        result |= closed_set(config, found["train"], found["test"])
        pixels = {name: raw_pixels(sets[name]) for name in ("train", "test")}
        known = data.test.labels >= 0
        knn = KNNClassifier(config.knn_k, config.knn_temperature).fit(pixels["train"], data.train.labels)
        predicted = knn.predict(pixels["test"][known])
        result["knn_pixels/top1"] = metrics.closed_set_accuracy(predicted, data.test.labels[known])
    else:
        result["skipped"]["knn, linear, osr"] = "the images have no classes"
    if data.classes and (data.test.labels < 0).any():
        for key, kind, space in detectors:
            spaces = {name: part[space] for name, part in found.items()}
            result |= open_set(key, kind(), spaces, data)
        held_out = {"held_out": raw_pixels(data.held_out)} if len(data.held_out) else {}
        result |= open_set("pixels", DeepKNN(), pixels | held_out, data)
    elif data.classes:
        result["skipped"]["osr"] = "the test set has no unknown classes"
    primary = DeepKNN().fit(found["train"]["features"], data.train.labels if data.classes else None)
    if "held_out" in found:
        primary.calibrate(found["held_out"]["features"])
    else:
        result["skipped"]["threshold"] = "data.holdout=0 leaves no known images to calibrate on"
    save_scorer(run_dir / "detector", primary, run_dir / "backbone.safetensors", data.classes, data.train.files)
    training = run_dir / "training.json"
    result |= json.loads(training.read_text()) if training.is_file() else {}
    result |= provenance()
    write_json(run_dir / "metrics.json", result)
    return result


def closed_set(config: Config, train: dict[str, Tensor], test: dict[str, Tensor]) -> dict[str, float]:
    """kNN and linear probe on the known classes, accuracies in [0, 1]."""
    known = test["labels"] >= 0
    features, labels = test["features"][known], test["labels"][known]
    knn = KNNClassifier(config.knn_k, config.knn_temperature).fit(train["features"], train["labels"])
    probe = LinearProbe(seed=config.seed).fit(train["features"], train["labels"])
    return {
        "knn/top1": metrics.closed_set_accuracy(knn.predict(features), labels),
        "linear/top1": metrics.closed_set_accuracy(probe.predict(features), labels),
    }


def open_set(key: str, detector: Detector, found: dict[str, Tensor], data: OpenSetData) -> dict[str, float]:
    """One detector's numbers, ``osr/<key>/...``, in [0, 1].

    Args:
        found: features of ``train``, ``test`` and, for the calibrated threshold, ``held_out``.
    """
    known = data.test.labels >= 0
    detector.fit(found["train"], data.train.labels)
    scores = detector.score(found["test"])
    known_scores, unknown_scores = scores[known], scores[~known]
    labels = data.test.labels[known]
    correct = detector.classify(found["test"][known]) == labels
    values = {
        "auroc": metrics.auroc(known_scores, unknown_scores),
        "aupr": metrics.aupr(known_scores, unknown_scores),
        "aupr_known": metrics.aupr(known_scores, unknown_scores, positive="known"),
        "fpr95": metrics.fpr_at_tpr(known_scores, unknown_scores),
        "fpr95_known": metrics.fpr_at_tpr(known_scores, unknown_scores, positive="known"),
        "oscr": metrics.oscr(known_scores, unknown_scores, correct),
        "closed_set_accuracy": float(correct.double().mean()),
    }
    if "held_out" in found:
        detector.calibrate(found["held_out"])
        values["balanced_accuracy"] = metrics.balanced_accuracy(known_scores, unknown_scores, detector.threshold)
    return {f"osr/{key}/{name}": value for name, value in values.items()}


def parse_detector(entry: str) -> tuple[str, type[Detector], str]:
    """``NAME`` or ``NAME@features`` or ``NAME@projections`` to (metric key, class, space).

    Raises:
        ValueError: unknown detector or space.
    """
    name, _, space = entry.partition("@")
    if name not in DETECTORS:
        raise ValueError(f"detectors: expected some of {', '.join(DETECTORS)}, got {name!r}")
    if space not in ("", "features", "projections"):
        raise ValueError(f"detectors: {entry!r}: expected @features or @projections")
    return entry.replace("@", "_"), DETECTORS[name], space or SPACES.get(name, "features")


def table(result: dict[str, Any]) -> str:
    """What a person wants to see first, as text."""
    lines = []
    spread = {key.removesuffix("/std"): value for key, value in result.items() if key.endswith("/std")}

    def cell(key: str) -> str:
        if key not in result:
            return "-"
        return f"{100 * result[key]:.2f}" + (f" ± {100 * spread[key]:.2f}" if key in spread else "")

    if "knn/top1" in result:
        lines += ["", "known classes, accuracy %"]
        for label, key in (
            ("kNN", "knn/top1"),
            ("linear probe", "linear/top1"),
            ("kNN on raw pixels", "knn_pixels/top1"),
        ):
            lines.append(f"  {label:<20}{cell(key):>16}")
    keys = [key.split("/")[1] for key in result if key.startswith("osr/") and key.endswith("/auroc")]
    if keys:
        columns = ("auroc", "aupr", "fpr95", "fpr95_known", "oscr", "closed_set_accuracy")
        titles = ("AUROC", "AUPR", "FPR95", "FPR95 known", "OSCR", "closed set")
        width = 16 if spread else 13
        lines += ["", "unknown against known classes, %", "  " + " " * 20 + "".join(f"{t:>{width}}" for t in titles)]
        for key in keys:
            label = "deep_knn on pixels" if key == "pixels" else key
            lines.append(f"  {label:<20}" + "".join(f"{cell(f'osr/{key}/{c}'):>{width}}" for c in columns))
        lines += [
            "",
            "  FPR95: known images flagged when 95 % of the unknown are caught; FPR95 known: unknown images accepted",
            "  when 95 % of the known are. Both, lower is better.",
        ]
    for what, why in result.get("skipped", {}).items():
        lines.append(f"  not measured: {what} ({why})")
    return "\n".join(lines)


def device_of(config: Config) -> str:
    """Where to extract features: the accelerator that training would use."""
    wants_cpu = config.trainer.get("accelerator", "auto") == "cpu"
    return "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"
