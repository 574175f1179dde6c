"""The table of numbers: every number of a run is in it, and whoever shows numbers reads it."""

import importlib.util
import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

from gradmix.eval import catalogue, metrics
from gradmix.eval.catalogue import KNOWN, METRICS, OPEN_SET, Metric, ScoredSets, of_predictions, of_scores
from gradmix.eval.report.summary import table

ROOT = Path(__file__).parents[2]


def test_every_number_of_a_run_is_in_the_table(digits_run):
    numbers = json.loads((digits_run / "metrics.json").read_text())
    missing = [key for key, value in numbers.items() if isinstance(value, int | float) and not catalogue.match(key)]
    assert missing == [] and len(numbers) > 60
    assert all(catalogue.match(f"{name}/recall") for name in ("knn", "linear"))


@pytest.mark.parametrize(
    ("key", "called", "of_the_method"),
    [
        ("osr/deep_knn/auroc", "AUROC of deep_knn", True),
        ("osr/deep_knn/auroc_low", "AUROC of deep_knn", True),
        ("osr/deep_knn/balanced_accuracy", "Balanced decisions of deep_knn", True),
        ("osr/pixels/auroc", "AUROC of raw pixels", False),
        ("osr/vim/full_spectrum/far/auroc", "AUROC of vim, full_spectrum/far", True),
        ("osr/pixels/full_spectrum/fpr95", "FPR95 of raw pixels, full_spectrum", False),
        ("knn/balanced_accuracy", "Balanced accuracy of kNN", True),
        ("knn/k=20,t=0.1/top1", "Accuracy of kNN, k=20,t=0.1", True),
        ("few_labels/1%/top1_std", "Accuracy of linear, few labels, 1%", True),
        ("knn_pixels/top1", "Accuracy of kNN on raw pixels", False),
        ("majority/top1", "Accuracy of always the largest class", False),
        ("quality/alignment", "Alignment", True),
        ("corruptions/mce/knn", "mCE of kNN", True),
        ("corruptions/fog/ce/knn", "CE of fog, knn", True),
        ("corruptions/fog/knn", "On corrupted images of fog, knn", True),
        ("train/images_per_s", "Training images per second", False),
        ("train/of_another_package", "train/of_another_package", False),
        ("their/measure", "their/measure", True),
    ],
)
def test_keys_find_their_metric(key, called, of_the_method):
    assert catalogue.title(key) == called
    assert catalogue.is_of_the_method(key) is of_the_method


def test_of_corrupted_images_errors_are_better_lower_and_accuracies_higher():
    ways = {"mce/knn": "lower", "mean_error/linear": "lower", "fog/ce/linear": "lower"}
    ways |= {"fog/linear": "higher", "fog/3/knn_pixels": "higher", "clean/knn": "higher"}
    for key, better in ways.items():
        assert catalogue.metric_of(f"corruptions/{key}").better == better, key


def test_no_key_stands_twice_and_each_is_said_in_a_sentence():
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"[A-Z].*\.", metric.sentence), metric.key
        assert catalogue.match(metric.at("x"))[0] is metric


def test_predictions_and_scores_get_every_number_of_their_table(monkeypatch):
    counted, class_recalls = [], metrics.class_recalls
    monkeypatch.setattr(metrics, "class_recalls", lambda *arrays: counted.append(1) or class_recalls(*arrays))
    rng = np.random.default_rng(0)
    labels, predicted = np.repeat([0, 1, 3], [50, 7, 3]), rng.integers(0, 4, 60)
    numbers = of_predictions("knn", torch.from_numpy(predicted), labels, ["a", "b", "without images", "d"])
    assert numbers["knn/top1"] == pytest.approx((predicted == labels).mean()) and len(counted) == 1
    recalls = recall_score(labels, predicted, average=None, labels=[0, 1, 3])
    assert numbers["knn/recall"] == pytest.approx(dict(zip("abd", recalls, strict=True)))
    assert numbers["knn/balanced_accuracy"] == pytest.approx(recalls.mean())
    assert numbers["knn/lowest_recall"] == pytest.approx(recalls.min())
    assert "knn/recall" not in of_predictions("knn", predicted, labels)
    known, unknown, correct = rng.normal(size=30), rng.normal(size=20) + 1, rng.random(30) < 0.7
    found = of_scores(ScoredSets(known, unknown, correct, (known > 0.5, unknown > 0.5)))
    assert set(found) == {metric.name for metric in OPEN_SET}
    assert found["balanced_accuracy"] == metrics.balanced_accuracy(known, unknown, 0.5)
    assert found["false_alarms"] == (known > 0.5).mean()
    found = of_scores(ScoredSets(known, unknown, correct))
    assert "balanced_accuracy" not in found and found["auroc"] == metrics.auroc(known, unknown)
    found = of_scores(ScoredSets(known, [], correct, (known > 0.5, [])))
    assert found == {"closed_set_accuracy": correct.mean(), "false_alarms": (known > 0.5).mean()}


