"""What is watched while training is what the evaluation afterwards says."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_the_last_look_at_the_test_images_is_the_result(command, tmp_path):
    quick = ("epochs=3", "encoder.width=4", "test_every=1", "trainer.accelerator=cpu", "pictures_every=0")
    assert command("pretrain", *quick, "run_dir=run").code == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for key in ("knn/top1", "osr/deep_knn/auroc"):
        curve = [event.value for event in events.Scalars(f"test/{key}")]
        assert len(curve) == 3
        assert curve[-1] == pytest.approx(metrics[key], abs=1e-6)
