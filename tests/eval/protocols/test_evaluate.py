"""A run's numbers against scikit-learn on the features that the run saved."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import recall_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import normalize

from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.commands.work.evaluate import take_over
from gradmix.eval.config import EvalConfig
from gradmix.eval.detectors import ViM, load
from gradmix.eval.features.extraction import raw_pixels
from gradmix.eval.protocols.evaluate import evaluate
from gradmix.eval.protocols.measures import choose_measures
from gradmix.eval.report import write_report
from gradmix.eval.report.summary import over_splits, table
from gradmix.eval.runs.compare import compare
from gradmix.ssl.config import Config
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.data.splits import SPLITS
from gradmix.ssl.runs.folder import read_config


def read(run):
    return json.loads((run / "metrics.json").read_text())


SMALL = ("epochs=1", "encoder.width=4", "trainer.accelerator=cpu")


def test_all_splits_in_one_command(command, monkeypatch, tmp_path, digits_run):
    monkeypatch.setitem(SPLITS, "digits", SPLITS["digits"][:2])
    result = command("pretrain", *SMALL, "data.split=all", "run_dir=all")
    assert result.code == 0, result.err
    assert "±" in result.out
    runs = [json.loads((tmp_path / f"all/split-{i}/metrics.json").read_text()) for i in range(2)]
    summary = json.loads((tmp_path / "all/metrics.json").read_text())
    for key in ("osr/deep_knn/auroc", "osr/pixels/oscr", "knn/top1"):
        values = np.array([run[key] for run in runs])
        assert summary[key] == pytest.approx(values.mean())
        assert summary[f"{key}/std"] == pytest.approx(values.std(ddof=1))
    page = (tmp_path / "all/report.html").read_text()  # the same mean, and the way to each split's own report
    shown = re.search(r'data-key="osr/deep_knn/auroc" data-value="([^"]+)"', page)[1]
    assert float(shown) == pytest.approx(summary["osr/deep_knn/auroc"])
    links = re.findall(r'href="(split-\d/report\.html)"', page)
    assert len(links) == 2 and all((tmp_path / "all" / link).is_file() for link in links)

    # The first of them, against scikit-learn on the saved features
    run = tmp_path / "all/split-0"
    train, test = (load_file(run / "features" / f"{name}.safetensors") for name in ("train", "test"))
    known = test["labels"].numpy() >= 0
    bank, queries = (normalize(part["features"].double().numpy()) for part in (train, test))
    fifth = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(bank).kneighbors(queries)[0][:, 4]
    assert runs[0]["osr/deep_knn/auroc"] == pytest.approx(roc_auc_score(~known, fifth), abs=1e-4)

    vote = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    right = vote.fit(bank, train["labels"]).predict(queries[known]) == test["labels"].numpy()[known]
    assert runs[0]["knn/top1"] == pytest.approx(right.mean(), abs=0.003)

    # What needs no learning does not depend on the run: the same split, trained in another way
    other, pixels = read(digits_run), [key for key in runs[0] if "pixels" in key]
    assert len(pixels) > 5 and all(runs[0][key] == other[key] for key in pixels)
    assert runs[0]["osr/deep_knn/auroc"] != other["osr/deep_knn/auroc"]


def test_evaluating_all_splits_again(command, tmp_path, digits_run):
    for split in (0, 1):
        shutil.copytree(digits_run, tmp_path / f"all/split-{split}", ignore=shutil.ignore_patterns("checkpoints"))
    result = command("eval", "run=all", "detectors=[deep_knn]", "out=again")
    assert result.code == 0, result.err
    assert "over 2 splits" in result.out and "±" in result.out
    summary = read(tmp_path / "again")
    assert summary["osr/deep_knn/auroc"] == pytest.approx(read(digits_run)["osr/deep_knn/auroc"])
    assert summary["osr/deep_knn/auroc/std"] == 0 and "osr/deep_knn/auroc_low" not in summary
    result = command("eval", "run=all", "against=again")
    assert result.code == 0 and result.out.count("deep_knn AUROC") == 2

    # A mean is gone as soon as it is not that of its splits any more
    means = [tmp_path / "all" / name for name in ("metrics.json", "report.html", "metrics_corruptions.json")]
    for path in means:
        path.write_text("{}")
    for failing, left in ((0, [True, True, True]), (1, [False, False, True])):
        finished = tmp_path / f"all/split-{failing}/training.json"
        finished.rename(tmp_path / "aside")
        result = command("eval", "run=all", "detectors=[]")
        assert result.code == 2 and f"split-{failing} has not finished training; repeat the gradmix-" in result.err
        assert [path.exists() for path in means] == left
        (tmp_path / "aside").rename(finished)


def test_over_splits_says_what_all_of_them_say():
    splits = [
        {"a": 1.0, "b_low": 0.5, "c": "x", "d": "lr 1", "e": {"k": 1}},
        {"a": 2, "b_low": 0.5, "c": "x", "d": "lr 2"},
    ]
    assert over_splits(splits) == {"splits": 2, "a": 1.5, "a/std": pytest.approx(0.5**0.5), "c": "x"}
    assert over_splits([{"knn/top1": 0.5}]) == {"splits": 1, "knn/top1": 0.5}  # of one there is no deviation
    assert "50.00\n" in table(over_splits([{"knn/top1": 0.5}])) + "\n"
    same, few = {"pixels": "too large"}, {"promise": "there are 18"}
    skipped = [same | few, same | few, same | {"promise": "there are 17"} | {"recall": "no images"}]
    assert over_splits([{"skipped": one} for one in skipped])["skipped"] == {
        "pixels": "too large",
        "promise": "in 2 of 3 splits: there are 18; in 1 of 3 splits: there are 17",
        "recall": "in 1 of 3 splits: no images",
    }


@pytest.mark.parametrize("test_images", ["unknown ones", "none"])
def test_without_known_test_images_the_rest_is_measured(digits_run, tmp_path, test_images):
    config = read_config(digits_run)
    data = load_data(config.data, config.seed)
    rows = (data.test.labels < 0).nonzero()[:, 0] if test_images == "unknown ones" else torch.zeros(0).long()
    result = evaluate(digits_run, config, replace(data, test=data.test.select(rows)), out=tmp_path / "out")
    assert result["skipped"] == {"knn, linear, osr": "the test set has no images of known classes"}
    assert "quality/effective_rank" in result and "knn/top1" not in result
    assert (tmp_path / "out/detector/scorer.json").is_file() and not (
        tmp_path / "out/features/scores.safetensors"
    ).exists()


def test_without_unknown_images_what_needs_none_is_measured(digits_run, command, tmp_path):
    """False alarms and the closest class, counted by hand in the saved scores; shown wherever numbers are."""
    config = read_config(digits_run)
    data = load_data(config.data, config.seed)
    data = replace(data, test=data.test.select((data.test.labels >= 0).nonzero()[:, 0]))
    out = tmp_path / "out"
    result = evaluate(digits_run, config, data, out=out)
    assert result["skipped"] == {"how well unknown images are found": "the test set has no unknown classes"}
    scores, whole = load_file(out / "features/scores.safetensors"), read(digits_run)
    for name, where in (("deep_knn", "detector"), ("mahalanobis", "detectors/mahalanobis")):
        score, limit = scores[f"{name}/score"].numpy(), load(out / where).threshold
        alarms = sum(float(one) > limit for one in score) / len(data.test)
        right = np.count_nonzero(scores[f"{name}/correct"].numpy()) / len(data.test)
        assert result[f"osr/{name}/false_alarms"] == pytest.approx(alarms) and 0 < alarms < 0.3
        assert result[f"osr/{name}/closed_set_accuracy"] == pytest.approx(right) and 0.3 < right < 1
    found = {key: value for key, value in result.items() if key.startswith("osr/")}
    assert len(found) == 8 and all(value == whole[key] for key, value in found.items())  # four detectors

    text = table(result)
    assert "\ndetectors on known images, %\n" in text and "unknown against known" not in text
    assert re.search(r"^ +Closed set +False alarms$", text, re.M) and "FPR95" not in text and "AUROC" not in text
    assert "not measured: how well unknown images are found (the test set has no unknown classes)" in text
    shutil.copy(digits_run / "config.yaml", out)
    page = write_report(out, data).read_text()
    assert "<h3>Detectors on known images</h3>" in page and "Unknown against known classes" not in page
    shutil.copytree(out, tmp_path / "again")
    result = command("compare", "again", "out", "out=both.html")
    assert result.code == 0, result.err
    for key in found:
        assert f'data-key="{key}"' in page and f'data-key="{key}"' in (tmp_path / "both.html").read_text()
    result = command("eval", "run=out", "against=again")
    assert result.code == 2 and "the test set of out and again has no unknown images" in result.err


def test_classes_without_a_test_image_are_named(digits_run, tmp_path):
    """And the rest is scikit-learn's, of the classes that have some: 2 is the first of the known digits."""
    config = read_config(digits_run)
    data = load_data(config.data, config.seed)
    data = replace(data, test=data.test.select((data.test.labels != 0).nonzero()[:, 0]))
    result = evaluate(digits_run, config, data, out=tmp_path / "out")
    assert result["skipped"] == {"recall of 2": "the test set has no such images"}
    assert list(result["knn/recall"]) == data.classes[1:] == list(result["linear/recall"])
    parts = {name: load_file(tmp_path / f"out/features/{name}.safetensors") for name in ("train", "test")}
    known = parts["test"]["labels"] >= 0
    labels = parts["test"]["labels"][known].numpy()
    probe = LinearProbe(seed=0).fit(parts["train"]["features"], parts["train"]["labels"])
    predicted = probe.predict(parts["test"]["features"][known]).numpy()
    recalls = recall_score(labels, predicted, average=None, labels=range(1, 6))
    assert list(result["linear/recall"].values()) == pytest.approx(recalls)
    assert result["linear/balanced_accuracy"] == pytest.approx(recalls.mean())
    largest = np.bincount(parts["train"]["labels"]).argmax()
    assert result["majority/top1"] == pytest.approx((labels == largest).mean())
    assert "not measured: recall of 2" in table(result)


