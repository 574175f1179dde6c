"""From a trained run to its numbers: the loop over measures, the saved detector, and the files of both."""

import shutil
from pathlib import Path
from typing import Any

from gradmix.eval.config import EvalConfig
from gradmix.eval.detectors import PRIMARY
from gradmix.eval.detectors.calibration import needed
from gradmix.eval.detectors.options import parse_detector
from gradmix.eval.features.cache import image_hashes
from gradmix.eval.protocols.measure import Measure
from gradmix.eval.protocols.measures import choose_measures, measure_all
from gradmix.eval.protocols.subject import Subject, subject_of
from gradmix.eval.runs.numbers import made_with, read_training
from gradmix.eval.scoring.scorer import save_scorer
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.machine import pick_device
from gradmix.ssl.runs.files import write_json, write_tensors
from gradmix.ssl.runs.folder import provenance


def evaluate(
    run_dir: Path,
    config: Config,
    data: OpenSetData,
    device: str = "cpu",
    out: Path | None = None,
    asked: EvalConfig | None = None,
) -> dict[str, Any]:
    """Evaluate a trained run; writes ``features/``, ``detector/``, ``detectors/`` and ``metrics.json``.

    Args:
        run_dir: where the weights are.
        out: folder to write to, ``run_dir`` unless given.
        asked: what gradmix-eval was asked for beside the usual; its kNN settings, protocols, few labels and measures
            count here.

    Features are read from ``features/`` where they are of the same weights and images.
    ``features/scores.safetensors`` holds what every detector says of every test image, for
    :func:`gradmix.eval.runs.compare.compare`. What the data can't answer is left out and listed under ``skipped``: no
    classes, no known or no unknown test images; so is a class spread that is infinite.

    Returns:
        The metrics.

    Raises:
        ValueError: bad settings, such as k larger than the training set.
    """
    out = run_dir if out is None else out
    asked = EvalConfig() if asked is None else asked
    training = run_dir / "training.json"
    said = read_training(training) if training.exists() else {}
    measures = choose_measures(config, asked, data)
    return measured(subject_of(run_dir, out, config, data, device, asked), measures, out, run_dir, said)


def measured(
    subject: Subject,
    measures: list[Measure],
    out: Path,
    run_dir: Path | None = None,
    said: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """As :func:`evaluate`, of a subject.

    Args:
        run_dir: where the weights are; None: there are none.
        said: what the training says of itself.
    """
    config, data, said = subject.config, subject.data, said or {}
    if data.bad:
        write_json(out / "bad_images.json", data.bad)
    numbers, skipped = measure_all(measures, subject)
    (out / "features" / "scores.safetensors").unlink(missing_ok=True)  # an earlier evaluation's, of other images
    if not subject.lacks("classes"):
        about = {"labels": data.test.labels, "images": image_hashes(data.test, read=subject.encoder is not None)}
        write_tensors(out / "features" / "scores.safetensors", about | subject.scores)
    held_out, fewest = len(data.held_out), needed(config.accept)
    if not held_out:
        skipped["threshold"] = f"no known images are held out to calibrate on (data.holdout={config.data.holdout:g})"
    elif held_out < fewest:
        takes = f"takes {fewest} held-out images, not {held_out}" if config.accept < 1 else "can't be promised"
        why = f"accept={config.accept:g} {takes}; the threshold is their largest score"
        skipped["the promise of the threshold"] = why
    save_detectors(out, run_dir, subject)
    result: dict[str, Any] = {"skipped": skipped, "data/bad_images": len(data.bad)} | data.copies | numbers
    if data.classes:
        unknown = int((data.test.labels < 0).sum())
        result |= {"data/test_known": len(data.test) - unknown, "data/test_unknown": unknown}
    result |= made_with(config)
    result |= {key: value for key, value in said.items() if key not in result}  # what is measured counts
    result |= provenance(subject.device)
    write_json(out / "metrics.json", result)
    return result


def save_detectors(out: Path, run_dir: Path | None, subject: Subject) -> None:
    """Write the detector that ``primary`` names to ``detector/``, and those that were measured to ``detectors/KEY/``.

    The one that the report explains with, deep_knn on features, is always among them. One that lacks classes or
    projections is left out.

    Raises:
        ValueError: it is the primary one.
    """
    shutil.rmtree(out / "detectors", ignore_errors=True)  # an earlier evaluation's
    (out / "detectors").mkdir(parents=True)
    chosen = parse_detector(subject.config.primary)[0]
    for entry in dict.fromkeys([subject.config.primary, *subject.config.detectors, PRIMARY]):
        key, kind, space = parse_detector(entry)
        no_classes = "the images have no classes" if kind.NEEDS_LABELS and not subject.data.classes else None
        if why := no_classes or subject.lacks(space):
            if key == chosen:
                raise ValueError(f"primary: {entry} can't be had, {why}")
            continue
        folder = out / "detector" if key == chosen else out / "detectors" / key
        detector = subject.detector(kind.NAME, space)
        save_scorer(folder, detector, run_dir, subject.data, space, out / "features")


def device_of(config: Config, asked: str = "auto") -> str:
    """Where the network and the probes run: ``asked``; with ``auto``, the CPU if training was kept on it.

    Raises:
        ValueError: this machine has no such device.
    """
    wants_cpu = config.trainer.get("accelerator", "auto") == "cpu"
    return pick_device("cpu" if asked == "auto" and wants_cpu else asked)
