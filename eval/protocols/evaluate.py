"""From a trained run to its numbers: the loop over measures, the saved detector, and the files of both."""

from pathlib import Path
from typing import Any

import torch

from gradmix.eval.config import EvalConfig
from gradmix.eval.features.cache import image_hashes
from gradmix.eval.protocols.measures import choose_measures, measure_all
from gradmix.eval.protocols.subject import subject_of
from gradmix.eval.runs.numbers import read_training
from gradmix.eval.scoring.scorer import save_scorer
from gradmix.ssl.config import Config
from gradmix.ssl.data.open_set import OpenSetData
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
    """Evaluate a trained run; writes ``features/``, ``detector/`` and ``metrics.json``, and returns the metrics.

    Args:
        run_dir: where the weights are.
        out: folder to write to, ``run_dir`` unless given.
        asked: what gradmix-eval was asked for beside the usual; its kNN settings, protocols, few labels and measures
            count here.

    Features are read from ``features/`` where they are of the same weights and images.
    ``features/scores.safetensors`` holds what every detector says of every test image, for
    :func:`gradmix.eval.runs.compare.compare`. What the data can't answer is left out and listed under ``skipped``: no
    classes, no known or no unknown test images; so is a class spread that is infinite.

    Raises:
        ValueError: bad settings, such as k larger than the training set.
    """
    out = run_dir if out is None else out
    asked = EvalConfig() if asked is None else asked
    training = run_dir / "training.json"
    said = read_training(training) if training.exists() else {}
    measures = choose_measures(config, asked, data)
    subject = subject_of(run_dir, out, config, data, device, asked, data.sets())
    if data.bad:
        write_json(out / "bad_images.json", data.bad)
    numbers, skipped = measure_all(measures, subject)
    (out / "features" / "scores.safetensors").unlink(missing_ok=True)  # an earlier evaluation's, of other images
    if not subject.lacks("classes") and not subject.lacks("unknown images"):
        about = {"labels": data.test.labels, "images": image_hashes(data.test)}
        write_tensors(out / "features" / "scores.safetensors", about | subject.scores)
    if subject.primary.threshold is None:
        skipped["threshold"] = "data.holdout=0 leaves no known images to calibrate on"
    save_scorer(out / "detector", subject.primary, run_dir / "backbone.safetensors", data.classes, data.train)
    result: dict[str, Any] = {"skipped": skipped, "data/bad_images": len(data.bad)} | numbers
    if config.detector_options:
        result["detector_options"] = dict(config.detector_options)
    if config.data.unknown_root is not None:
        result["data/unknown_root"] = config.data.unknown_root
    result |= {key: value for key, value in said.items() if key not in result} | provenance()  # what is measured counts
    write_json(out / "metrics.json", result)
    return result


def device_of(config: Config) -> str:
    """Where to extract features: the accelerator that training would use."""
    wants_cpu = config.trainer.get("accelerator", "auto") == "cpu"
    return "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"
