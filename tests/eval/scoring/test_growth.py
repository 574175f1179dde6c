"""Detectors that grow and shrink: equal to those fitted from the start, whatever the kind; nothing is ever lost."""

import hashlib
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import gradmix
from gradmix.eval.classifiers import LinearProbe, linear
from gradmix.eval.commands.work.detector import run_detector
from gradmix.eval.config import DetectorConfig
from gradmix.eval.detectors import DETECTORS, DeepKNN
from gradmix.eval.detectors.head import HeadDetector
from gradmix.eval.scoring.growth import add_images, without_class, write_grown
from gradmix.eval.scoring.scorer import Scorer, save_scorer
from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.data.sources import stratified
from gradmix.ssl.runs import files, whole_folder

CONTEXT = multiprocessing.get_context("forkserver")
ADD = ("add", "detector", "images=new", "class=zero", "out=detector", "batch_size=16", "device=cpu")


@pytest.fixture(scope="module")
def zeros(tmp_path_factory):
    """Files of a digit that the run does not know."""
    folder, digits = tmp_path_factory.mktemp("zeros"), load_digits()
    for i in np.flatnonzero(digits.target == 0)[:60]:
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(folder / f"{i:04d}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture
def detector(digits_run, zeros, tmp_path):
    (tmp_path / "new").symlink_to(os.path.dirname(zeros[0]))
    return shutil.copytree(digits_run / "detector", tmp_path / "detector")


def kept(run, name, space):
    arrays = load_file(run / "features" / f"{name}.safetensors")
    return arrays[space], arrays["labels"]


def fitted(kind, features, labels, held_out):
    """By the detector's own methods alone."""
    head = {}
    if issubclass(kind, HeadDetector):
        probe = LinearProbe().fit(features, labels)
        head = {"head": (probe.weight_, probe.bias_)}
    return kind().fit(features, labels, **head).calibrate(held_out, 0.9)


def content(folder):
    """All but scorer.json, which has the hashes of what lies in fitted_to/."""
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.name != "scorer.json"}


@pytest.mark.parametrize("space", ["features", "projections"])
@pytest.mark.parametrize("name", DETECTORS.own)
def test_grown_is_fitted_from_the_start(name, space, digits_run, zeros, tmp_path, monkeypatch):
    kind = DETECTORS[name]
    monkeypatch.setattr(linear, "LEAST_STEPS", 200)  # of probes, theirs and ours
    if space == "projections" and name not in ("deep_knn", "class_knn", "vim"):
        pytest.skip("one of each sort is enough")
    (train, labels), (held_out, _) = (kept(digits_run, part, space) for part in ("train", "held_out"))
    before = fitted(kind, train, labels, held_out)
    data = load_data(DataConfig(name="digits", image_size=16, split=0), 0)
    save_scorer(tmp_path / "before", before, digits_run, data, space, digits_run / "features")
    scorer = Scorer(tmp_path / "before")
    write_grown(scorer, add_images(scorer, zeros, "zero", 0.25, 3), tmp_path / "grown")

    backbone = gradmix.load(digits_run)
    new = backbone(torch.stack([backbone.transform(path) for path in zeros]))
    if space == "projections":
        weights = load_file(digits_run / "head.safetensors")
        hidden = (new @ weights["layers.0.weight"].T + weights["layers.0.bias"]).relu()
        new = torch.nn.functional.normalize(hidden @ weights["layers.2.weight"].T + weights["layers.2.bias"])
    fresh, aside = stratified(torch.zeros(len(zeros)).long(), 0.25, 3)
    assert len(aside) == 15
    everything = torch.cat([train, new[fresh]]), torch.cat([labels, torch.full((45,), 6)])
    anew = fitted(kind, *everything, torch.cat([held_out, new[aside]]))
    grown, queries = Scorer(tmp_path / "grown"), torch.cat([new, train[::9]])
    assert grown.classes == [*scorer.classes, "zero"]
    assert (grown.detector.threshold, grown.detector.calibration_.accept) == (pytest.approx(anew.threshold), 0.9)
    ours, theirs = grown.detector.judge(queries), anew.judge(queries)
    # the last digits of a feature depend on how many are multiplied at once
    np.testing.assert_allclose(ours.score, theirs.score, rtol=1e-4, atol=1e-5 * np.abs(theirs.score).max())
    np.testing.assert_array_equal(ours.closest, theirs.closest)

    again = Scorer(tmp_path / "grown")
    write_grown(again, without_class(again, "zero"), tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "before")  # every bit
    gone = scorer.classes[0]  # the classes after it move up
    write_grown(again, without_class(again, gone), tmp_path / "less")
    stay = everything[1] != 0
    fewer = everything[0][stay], everything[1][stay] - 1
    aside = torch.cat([held_out[kept(digits_run, "held_out", space)[1] != 0], new[aside]])
    less, anew = Scorer(tmp_path / "less"), fitted(kind, *fewer, aside)
    assert less.classes == grown.classes[1:] and less.detector.threshold == pytest.approx(anew.threshold, rel=1e-4)
    np.testing.assert_array_equal(less.detector.classify(queries), anew.classify(queries))