def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_documentation_has_every_number():
    page = (ROOT / "docs/numbers.md").read_text()
    for metric in METRICS:
        assert f"| `{metric.key}` | {metric.title} {metric.arrow} | {metric.sentence} |" in page
    for name in re.findall(r"`(\w+)`", (ROOT / "docs/numbers.md").read_text()):  # what its sentences speak of is there
        if name.startswith(("auroc", "fpr")):
            assert catalogue.match(f"osr/x/{name}"), name


def test_an_entry_is_all_that_a_new_number_needs(monkeypatch):
    """The one that CONTRIBUTING shows: computed, titled, in the terminal, the documentation and comparisons."""
    text = re.search(r"^Metric\(.*?^\),$", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert text, "CONTRIBUTING.md has no entry from `Metric(` to `),` at the start of lines: did ruff format wrap it?"
    new = eval(textwrap.dedent(text[0]).rstrip(","), {"Metric": Metric, "metrics": metrics})
    new = replace(new, terminal=True, compared=True)
    monkeypatch.setattr(catalogue, "OPEN_SET", (*OPEN_SET, new))
    monkeypatch.setattr(catalogue, "METRICS", (*METRICS, new))
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(size=50), rng.normal(size=50) + 1
    value = of_scores(ScoredSets(known, unknown, known < 1))["fpr80"]
    assert value == metrics.fpr_at_tpr(known, unknown, 0.8)
    shown = table({"osr/deep_knn/auroc": 0.9, "osr/deep_knn/fpr80": value})
    assert "FPR80" in shown and f"{100 * value:.2f}" in shown and new.sentence in shown
    assert "osr/deep_knn/fpr80" in catalogue.compared(["deep_knn"])
    assert new.sentence in hooks().filled("<!-- metrics OPEN_SET -->\n<!-- end of the table -->")


@pytest.mark.parametrize("name", ["numbers", "settings"])
def test_the_tables_of_the_pages_are_those_of_the_code(name):
    text = (ROOT / f"docs/{name}.md").read_text()
    assert hooks().filled(text) == text, "make docs writes them anew"


def test_the_terminal_has_a_line_for_a_number_of_no_classifier(monkeypatch):
    rank, error = (catalogue.metric_of(key) for key in ("quality/effective_rank", "corruptions/mean_error/knn"))
    numbers = {"knn/top1": 0.9, rank.key: 3.25, f"{rank.key}/std": 0.5, "corruptions/mean_error/knn": 0.125}
    assert "3.25" not in table(numbers) and "12.50" not in table(numbers)
    monkeypatch.setattr(catalogue, "METRICS", tuple(replace(m, terminal=m in (*KNOWN, rank, error)) for m in METRICS))
    assert "copies" not in table(numbers | {"data/test_copies": 0})
    copies = table(numbers | {"data/test_copies": 3})
    assert "\n  too good: exact copies of training images in the test set: 3" in copies
    wrong = table(numbers | {"data/unknown_copies": 4})
    assert "\n  wrong: exact copies of training images among the unknown ones: 4" in wrong and "too good" not in wrong
    assert "\n  Effective rank: 3.25 ± 0.50\n  Mean error of kNN %: 12.50" in table(numbers)


def test_the_terminal_shows_imbalance():
    """Always the largest class: 90 % accurate, and right about one class of two."""
    labels = np.repeat([0, 1], [90, 10])
    numbers = of_predictions("knn", np.zeros(100, int), labels, ["many", "few"])
    numbers |= of_predictions("majority", np.zeros(100, int), labels)
    numbers["skipped"] = {"recall of none": "the test set has no such images"}
    assert numbers["knn/balanced_accuracy"] == balanced_accuracy_score(labels, np.zeros(100)) == 0.5
    text = table(numbers)
    assert re.search(r"^ +Accuracy +Balanced accuracy +Lowest recall$", text, re.M)
    assert re.search(r"^  kNN +90\.00 +50\.00 +0\.00$", text, re.M)
    assert re.search(r"^  always the largest class +90\.00 +50\.00 +0\.00$", text, re.M)
    assert "kNN, recall by class: few 0.0, many 100.0" in text
    assert "not measured: recall of none (the test set has no such images)" in text
    assert [metric.title for metric in KNOWN if metric.terminal] == ["Accuracy", "Balanced accuracy", "Lowest recall"]
