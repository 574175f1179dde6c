"""The three commands, as a person types them."""

import csv
import json
import os
import shutil
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gradmix
from gradmix.eval.commands import pretrain
from gradmix.ssl.data.splits import SPLITS

QUICK = ("epochs=2", "encoder.width=4", "knn_every=1", "pictures_every=1", "trainer.accelerator=cpu")


@pytest.fixture
def run(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "copied")


def digit_files(folder, count=6):
    digits = load_digits()
    folder.mkdir()
    for i in range(count):
        Image.fromarray((digits.images[i] * (255 / 16)).astype(np.uint8)).save(folder / f"digit {i}, [a].png")
    return folder


def test_a_run_folder_holds_what_the_design_lists(digits_run):
    for name in ("config.yaml", "metrics.json", "backbone.safetensors", "checkpoints", "detector", "features"):
        assert (digits_run / name).exists(), name
    metrics = json.loads((digits_run / "metrics.json").read_text())
    for key in ("knn/top1", "linear/top1", "knn_pixels/top1", "osr/pixels/auroc", "train/images_per_s"):
        assert 0 < metrics[key]
    for detector in ("deep_knn", "class_knn", "mahalanobis"):
        for name in ("auroc", "aupr", "fpr95", "fpr95_known", "oscr", "closed_set_accuracy", "balanced_accuracy"):
            assert 0 <= metrics[f"osr/{detector}/{name}"] <= 1
    assert metrics["version/torch"] == torch.__version__
    assert metrics["train/resumed_from_step"] == 0


