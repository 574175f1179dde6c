"""The commands as functions."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import gradmix
from gradmix.eval.calls import configured
from gradmix.eval.config import ScoreConfig
from gradmix.ssl.config import Config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("called")
    quick = {"encoder.width": 4, "knn_every": 1, "pictures_every": 1, "trainer": {"accelerator": "cpu"}}
    return gradmix.pretrain(quick, data="digits", epochs=2, run_dir=folder / "run")


def images(count):
    return (load_digits().images[:count] * (255 / 16)).round().astype(np.uint8)


def test_pretrain_is_the_command(trained, digits_run):
    theirs = json.loads((digits_run / "metrics.json").read_text())
    for name in ("knn/top1", "linear/top1", "osr/deep_knn/auroc"):
        assert trained[name] == theirs[name]
    assert trained.numbers == json.loads((trained.path / "metrics.json").read_text())
    assert "deep_knn on pixels" in repr(trained) and str(trained.path) in repr(trained)
    assert trained.report.is_file() and trained.detector.is_dir()
    assert not trained.backbone().training


def test_evaluate_is_the_command(trained, tmp_path):
    again = gradmix.evaluate(trained, detectors=["mahalanobis"], knn_k=[5], out=tmp_path / "again")
    assert again["osr/mahalanobis/auroc"] == trained["osr/mahalanobis/auroc"] and "osr/class_knn/auroc" not in again
    assert "knn/k=5,t=0.07/top1" in again and again.path == tmp_path / "again"
    with pytest.raises(ValueError, match="export: measures nothing"):
        gradmix.evaluate(trained.path, export=["safetensors"])


def test_score_is_the_command(trained, command, tmp_path):
    (tmp_path / "photos").mkdir()
    arrays = images(12)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"photos/{i:02d}.png")
    assert command("score", f"detector={trained.detector}", "images=photos", "out=theirs.csv").code == 0
    rows = list(csv.DictReader(open(tmp_path / "theirs.csv")))
    ours = gradmix.score(trained, tmp_path / "photos", out=tmp_path / "ours.csv")
    assert [f"{row.score:.6g}" for row in ours] == [f"{float(row['score']):.6g}" for row in rows]
    assert ours.predictions == [row["prediction"] for row in rows]
    assert len(list(csv.DictReader(open(tmp_path / "ours.csv")))) == 12
    listed = gradmix.score(trained.detector, list(arrays))
    np.testing.assert_array_equal(listed.scores, ours.scores)  # PNG loses nothing
    assert listed[3].path == "image 3" and len(listed[:4]) == 4
    text = repr(listed)
    assert text.startswith(f"12 images, {ours.predictions.count('unknown')} unknown (unknown above ")
    assert len(text.splitlines()) == 12 and text.endswith("... and 2 more")
    assert not list(tmp_path.glob("scores.csv"))


def test_score_takes_every_key_of_the_command(trained, command, tmp_path):
    arrays = images(40)
    (tmp_path / "photos").mkdir()
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"photos/{i:02d}.png")
    keys = {"accept": 0.5, "per_class": True, "false_discovery": 0.9}
    given = [f"{key}={value}" for key, value in keys.items()]
    assert command("score", f"detector={trained.detector}", "images=photos", "out=theirs.csv", *given).code == 0
    rows = list(csv.DictReader(open(tmp_path / "theirs.csv")))
    ours = gradmix.score(trained, tmp_path / "photos", keys, out=tmp_path / "ours.csv")
    assert ours.predictions == [row["prediction"] for row in rows]
    assert ours.predictions != gradmix.score(trained, list(arrays)).predictions
    limits = [row.score - row.margin for row in ours]
    least, most = f"{min(limits):.4f}", f"{max(limits):.4f}"
    assert least != most and f"(unknown above {least} to {most}, by class)" in repr(ours)
    assert [str(found).lower() for found in ours.discoveries] == [row["discovery"] for row in rows]
    assert (tmp_path / "ours.csv").read_text().splitlines()[0] == ",".join(rows[0])
    with pytest.raises(ValueError, match="discoveries: score"):
        _ = gradmix.score(trained, list(arrays)).discoveries
    with pytest.raises(ValueError, match=r"accept: 0\.9999 can't be promised"):
        gradmix.score(trained, list(arrays), accept=0.9999)
    strict = gradmix.evaluate(
        trained, accept=0.999, out=tmp_path / "strict"
    )  # more than the held-out images can promise
    assert len(gradmix.score(strict, list(arrays), false_discovery=0.9).discoveries) == 40
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: torch finds no cuda"):
            gradmix.score(trained, list(arrays), device="cuda")


def test_score_overwrites_nothing_else(trained, tmp_path):
    (tmp_path / "thesis.csv").write_text("years of work\n")
    with pytest.raises(ValueError, match="is no file of scores"):
        gradmix.score(trained, list(images(1)), out=tmp_path / "thesis.csv")
    assert (tmp_path / "thesis.csv").read_text() == "years of work\n"


def test_images_that_are_no_files_are_explained_too(trained, tmp_path):
    scores = gradmix.score(trained, [Image.fromarray(images(1)[0]), *images(3)[1:]], explain=tmp_path / "sheets")
    assert [row.path for row in scores] == ["image 0", "image 1", "image 2"]
    with Image.open(tmp_path / "sheets/sheet-001.png") as sheet:
        assert np.ptp(np.asarray(sheet), axis=(0, 1)).min() > 100


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"epocs": 3}, "epocs: no such key; did you mean epochs?"),
        ({"lr": 3}, "lr: no such key; optimizer.base_lr=VALUE does it"),
        ({"encoder": {"widht": 3}}, "encoder.widht: no such key; did you mean encoder.width?"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"epochs": "many"}, "epochs: Value 'many'"),
        ({"data": "digitss"}, "data: no option 'digitss'; did you mean digits?"),
        ({"data": "/"}, "data: / is a folder; say data=imagefolder data.root=/"),
        ({"data": [[]]}, "data: expected the name of one option, got [[]]"),
        ({"data": {"name": [[]]}}, "data: expected the name of one option, got [[]]"),
        ({"data": Path("/")}, "data: / is a folder; say data=imagefolder data.root=/"),
    ],
)
def test_bad_keys_are_one_line(keys, message):
    with pytest.raises(ValueError) as error:
        gradmix.pretrain(**keys)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_keys_are_composed_as_on_the_command_line(tmp_path):
    given = {"data": {"name": "svhn", "root": tmp_path / "a, b=c"}, "mix": {"name": "none"}, "trainer": {"devices": 1}}
    config = configured("pretrain", Config, given | {"detector_options": {"deep_knn": {"k": 7}}, "method": "simclr"})
    assert (config.data.name, config.data.image_size, config.data.root) == ("svhn", 32, str(tmp_path / "a, b=c"))
    assert config.data.augment.flip == 0.0  # svhn's
    assert (config.run_dir, config.method.supervised) == ("runs/svhn-simclr-none", 0.0)
    assert config.trainer["devices"] == 1 and config.trainer["precision"] == "auto"
    assert config.detector_options == {"deep_knn": {"k": 7}}
    digits = configured("pretrain", Config, {"data": "digits", "epochs": 3})
    assert (digits.epochs, digits.encoder.width) == (3, 16)  # the recipe's, but for what was given
    with pytest.raises(ValueError, match="detector: missing"):
        configured("score", ScoreConfig, {"images": "x"})


def test_load_is_frozen_and_takes_arrays(trained):
    model = gradmix.load(trained.path)
    assert not model.training and not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    grey = images(1)[0]
    for array in (grey, grey[..., None].repeat(3, axis=2)):
        assert torch.equal(model.transform(array), model.transform(Image.fromarray(array)))
    for wrong in (grey.astype(np.float32), grey[None, None], grey[..., None], grey[:0]):
        with pytest.raises(ValueError, match=r"image: expected \[H, W\] or \[H, W, 3\] uint8, got \["):
            model.transform(wrong)
