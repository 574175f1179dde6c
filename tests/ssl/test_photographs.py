"""Runs on photographs: the same weights however they are decoded and wherever they stop, and files that go bad."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.guard import Guard, Verdict
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.train import train

QUICK = ("batch_size=8", "encoder.width=4", "knn_k=3", "trainer.accelerator=cpu", "run_dir=run")


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(36):
        small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        path = tmp_path / "images" / "abc"[i % 3] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((60, 40), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "images"


def photographs(config, root, run_dir, **changes):
    settings = replace(config(run_dir, **changes), batch_size=8)
    settings.data = DataConfig("imagefolder", str(root), image_size=16)
    return settings


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("mix", ["gradmix", "extra_view"])
def test_weights_do_not_depend_on_workers_or_stops(tmp_path, root, config, mix, monkeypatch):
    step = Pretraining.training_step

    def until(self, batch, index):
        if self.steps == 4:
            raise Interrupted
        return step(self, batch, index)

    for name, workers in (("alone", 0), ("stopped", 2)):
        settings = photographs(config, root, tmp_path / name, mix=mix)
        settings.data.workers = workers
        settings.checkpoint_seconds = 0
        if name == "stopped":
            with monkeypatch.context() as patch, pytest.raises(Interrupted):
                patch.setattr(Pretraining, "training_step", until)
                train(settings, load_data(settings.data, 0))
        train(settings, load_data(settings.data, 0))
    one, other = (load_file(tmp_path / name / "backbone.safetensors") for name in ("alone", "stopped"))
    assert json.loads((tmp_path / "stopped/training.json").read_text())["train/resumed_from_step"] == 4
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_extra_views_are_other_crops(root, config, tmp_path):
    settings = photographs(config, root, tmp_path / "run", mix="extra_view")
    module = Pretraining(settings, load_data(settings.data, 0).train)
    assert module.crops.count == 4
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 4, 3, 16, 16), dtype=torch.uint8)
    first, extra = module.augment(images, 1), module.augment(images[:, 2:], 1)
    assert first.shape == extra.shape == (6, 3, 16, 16)
    again = module.augment(images[:, :2], 1)
    assert torch.equal(first, again) and not torch.equal(first, extra)


def test_a_run_that_meets_a_bad_file_stops_and_one_that_skips_it_does_not_measure_it(root, command, tmp_path):
    bad = root / "a" / "00.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    (root / "b" / "copy.jpg").write_bytes((root / "a" / "03.jpg").read_bytes())
    arguments = ("data=imagefolder", f"data.root={root}", "data.image_size=16", "epochs=2", *QUICK)
    result = command("pretrain", *arguments)
    assert result.code == 2 and "image files can't be read" in result.err and str(bad) in result.err
    assert "views are cut from the files" in result.out and "16 x 16 pixels, 6 steps, a step of 8" in result.out
    result = command("pretrain", *arguments, "data.on_bad_image=skip")
    assert result.code == 0, result.err
    assert "\n  left out: image files that can't be read: 1, see bad_images.json\n" in result.out
    assert list(json.loads((tmp_path / "run/bad_images.json").read_text())) == [str(bad)]
    measured = [len(load_file(path)["labels"]) for path in (tmp_path / "run/features").glob("t*.safetensors")]
    held_out = len(load_file(tmp_path / "run/features/held_out.safetensors")["labels"])
    assert sum(measured) + held_out == 36
    assert "exact copies of an image in another class: 1, such as" in result.out
    assert (tmp_path / "run/report.html").is_file()
    numbers = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "knn/top1" in numbers and numbers["data/class_copies"] == 1 and numbers["data/test_copies"] == 0
    assert command("eval", "run=run").code == 0
    assert command("score", "detector=run/detector", f"images={root}").code == 2  # the bad one is a row with an error
    moved = root.rename(tmp_path / "moved")
    assert "not a folder; root=PATH says where it lies now" in command("eval", "run=run").err
    moved.rename(root)
    again = command("pretrain", *arguments, "data.on_bad_image=skip").out
    assert "finished already" in again and "have changed" not in again
    (root / "b" / "04.jpg").unlink()  # now the split is drawn otherwise: what was trained on would be tested
    again = command("pretrain", *arguments, "data.on_bad_image=skip").out
    assert "finished already" in again and "the images have changed since: another run_dir= trains on them\n" in again
    (tmp_path / "run/report.html").unlink()
    for result in (command("eval", "run=run"), command("pretrain", *arguments, "data.on_bad_image=skip")):
        assert result.code == 2 and "not the training images that run was trained on" in result.err


def test_all_processes_stop_at_a_file_that_one_of_them_can_not_read():
    flags = torch.tensor([0.0, 0.0, 1.0, 0.0])
    reason = "a.jpg: not a readable image"
    for bad, message in (((reason,), "1 image files can't be read.*a.jpg"), ((), "another process")):
        guard = Guard("error", 0)
        guard.pending = Verdict(3, 0.1, torch.arange(2), bad, flags, None)
        assert not guard.is_finite()  # nothing is saved
        with pytest.raises(ValueError, match=message):
            guard.settle()