def test_tensorboard_has_curves_and_pictures(digits_run):
    events = EventAccumulator(str(digits_run / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/images_per_s", "knn/held_out"} <= scalars
    assert any(tag.startswith("lr") for tag in scalars)
    assert "mixing" in events.Tags()["images"]


def test_evaluating_again_gives_the_same_numbers(run, command):
    first = json.loads((run / "metrics.json").read_text())
    result = command("eval", f"run={run}")
    assert result.code == 0 and "deep_knn on pixels" in result.out
    again = json.loads((run / "metrics.json").read_text())
    assert again["evaluation"].pop("command") == f"gradmix-eval run={run}" and not first["evaluation"].pop("command")
    assert again == first


def test_a_run_whose_numbers_are_gone_is_evaluated_again(run, command):
    """As after a kill of gradmix-eval, which takes them away before it puts new ones there."""
    before = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    result = command("pretrain", *QUICK, f"run_dir={run}")
    assert result.code == 0, result.err
    after = json.loads((run / "metrics.json").read_text())
    assert after["osr/deep_knn/auroc"] == before["osr/deep_knn/auroc"] and "train/seconds" in after


def test_a_finished_run_says_so(run, command, digits_run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    for folder in (run, f"~/{run.name}"):
        result = command("pretrain", *QUICK, f"run_dir={folder}")
        assert result.code == 0 and "finished already" in result.out


def one_of_two(rank, folder, meeting):
    os.chdir(folder)
    os.environ |= meeting | {"RANK": str(rank), "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    del SPLITS["digits"][2:]
    words = ["epochs=1", "batch_size=128", "encoder.width=4", "data.image_size=8", "data.split=all", "run_dir=run"]
    words += ["knn_every=0", "detectors=[deep_knn]"]
    words += ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]
    sys.argv = ["gradmix-pretrain", *words]
    with open(f"told-{rank}", "w") as told, redirect_stdout(told), redirect_stderr(told):
        pretrain.main()


def test_two_processes_train_every_split(start_processes, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    start_processes(one_of_two, (tmp_path, meeting), 2)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert "mean ± standard deviation over 2 splits" in told[0]
    assert told[0].count("6 known classes") == 2 and "classes" not in told[1]  # the first one speaks
    parts = [json.loads((tmp_path / f"run/split-{i}/metrics.json").read_text()) for i in range(2)]
    mean = json.loads((tmp_path / "run/metrics.json").read_text())["knn/top1"]
    assert mean == pytest.approx(sum(part["knn/top1"] for part in parts) / 2)


def test_scoring_files_with_the_detectors_folder_alone(run, command, tmp_path):
    detector = shutil.move(run / "detector", tmp_path / "only this")
    shutil.rmtree(run)
    images = digit_files(tmp_path / "some photos")
    result = command("score", f"detector={detector}", f"images={images}", "out=my scores.csv")
    assert result.code == 0, result.err
    rows = list(csv.DictReader(open(tmp_path / "my scores.csv")))
    assert [row["path"] for row in rows] == sorted(str(p) for p in images.iterdir())
    for row in rows:
        assert row["prediction"] in {"2", "4", "5", "9", "8", "3", "unknown"}
        assert (float(row["margin"]) > 0) == (row["prediction"] == "unknown")
        assert row["nearest"].startswith("training image ")
    pattern = command("score", f"detector={detector}", f"images={images}/*0*.png", "out=one.jsonl")
    assert pattern.code == 0
    (only,) = map(json.loads, open(tmp_path / "one.jsonl"))
    assert only["path"] == rows[0]["path"] and only["score"] == pytest.approx(float(rows[0]["score"]), abs=1e-5)


def test_explaining_scores_with_pictures(run, command, tmp_path):
    images = digit_files(tmp_path / "photos", 3)
    detector = f"detector={run / 'detector'}"
    result = command("score", detector, f"images={images}", "explain=some sheets", "explain_limit=2")
    assert result.code == 0, result.err
    assert "1 sheet with 2 images" in result.out
    assert Image.open(tmp_path / "some sheets" / "sheet-001.png").width > 600
    result = command("score", detector, f"images={images}", "explain=more", "explain_limit=0")
    assert result.code == 2 and "explain_limit: expected at least 1, got 0" in result.err


def test_unreadable_files_get_a_row_and_the_exit_code_says_so(run, command, tmp_path):
    images = digit_files(tmp_path / "photos", 2)
    (images / "broken.png").write_text("<html>")
    result = command("score", f"detector={run / 'detector'}", f"images={images}")
    assert result.code == 2 and "1 of 3 files can't be read" in result.err
    rows = {row["path"].split("/")[-1]: row for row in csv.DictReader(open("scores.csv"))}
    assert rows["broken.png"]["error"] and not rows["broken.png"]["score"]
    assert sum(bool(row["score"]) for row in rows.values()) == 2


def test_scores_do_not_go_into_a_folder(run, command, tmp_path):
    images = digit_files(tmp_path / "photos", 2)
    result = command("score", f"detector={run / 'detector'}", f"images={images}", f"out={images}")
    assert result.code == 2 and "which is read; write it elsewhere" in result.err
    (other := tmp_path / "other").mkdir()
    result = command("score", f"detector={run / 'detector'}", f"images={images}", f"out={other}")
    assert result.code == 2 and f"out: {other} is a folder" in result.err


def test_load_gives_the_backbone(run):
    model = gradmix.load(run)
    saved = torch.from_numpy(np.asarray(load_digits().images[:1] * (255 / 16))).round().byte()
    image = model.transform(Image.fromarray(saved[0].numpy()))
    features = model(image[None])
    assert features.shape == (1, model.num_features) and features.isfinite().all()
    assert torch.equal(gradmix.load(run / "detector")(image[None]), features)


def test_a_flat_folder_without_classes(command, tmp_path):
    digits = load_digits()
    (tmp_path / "flat").mkdir()
    for i in range(80):
        Image.fromarray((digits.images[i] * (255 / 16)).astype(np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    small = ("epochs=1", "batch_size=16", "encoder.width=4", "data=imagefolder", "data.image_size=8", "knn_k=2")
    result = command("pretrain", *small, "data.root=flat", "method=simclr", "run_dir=run")
    assert result.code == 0, result.err
    assert "the images have no classes" in result.out
    result = command("score", "detector=run/detector", "images=flat", "out=scores.csv")
    assert result.code == 0, result.err
    assert all(float(row["score"]) >= 0 for row in csv.DictReader(open("scores.csv")))
    result = command("pretrain", *small, "data.root=flat", "method=joint", "run_dir=other")
    assert result.code == 2 and "needs classes" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epocs=3"], "epocs: no such key; did you mean epochs?"),
        (["seed=0,1"], "seed: several values need --multirun; a list needs brackets, seed=[A,B]; quote a value that"),
        (["data.splitt=3"], "did you mean data.split?"),
        (["+data.nonsense=3"], "data.nonsense: no such key"),
        (["trainer.max_epoch=3"], "did you mean max_epochs?"),
        (["data=digitss"], "data: no option 'digitss'; did you mean digits?"),
        (["epochs=many"], "epochs: Value 'many'"),
        (["epochs=0"], "epochs: expected at least 1"),
        (["data.split=9"], "data.split: 9 does not exist"),
        (["data=imagefolder"], "data.root: data=imagefolder needs the folder"),
        (["data=imagefolder", "data.root=missing"], "missing is not a folder here, in /"),
        (["data=imagefolder", "data.root=empty"], "no images in empty"),
        (["data=imagefolder", "data.root=one"], "data.root: one has one class folder only (cat); give at least two"),
        (["data=imagefolder", "data.root=broken"], "image files can't be read"),
        (["batch_size=4096"], "batch_size: 4096 is larger than the training set of"),
        (["knn_k=100000"], "knn_k: expected 1 to 646, the size of the training set, got 100000"),
        (["detectors=[deep_kn]"], "detectors: no 'deep_kn'; did you mean deep_knn?"),
        (["detector_options.deep_kn.k=3"], "detector_options: no 'deep_kn'; did you mean deep_knn?"),
        (["detector_options.deep_knn.kk=3"], "did you mean k?"),
        (["data.unknown_root=missing"], "data.unknown_root: missing is not a folder"),
        (["data=cifar_plus70"], "data: no option 'cifar_plus70'; did you mean cifar_plus50?"),
        (["data=unheard_of"], "data: no option 'unheard_of'; choose from cifar10,"),
        (["mix.name=cutmx"], "mix.name: no 'cutmx'; did you mean cutmix?"),
        (["data.name=digts"], "data.name: no 'digts'; did you mean digits?"),
        (["data=imagefolder", "data.root=above"], "one class folder only (one); did you mean data.root=above/one?"),
        (
            ["data=imagefolder", "data.root=loose", "batch_size=2", "detector_options.deep_knn.k=2"],
            "method: joint needs classes, but data.root has none",
        ),
        (["mix.options.alpha=-1"], "mix.options.alpha: expected a finite number above 0"),
        (["mix.options.alhpa=1"], "mix.options.alhpa: gradmix has no such argument; did you mean alpha?"),
        (["data=[[]]"], "data: expected the name of one option, got [[]]\n"),
        (["method=byol"], "method: no option 'byol'; choose from cider, joint, palm, simclr, sphor, supcon\n"),
        (["data.known=cat"], "data.known: expected a list, data.known=[A,B]"),
        (["data.known=[1,Käfer groß]"], "data.known: 'Käfer groß' is no class of data=digits"),
        (["trainer=3"], "trainer: expected trainer.NAME=VALUE"),
        (["trainer.devices=0"], "trainer: `Trainer(devices=0)` value is not a valid input"),
        (["--epochs=3"], "--epochs: no such flag; settings are given as epochs=VALUE"),
        (["epochs"], "epochs: can't be read; expected KEY=VALUE"),
        (["encoder.stem=ß"], """in quotes a value is taken as it is: 'encoder.stem="ß"'"""),
        (["data.root="], "data.root: empty; give a path"),
        (["data.root=one"], "data.root: data=digits reads no folder; the images in it are meant by data=imagefolder"),
        (["data=one"], "data: one is a folder; say data=imagefolder data.root=one"),
        (["data=./my photos, all"], "data: ./my photos, all is a folder; say data=imagefolder 'data.root=./my photos"),
        (["data.image_size=0"], "data.image_size: expected at least 1, got 0"),
        (["speed.micro_batch=1"], "speed.micro_batch: expected at least 2, for BatchNorm has nothing to compare"),
        (["method.temperature_end=0"], "method.temperature_end: expected a number above 0, got 0.0"),
        (["data.augment.crop=[0.2,2]"], "data.augment.crop: expected [LOW,HIGH] with 0 < LOW <= HIGH <= 1"),
        (["data.augment.flip=nan"], "data.augment.flip: expected 0 to 1, got nan"),
        (["data.augment.hue=1"], "data.augment.hue: expected 0 to 0.5, got 1.0"),
        (["encoder.name=vgg"], "encoder.name: expected one of resnet18"),
        (["encoder=convnext_atto"], "encoder: no option 'convnext_atto'; did you mean timm/convnext_atto?"),
        (["encoder=x"], "choose from resnet101, resnet18, resnet34, resnet50, timm/"),
        (["encoder=timm/convnext_atta"], "encoder.width: timm's networks have none to set"),
        (["encoder.init=nothing.pt"], "nothing.pt: no such file"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(command, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    digit_files(tmp_path / "one").rename(tmp_path / "inner")
    (tmp_path / "one").mkdir()
    (tmp_path / "inner").rename(tmp_path / "one" / "cat")
    for name in ("a", "b"):
        (tmp_path / "above" / "one" / name).mkdir(parents=True)
    digit_files(tmp_path / "loose")
    (tmp_path / "my photos, all").mkdir()
    (tmp_path / "loose" / "sub").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "broken" / name / f"{i}.jpg").write_text("no image")
    result = command("pretrain", "run_dir=run", *QUICK, *arguments)
    assert result.code == 2, result.err
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert not (tmp_path / "run" / "config.yaml").exists()  # not claimed


def test_a_folder_of_another_config_is_not_touched(run, command):
    before = (run / "metrics.json").read_bytes()
    result = command("pretrain", *QUICK, "epochs=3", f"run_dir={run}")
    assert result.code == 2
    assert "belongs to another config (epochs is 2 there and 3 here)" in result.err
    assert (run / "metrics.json").read_bytes() == before


def test_bad_runs_and_detectors_are_named(command, run, tmp_path):
    assert "not a run's folder" in command("eval", f"run={tmp_path}").err
    assert "run: missing" in command("eval").err
    assert "encoder: belongs to checkpoint=FILE" in command("eval", f"run={run}", "encoder=resnet50").err
    assert "root: data=digits reads no folder" in command("eval", f"run={run}", "root=.").err
    replaced = command("detector", "remove", f"detector={run}", "class=1", f"out={run}")
    assert replaced.code == 2 and "is there already" in replaced.err
    assert "names no image file" in command("score", f"detector={run / 'detector'}", "images=nothing*").err
    weights = run / "detector" / "backbone.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    result = command("score", f"detector={run / 'detector'}", "images=/etc/hostname")
    assert result.code == 2 and "damaged" in result.err


def test_debug_shows_the_traceback(command):
    with pytest.raises(ValueError, match="does not exist"):
        command("pretrain", "data.split=9", "--debug")
