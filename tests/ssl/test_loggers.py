"""Loggers beside TensorBoard."""

import csv
from importlib.util import find_spec

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradmix.ssl.train import check, train


def test_csv_has_the_curves_of_tensorboard(tmp_path, config, data):
    train(with_logger(config(tmp_path, epochs=4), ["csv"]), data)
    (path,) = tmp_path.glob("csv/*/metrics.csv")
    rows = [row for row in csv.DictReader(open(path)) if row["train/loss"]]
    curve = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert len(curve) >= 2
    assert [int(row["step"]) for row in rows] == [event.step for event in curve]
    assert [float(row["train/loss"]) for row in rows] == pytest.approx([event.value for event in curve], rel=1e-6)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_starts(tmp_path, config, name):
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=f"trainer.logger: {name} needs the package {name}; pip install {name}"):
        check(with_logger(config(tmp_path), name))


def test_other_loggers_are_refused(tmp_path, config):
    for wrong in ("comet", ["csv", "comet"], True):
        with pytest.raises(ValueError, match=r"trainer\.logger: expected one of tensorboard, wandb, mlflow, csv, got"):
            check(with_logger(config(tmp_path), wrong))


def with_logger(config, logger):
    config.trainer["logger"] = logger
    return config