def test_copies_are_added_to_one_side(detector, zeros, tmp_path):
    """An image that is in the bank too scores 0 when it is held out, and draws the threshold down."""
    copies = [shutil.copy(path, tmp_path / f"copy of {os.path.basename(path)}") for path in zeros]
    paths = [*zeros, *map(str, copies)]
    grown = add_images(Scorer(detector), paths, "zero", 0.25, 3)
    bank, aside = ([open(paths[row], "rb").read() for row in part[-1].rows] for part in (grown.train, grown.held_out))
    assert len(bank) + len(aside) == 120 and len(aside) > 20 and not {*bank} & {*aside}


def test_the_command(detector, zeros, command, tmp_path):
    before = content(detector)
    result = command("detector", *ADD[:-3], "out=grown")
    assert result.code == 0 and "zero  54 images" in result.out, result.err
    assert content(detector) == before
    assert len(list(Scorer("grown").score(zeros))) == 60
    assert command("score", "detector=grown", "images=new", "explain=sheets").code == 0  # the new thumbnails too
    known = [row.prediction for row in Scorer("grown").score(zeros)]
    assert known.count("zero") > 40 > 10 > [row.prediction for row in Scorer(detector).score(zeros)].count("zero")
    assert command("detector", "remove", "grown", "class=zero", "out=grown").code == 0
    assert content(tmp_path / "grown") == before
    result = command("detector", "add", "detector", "images=new", "class=4", "accept=0.8", "out=more")
    assert result.code == 0 and "zero" not in result.out and "at most 20 %" in result.out
    told = command("detector", "info", "more").out
    assert told == result.out
    for said in ("deep_knn (k=5, index=auto), on features", "resnet18, 32 features of images 16 x 16", "torch"):
        assert said in told, told
    labels = load_file(tmp_path / "more" / "fitted_to" / "train.safetensors")["labels"]
    counts = [(label == labels).sum() for label in range(6)]
    assert all(f"{name}  {count} images" in told for name, count in zip(Scorer("more").classes, counts, strict=True))
    assert not list(tmp_path.glob(".*"))


def test_paths_of_training_images_and_no_held_out_ones(digits_run, zeros, tmp_path):
    """A detector that has no threshold stays without; one that names files names the new ones too."""
    data = load_data(DataConfig(name="digits", image_size=16, split=0), 0)
    train, labels = kept(digits_run, "train", "features")
    (tmp_path / "features").mkdir()
    shutil.copy(digits_run / "features" / "train.safetensors", tmp_path / "features")
    save_scorer(tmp_path / "a", DeepKNN().fit(train, labels), digits_run, data, "features", tmp_path / "features")
    scorer = Scorer(tmp_path / "a")
    scorer.train_files = [f"{i}.png" for i in range(len(train))]
    write_grown(scorer, add_images(scorer, list(map(os.path.relpath, zeros)), "zero", 0.25, 0), tmp_path / "b")
    grown = Scorer(tmp_path / "b")
    assert grown.detector.threshold is None and grown.train_files == [*scorer.train_files, *zeros]
    nearest = [row.nearest for row in grown.score(zeros)]
    assert nearest == zeros
    with pytest.raises(ValueError, match="no held-out images to calibrate on"):
        write_grown(scorer, add_images(scorer, zeros, "zero", 0.25, 0), tmp_path / "c", accept=0.9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "detector", "images=new", "class=zero"), "out: missing; give it as out=VALUE"),
        (("add", "detector", "images=new", "out=x"), "class: missing; give it as class=NAME"),
        (("add", "detector", "class=zero", "out=x"), "images: missing"),
        (("add", "detector", "images=new", "class=unknown", "out=x"), "a known class is called 'unknown'"),
        (("add", "detector", "images=bad", "class=zero", "out=x"), "images: 1 of 2 can't be read, take them out"),
        (("add", "detector", "images=new", "class=zero", "out=bad"), "out: bad is there already"),
        (("add", "detector", "images=bad", "class=zero", "out=bad/x"), "out: bad/x lies in bad, which is read"),
        (("add", "detector", "images=new", "class=zero", "out=x", "accept=1"), None),
        (("remove", "detector", "class=zero", "out=x"), "class: the detector has no 'zero'; its classes are 2, 4,"),
        (("remove", "detector", "class=4", "images=new", "out=x"), "images: gradmix-detector remove takes none"),
        (("info", "new"), "is not a detector's folder"),
        (("grow", "detector"), "grow: can't be read"),
    ],
)
def test_one_line_says_what_is_wrong(arguments, said, detector, command, tmp_path):
    (tmp_path / "bad").mkdir()
    shutil.copy(next((tmp_path / "new").iterdir()), "bad")
    (tmp_path / "bad" / "broken.png").write_text("<html>")
    before = content(detector)
    result = command("detector", *arguments)
    assert content(detector) == before and not list(tmp_path.glob(".*"))
    if said is None:
        assert result.code == 0
    else:
        assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1, result.err
        assert not (tmp_path / "x").exists()


