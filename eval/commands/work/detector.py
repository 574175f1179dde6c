"""What gradmix-detector does: look into a saved detector, or change it."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from gradmix.eval.config import DetectorConfig
from gradmix.eval.counted import counted
from gradmix.eval.detectors.store import read_manifest
from gradmix.eval.runs.portable import export_scorer
from gradmix.eval.scoring.growth import add_images, read_space, without_class, write_grown
from gradmix.eval.scoring.scorer import FITTED_TO, Scorer, detector_in, find_images
from gradmix.ssl.machine import pick_device
from gradmix.ssl.runs.outputs import check_output, check_writable
from gradmix.ssl.runs.whole_folder import whole_folder

TAKES = {"info": (), "add": ("images", "class_name", "out"), "remove": ("class_name", "out"), "export": ("out",)}
NEEDS = TAKES | {"add": ("images", "out")}


def run_detector(config: DetectorConfig) -> None:
    said = {"images": config.images, "class_name": config.class_name, "out": config.out}
    for key, value in said.items():
        typed = "class" if key == "class_name" else key
        if value is None and key in NEEDS[config.action]:
            raise ValueError(f"{typed}: missing; give it as {typed}=VALUE")
        if value is not None and key not in TAKES[config.action]:
            raise ValueError(f"{typed}: gradmix-detector {config.action} takes none")
    if config.action == "info":
        print("\n".join(about(Scorer(config.detector))))
        return
    paths = find_images(config.images or "") if config.action == "add" else []
    folder, out = detector_in(config.detector), Path(config.out or "").expanduser()
    if config.action == "export":
        check_output("out", out, folders=[folder])
        check_writable("out", out.parent, [out.name])
        scorer = Scorer(folder)
        if config.accept is not None or config.per_class is not None:
            scorer.detector.accept(config.accept, config.per_class)
        export_scorer(scorer, out)
        print(f"{out}: written; images [N, 3, S, S] in [0, 1] to score, class_index, is_unknown")
        return
    if not (out.exists() and folder.exists() and out.samefile(folder)):
        if out.exists():
            raise ValueError(f"out: {out} is there already; give a new name, or the detector's own to replace it")
        images = Path(config.images or "").expanduser()
        check_output("out", out, paths, [folder, *([images] if paths and images.is_dir() else [])])
    check_writable("out", out.resolve().parent)
    with whole_folder(out) as new:
        scorer = Scorer(folder, pick_device(config.device))
        if config.action == "add":
            name, share = config.class_name, config.holdout
            kept = add_images(scorer, paths, name, share, config.seed, config.batch_size)
        else:
            kept = without_class(scorer, config.class_name or "")
        write_grown(scorer, kept, new, config.accept, config.per_class, config.seed)
    grown = Scorer(out)
    print("\n".join(about(grown)))
    calibration = grown.detector.calibration_
    if calibration is not None and not calibration.enough:
        held_out = len(calibration.scores)
        print(f"too few held-out images, {held_out}, to promise that {calibration.accept:g} are accepted")


def about(scorer: Scorer) -> list[str]:
    """What is in a detector, line by line."""
    detector, manifest = scorer.detector, read_manifest(scorer.folder)
    parameters = ", ".join(f"{name}={value}" for name, value in asdict(detector).items())
    network = f"none, fitted to {detector.width_} {scorer.space}"
    if scorer.network is not None:
        backbone, side = scorer.backbone, scorer.backbone.image_size
        name = backbone.encoder.description["name"]
        network = f"{name}, {detector.width_} {scorer.space} of images {side} x {side} ({backbone.fit})"
    lines = [
        f"{scorer.folder}",
        f"detector    {detector.NAME}{f' ({parameters})' if parameters else ''}, on {scorer.space}",
        f"network     {network}",
    ]
    counts = class_counts(scorer)
    for number, one in enumerate(scorer.classes):
        images = "" if counts is None else f"  {counted(int(counts[number]), 'image')}"
        lines.append(f"{'classes' if number == 0 else '':<12}{one}{images}")
    if not scorer.classes:
        lines.append(f"images      {'' if counts is None else counts.sum()}, without classes")
    calibration = detector.calibration_
    if detector.threshold is None:
        lines.append("threshold   none, no images were held out")
    else:
        lines.append(f"threshold   {detector.threshold:.6g}")
    if calibration is not None:
        rate, held_out = 1 - calibration.accept, counted(len(calibration.scores), "held-out image")
        own = f"; classes with a threshold of their own: {calibration.own_thresholds}" if calibration.per_class else ""
        promise = "at most" if calibration.enough else "too few images to promise"
        lines.append(f"            false alarms: {promise} {100 * rate:g} %, by {held_out}{own}")
    lines.append(f"can change  {'yes' if counts is not None else 'no, it keeps no features of its images'}")
    lines.append(f"written by  {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    return lines


def class_counts(scorer: Scorer) -> np.ndarray | None:
    """Training images of each class; None where the detector keeps no features of them."""
    path = scorer.folder / "fitted_to" / FITTED_TO[0]
    if not path.is_file():
        return None
    labels = read_space(path, scorer.space)[1]
    return np.bincount(np.maximum(labels, 0), minlength=len(scorer.classes))
