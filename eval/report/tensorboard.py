"""What an evaluation adds to a run's TensorBoard: final numbers, the hyper-parameters tab, the embedding projector."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import text_format
from tensorboard.plugins.projector import ProjectorConfig
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from gradmix.eval.catalogue import ENDS, KNOWN, OPEN_SET, match, metric_of
from gradmix.eval.features.feature_sets import FEATURES
from gradmix.eval.features.mapped import map_arrays
from gradmix.eval.report.pictures import sheet
from gradmix.ssl.config import Config, flat
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.runs.files import write_atomically, write_text

SUFFIX = ".evaluation"  # of the event file; the next evaluation replaces it
POINTS = 1000  # test images in the projector
SIDE = 48  # of their thumbnails at most; 32 x 32 of them stay far below the 8192 pixels that a browser takes


def write_tensorboard(run_dir: Path, config: Config, numbers: dict[str, Any], data: OpenSetData) -> None:
    """Write ``run_dir/tensorboard``; an earlier evaluation's part of it is replaced.

    Args:
        numbers: metrics.json.
        data: whose test images are the ones in ``features/test.safetensors``.
    """
    folder = run_dir / "tensorboard"
    folder.mkdir(exist_ok=True)
    for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        old.unlink()
    final = {key: value for key, value in numbers.items() if is_result(key, value)}
    compared = {key: value for key, value in final.items() if metric_of(key).compared and not ENDS.search(key)}
    with SummaryWriter(folder, filename_suffix=SUFFIX) as writer:
        for key, value in final.items():
            writer.add_scalar(key, value, numbers.get("train/steps", 0))
        for summary in hparams(hyperparameters(config), compared):
            writer.file_writer.add_summary(summary)
    if len(data.test) and config.data.name != FEATURES:
        write_projector(folder, run_dir / "features/test.safetensors", data)


def is_result(key: str, value: Any) -> bool:
    """Whether a number of metrics.json is one that the evaluation found: training's own are there already."""
    found = match(key)
    return found is not None and found[0] in (*KNOWN, *OPEN_SET) and isinstance(value, int | float)


def hyperparameters(config: Config) -> dict[str, bool | int | float | str]:
    """The config, flat, as the hyper-parameters tab takes it: numbers, and text for everything else."""
    leaves = {key: value for key, value in flat(asdict(config)).items() if key != "run_dir"}
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in leaves.items()}


def write_projector(folder: Path, features: Path, data: OpenSetData) -> None:
    """``projector_config.pbtxt`` and its files: at most `POINTS` test images with feature, class and thumbnail."""
    found = map_arrays(features)[1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(data.test), generator=generator)[:POINTS].sort().values
    chosen, columns = found["features"][rows.numpy()], math.ceil(math.sqrt(len(rows)))
    other = "unknown" if data.classes else "image"
    names = [data.classes[label] if label >= 0 else other for label in found["labels"][rows.numpy()].tolist()]
    files = [str(row) if data.test.files is None else data.test.files[row] for row in rows.tolist()]
    lines = ["class\ttest image", *("\t".join(map(_cell, pair)) for pair in zip(names, files, strict=True))]
    picture = sheet(data.test, rows.tolist(), columns, SIDE)

    config = ProjectorConfig()
    embedding = config.embeddings.add(
        tensor_name="test features",
        tensor_path="projector/features.tsv",
        tensor_shape=chosen.shape,
        metadata_path="projector/metadata.tsv",
    )
    embedding.sprite.image_path = "projector/sprite.png"
    embedding.sprite.single_image_dim.extend([picture.width // columns] * 2)
    write_atomically(folder / "projector/features.tsv", lambda path: np.savetxt(path, chosen, "%.5g", "\t"))
    write_text(folder / "projector/metadata.tsv", "\n".join(lines) + "\n")
    write_atomically(folder / "projector/sprite.png", lambda path: picture.save(path, "PNG"))
    write_text(folder / "projector_config.pbtxt", text_format.MessageToString(config))


def _cell(text: str) -> str:
    return " ".join(text.split())