def test_a_detector_that_keeps_no_features(detector, command, tmp_path):
    path = detector / "fitted_to" / "held_out.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    result = command("detector", *ADD)
    assert result.code == 2 and "held_out.safetensors: damaged" in result.err
    shutil.rmtree(detector / "fitted_to")
    assert command("score", "detector=detector", "images=new").code == 0  # which needs none
    assert "can change  no" in command("detector", "info", "detector").out
    result = command("detector", *ADD)
    assert result.code == 2 and "train.safetensors: missing; without the features of its images" in result.err


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_at(folder, count):
    """Grow the detector in place, and die before the ``count``-th step of writing."""
    os.chdir(folder)
    torch.set_num_threads(1)
    left = [count]

    def mortal(owner, name):
        step = getattr(owner, name)

        def die_before(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **options)

        setattr(owner, name, die_before)

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (files, "save_file")):
        mortal(owner, name)
    mortal(whole_folder, "_exchange")
    mortal(whole_folder.shutil, "rmtree")
    run_detector(DetectorConfig("add", "detector", "detector", "zero", "new", batch_size=16, device="cpu"))


def test_a_kill_at_any_moment_leaves_the_old_detector_or_the_new(detector, command, tmp_path):
    pristine = shutil.copytree(detector, tmp_path / "pristine")
    assert command("detector", "add", "pristine", *ADD[2:4], "out=whole", *ADD[5:]).code == 0
    old, new, seen, count = digest(pristine), digest(tmp_path / "whole"), set(), 0
    while True:
        count += 1
        process = CONTEXT.Process(target=killed_at, args=(tmp_path, count))
        process.start()
        process.join(120)
        there = digest(detector)
        assert there in (old, new), count
        seen.add(there == new)
        Scorer(detector)  # whole
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if there == new:
            shutil.rmtree(detector)
            shutil.copytree(pristine, detector)
    assert count > 15 and seen == {False, True} and there == new
    assert not [path for path in tmp_path.glob(".*")]  # what the killed ones left


@pytest.mark.parametrize("room", [0, 2000, 100_000, 450_000])
def test_a_full_disk_leaves_the_old_detector(room, files_up_to, detector, command, tmp_path):
    before = digest(detector)
    with files_up_to(room):
        full = command("detector", *ADD)
    assert full.code == 2 and "out: " in full.err and "File too large" in full.err, full.err
    assert len(full.err.splitlines()) == 1
    assert digest(detector) == before and not list(tmp_path.glob(".*"))
    assert command("detector", *ADD).code == 0


def test_where_folders_cannot_be_exchanged(detector, command, tmp_path, monkeypatch):
    """Two renames; a process that died between them left the old folder beside, where the next one finds it."""
    monkeypatch.setattr(whole_folder, "_exchange", lambda one, other: False)
    assert command("detector", *ADD).code == 0
    grown = digest(detector)
    os.rename(detector, tmp_path / ".detector.old.gradmix-tmp")
    assert command("detector", "remove", "detector", "class=zero", "out=detector").code == 0
    assert digest(detector) != grown and not list(tmp_path.glob(".*"))