def test_a_collapsed_network_has_no_class_spread(command, digits_run, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    with safe_open(run / "backbone.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = load_file(run / "backbone.safetensors")
    for name in ("layer4.1.bn2.weight", "layer4.1.bn2.bias", "layer4.1.conv2.weight"):
        weights[name].zero_()
    weights["layer4.0.bn2.weight"].zero_()
    weights["layer4.0.downsample.1.weight"].zero_()  # what is left of every image is layer4.0's bias
    save_file(weights, run / "backbone.safetensors", metadata)
    result = command("eval", f"run={run}", "detectors=[deep_knn]")
    assert result.code == 0, result.err
    why = "the class means coincide, which makes it infinite"
    assert f"not measured: quality/class_spread ({why})" in result.out
    numbers = json.loads((run / "metrics.json").read_text(), parse_constant=pytest.fail)  # no Infinity, no NaN
    assert numbers["skipped"] == {"quality/class_spread": why} and "quality/class_spread" not in numbers
    assert f"Not measured: quality/class_spread, for {why}." in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("key", "k"),
    [("knn_k", 0), ("knn_k", 647), ("detector_options.deep_knn.k", 647), ("detector_options.class_knn.k", 0)],
)
def test_neighbours_that_are_not_there_are_refused_before_training(digits_run, key, k):
    config = read_config(digits_run)
    data = load_data(config.data, config.seed)
    choose_measures(config, data=data)
    config.detectors = ["class_knn"]  # deep_knn is saved, whatever is measured
    if key == "knn_k":
        config.knn_k = k
    else:
        config.detector_options = {key.split(".")[1]: {"k": k}}
    with pytest.raises(ValueError, match=rf"{key}: expected 1 to 646, the size of the training set, got {k}"):
        choose_measures(config, data=data)


def test_the_interval_is_the_bootstraps(digits_run):
    metrics, scores = read(digits_run), load_file(digits_run / "features/scores.safetensors")
    known = (scores["labels"] >= 0).numpy()
    score = scores["deep_knn/score"].numpy()
    assert metrics["osr/deep_knn/auroc"] == pytest.approx(roc_auc_score(~known, score))
    rng = np.random.default_rng(7)
    sides = np.flatnonzero(known), np.flatnonzero(~known)
    draws = [np.concatenate([rng.choice(side, len(side)) for side in sides]) for _ in range(400)]
    low, high = np.quantile([roc_auc_score(~known[rows], score[rows]) for rows in draws], [0.025, 0.975])
    assert metrics["osr/deep_knn/auroc_low"] == pytest.approx(low, abs=0.012)
    assert metrics["osr/deep_knn/auroc_high"] == pytest.approx(high, abs=0.012)


def test_scores_say_what_the_metrics_say(digits_run):
    metrics, scores = read(digits_run), load_file(digits_run / "features/scores.safetensors")
    known = scores["labels"] >= 0
    for detector in ("deep_knn", "class_knn", "mahalanobis", "pixels"):
        correct = scores[f"{detector}/correct"]
        assert not correct[~known].any()
        assert correct[known].double().mean() == pytest.approx(metrics[f"osr/{detector}/closed_set_accuracy"])
    assert len(scores["images"].unique()) > len(known) - 3  # the digits hold a few exact duplicates


def test_the_threshold_is_of_the_held_out_images(digits_run):
    bank, held_out, test = (
        torch.from_numpy(normalize(load_file(digits_run / f"features/{name}.safetensors")["features"].double().numpy()))
        for name in ("train", "held_out", "test")
    )
    fifth = torch.cdist(held_out, bank).topk(5, largest=False).values[:, -1].sort().values
    threshold = fifth[math.ceil((len(fifth) + 1) * 0.95 - 1e-9) - 1].item()
    assert load(digits_run / "detector").threshold == pytest.approx(threshold, rel=1e-4)
    known = load_file(digits_run / "features/test.safetensors")["labels"] >= 0
    flagged = torch.cdist(test, bank).topk(5, largest=False).values[:, -1] > threshold
    expected = (flagged[~known].double().mean() + (~flagged[known]).double().mean()).item() / 2
    assert read(digits_run)["osr/deep_knn/balanced_accuracy"] == pytest.approx(expected, abs=1e-3)


def test_results_do_not_replace_those_of_another_run(digits_run, command, tmp_path):
    shutil.copytree(digits_run, tmp_path / "other")
    shutil.copytree(digits_run, tmp_path / "splits/split-0")
    before = read(tmp_path / "other")
    for run, out, whose in (
        (digits_run, "other", "other"),
        (digits_run, "splits", "splits/split-0"),
        ("splits", "other", "other"),
        ("splits", "splits/split-0", "splits/split-0"),
    ):
        refused = command("eval", f"run={run}", "detectors=[]", f"out={out}")
        assert (refused.code, refused.out) == (2, "")
        assert f"out: {whose} is another run's folder, whose results would be lost; give another" in refused.err
    assert read(tmp_path / "other") == before
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert command("eval", "run=other", "detectors=[]", "out=link").code == 0  # its own, by another name
    assert read(tmp_path / "other") != before
    assert "out=link" in (tmp_path / "other/report.html").read_text()  # the command of the numbers that it shows


def test_two_runs_on_the_same_images(digits_run, command, tmp_path):
    result = command("eval", f"run={digits_run}", "detectors=[deep_knn,vim]", "detector_options.deep_knn.k=1", "out=k1")
    assert result.code == 0, result.err
    ours, theirs = read(tmp_path / "k1"), read(digits_run)
    assert ours["detector_options"] == {"deep_knn": {"k": 1}}
    asked = f"gradmix-eval run={digits_run} 'detectors=[deep_knn,vim]' detector_options.deep_knn.k=1 out=k1"
    assert ours["evaluation"] == {
        "accept": 0.95,
        "per_class": False,
        "primary": "deep_knn",
        "detectors": ["deep_knn", "vim"],
        "command": asked,
    }
    assert ours["data"] == {"name": "digits", "root": None, "split": 0, "known": None}
    assert ours["osr/deep_knn/auroc"] != theirs["osr/deep_knn/auroc"]
    result = command("eval", "run=k1", f"against={digits_run}")
    assert result.code == 0, result.err
    for metric in ("auroc", "oscr"):
        (line,) = (line for line in result.out.splitlines() if line.startswith(f"  deep_knn {metric.upper()}"))
        value, low, high = (float(word.strip("[],")) for word in line.split()[-3:])
        assert value == pytest.approx(
            100 * (ours[f"osr/deep_knn/{metric}"] - theirs[f"osr/deep_knn/{metric}"]), abs=0.01
        )
        assert low <= value <= high and high - low < 20
    assert result.out.endswith("; other seeds may turn it round: gradmix-compare over five seeds\n")
    assert "mahalanobis" not in result.out  # only one of the two has it
    same = compare(digits_run, digits_run)
    assert set(same) == {
        f"{d}/{m}" for d in ("deep_knn", "class_knn", "mahalanobis", "pixels") for m in ("auroc", "oscr")
    }
    assert all(interval == (0, 0, 0) for interval in same.values())

    # ViM got the linear probe
    train, test = (load_file(tmp_path / "k1/features" / f"{name}.safetensors") for name in ("train", "test"))
    probe = LinearProbe(seed=0).fit(train["features"], train["labels"])
    vim = ViM().fit(train["features"], train["labels"], head=(probe.weight_, probe.bias_))
    scores = load_file(tmp_path / "k1/features/scores.safetensors")
    torch.testing.assert_close(scores["vim/score"], vim.score(test["features"]))


def test_detector_options_are_over_the_run_s_own():
    """One parameter more leaves a detector's others as they were."""
    own = {"gaussian_mixture": {"components": 2, "seed": 1}, "deep_knn": {"k": 3}}
    run = Config(run_dir="run", detector_options=own)
    take_over(run, EvalConfig(detector_options={"gaussian_mixture": {"seed": 7}, "vim": {"dim": 4}}))
    assert run.detector_options == {
        "gaussian_mixture": {"components": 2, "seed": 7},
        "deep_knn": {"k": 3},
        "vim": {"dim": 4},
    }


def test_other_images_cannot_be_compared(digits_run, command, tmp_path):
    (tmp_path / "far").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"far/{i}.png")
    result = command("eval", f"run={digits_run}", "unknown_root=far", "detectors=[deep_knn]", "out=out")
    assert result.code == 0, result.err
    numbers = read(tmp_path / "out")
    assert numbers["data/unknown_root"] == "far"
    assert numbers["data/test_known"] == 359 and numbers["data/test_unknown"] == 30
    assert "389 test images (30 of unknown classes)\n" in result.out and "; unknown: far\n" in result.out
    scores = load_file(tmp_path / "out/features/scores.safetensors")
    assert (scores["labels"] < 0).sum() == 30 and (scores["labels"] >= 0).sum() == 359
    assert read(tmp_path / "out")["osr/pixels/auroc"] > 0.9  # noise is no digit
    for arguments, message in (
        (("run=out", f"against={digits_run}"), "the test images of out and"),
        (("run=out", "against=far"), "far: no scores of detectors there"),
        ((f"run={digits_run}", "unknown_root=nothing"), "data.unknown_root: nothing is not a folder"),
    ):
        result = command("eval", *arguments)
        assert result.code == 2 and message in result.err, result.err
        assert len(result.err.strip().splitlines()) == 1


def test_named_sets_of_unknown_images(digits_run, command, tmp_path):
    """Every set's numbers are those of an evaluation with it alone; near and far are OpenOOD's means."""
    rng = np.random.default_rng(0)
    for name, low in (("near a", 0), ("near_b", 100), ("far", 250)):
        (tmp_path / name).mkdir()
        for i in range(20 + low // 10):
            Image.fromarray(rng.integers(low, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    usual = (f"run={digits_run}", "detectors=[deep_knn,msp]", "device=cpu")
    sets = ("unknown_roots.near_a=near a", "unknown_roots={near_b: near_b, far: far}")
    result = command("eval", *usual, sets[1], sets[0], "out=out")
    assert result.code == 0, result.err
    assert "deep_knn, near " in result.out and "deep_knn, near_a" in result.out
    numbers = read(tmp_path / "out")
    assert numbers["data/unknown_roots"] == {"near_a": "near a", "near_b": "near_b", "far": "far"}
    for name, folder in numbers["data/unknown_roots"].items():
        alone = command("eval", *usual, f"unknown_root={folder}", f"out=alone-{name}")
        assert alone.code == 0, alone.err
        alone = read(tmp_path / f"alone-{name}")
        keys = [key for key in alone if key.startswith("osr/") and not key.endswith(("_low", "_high"))]
        assert len(keys) == 27
        for key in keys:
            _, detector, metric = key.split("/")
            assert numbers[f"osr/{detector}/{name}/{metric}"] == pytest.approx(alone[key], abs=1e-6)
    for key in ("osr/msp/{}/auroc", "osr/pixels/{}/fpr95"):
        both = [numbers[key.format(name)] for name in ("near_a", "near_b")]
        assert numbers[key.format("near")] == pytest.approx(sum(both) / 2)
    assert numbers["osr/deep_knn/far/aupr"] > 45 / (45 + 359)  # better than chance: the set's share
    result = command("eval", *usual, "unknown_roots={near: far, near_b: far}", "out=x")
    assert result.code == 2 and "data.unknown_roots.near: is the mean over near_..." in result.err


def test_large_images_are_averaged_down_for_the_pixel_baseline():
    images = torch.randint(0, 256, (3, 3, 64, 64)).to(torch.uint8)
    got = raw_pixels(ImageSet(torch.zeros(3).long(), 64, images)).view(3, 3, 32, 32)
    blocks = images.double().view(3, 3, 32, 2, 32, 2).mean((3, 5)) / 255
    torch.testing.assert_close(got.double(), blocks, atol=1e-6, rtol=0)
