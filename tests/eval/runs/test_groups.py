"""gradmix-compare: means and paired differences, checked by hand on made-up runs."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from gradmix.eval import detectors
from gradmix.eval.commands.compare import main
from gradmix.eval.report.comparison import gap, text
from gradmix.eval.runs.folder import read_run
from gradmix.eval.runs.groups import Difference, Group, difference, find_runs, group_runs


@pytest.fixture
def runs(digits_run, tmp_path):
    """mix=none on splits 0-2 and mix=gradmix on splits 1-3, with AUROCs that were made up."""
    made = {"none": {0: 0.50, 1: 0.60, 2: 0.70}, "gradmix": {1: 0.65, 2: 0.72, 3: 0.99}}
    config = (digits_run / "config.yaml").read_text()
    numbers = json.loads((digits_run / "metrics.json").read_text())
    for mix, values in made.items():
        for split, value in values.items():
            folder = tmp_path / "runs" / mix / f"split-{split}"
            shutil.copytree(digits_run / "features", folder / "features")
            shutil.copytree(digits_run / "tensorboard", folder / "tensorboard")
            changed = config.replace("name: gradmix", f"name: {mix}").replace("split: 0", f"split: {split}")
            (folder / "config.yaml").write_text(changed.replace("run_dir: run", f"run_dir: {folder}"))
            (folder / "metrics.json").write_text(json.dumps(numbers | {"osr/deep_knn/auroc": value}))
    return tmp_path / "runs"


@pytest.fixture
def compare(monkeypatch, capsys, tmp_path):
    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gradmix-compare", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_detectors_are_read_where_no_scores_were_saved_alone(digits_run, tmp_path, monkeypatch):
    """A bank that is hashed, checked and indexed for a table takes minutes."""
    kept = read_run(digits_run, images=False).scores
    run = shutil.copytree(digits_run, tmp_path / "run")
    (run / "features/scores.safetensors").unlink()
    score, correct = read_run(run, images=False).scores["deep_knn"]
    np.testing.assert_allclose(score, kept["deep_knn"][0], atol=1e-5)
    np.testing.assert_array_equal(correct, kept["deep_knn"][1])
    monkeypatch.setattr(detectors, "load", lambda *_, **__: pytest.fail("a detector was loaded"))
    assert read_run(digits_run, images=False).scores.keys() == kept.keys() > {"deep_knn"}


def test_differences_are_over_the_splits_that_both_have(runs):
    paths = find_runs([runs / "none", runs / "gradmix"])
    assert len(paths) == 6
    ((name, groups),) = group_runs([read_run(path, images=False) for path in paths]).items()
    assert name == "data=digits"
    assert [group.label for group in groups] == ["mix=none", "mix=gradmix"]
    assert sorted(groups[0].values("osr/deep_knn/auroc").values()) == [0.50, 0.60, 0.70]
    apart = difference(groups[1], groups[0], "osr/deep_knn/auroc")
    assert (apart.pairs, apart.higher, apart.lower) == (2, 2, 0)
    assert apart.mean == pytest.approx(0.035)
    assert apart.error == pytest.approx(stats.sem([0.05, 0.02]))


def test_the_table_and_the_page(runs, compare, tmp_path, browser):
    code, out, err = compare(runs / "none", runs / "gradmix", "out=both.html")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if "AUROC of deep_knn" in line)
    assert lines[first + 1].split() == ["mix=none", "60.00", "±", "10.00", "n=3"]
    assert lines[first + 2].split()[:5] == ["mix=gradmix", "78.67", "±", "17.95", "n=3"]
    assert "+3.50 ± 1.50, better in 2 of 2" in lines[first + 2]
    assert "images" not in out and "n = 1" not in out
    assert "± of a difference is its standard error" in out and "fewer than five pairs: too few to tell" in out
    for width in (1200, 390):
        page = browser(tmp_path / "both.html", width)
        run = page.driver.execute_script
        assert run("return document.documentElement.scrollWidth") == width
        assert run("return [...document.querySelectorAll('svg.chart')].filter(s => s.clientHeight > 50).length") == 5
        shown = run("return document.querySelector('[data-key=\"osr/deep_knn/auroc\"]').dataset.value")
        assert float(shown) == pytest.approx(0.6)
        assert page.complaints() == []


def change(folder, **numbers):
    path = folder / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {k.replace("__", "/"): v for k, v in numbers.items()}))


def test_only_what_belongs_to_the_method_is_compared(runs, compare, tmp_path, browser):
    """Speed, seconds, steps and raw pixels may differ; they stand on the page without a difference."""
    for split in (1, 2):
        session = {"train__images_per_s": 3.0, "train__seconds": 5.0, "train__resumed_from_step": 7, "train__loss": 0.5}
        change(runs / f"gradmix/split-{split}", **session, osr__pixels__auroc=0.25, their__measure=0.5)
        change(runs / f"none/split-{split}", their__measure=0.25)
    code, out, _ = compare(runs / "none", runs / "gradmix")
    assert code == 0 and "images" not in out
    (row,) = re.findall(r"  AUROC of raw pixels, % ↑\n.*\n(.*mix=gradmix.*)", out)
    assert re.fullmatch(r"    mix=gradmix +[\d.]+ ± [\d.]+  n=3", row)
    gaps = dict(
        browser(tmp_path / "compare.html").driver.execute_script(
            "return [...document.querySelectorAll('td[data-key]:last-child')].map("
            "  cell => [cell.dataset.key, cell.querySelector('small').textContent])"
        )
    )
    silent = {key for key, gap in gaps.items() if not gap}
    assert {"train/images_per_s", "train/seconds", "train/resumed_from_step", "train/loss"} < silent
    assert {"osr/pixels/auroc", "knn_pixels/top1", "majority/top1", "data/bad_images"} < silent
    assert {key for key in gaps if key.startswith(("knn/", "linear/", "quality/", "osr/deep_knn/"))} & silent == set()
    assert gaps["their/measure"] == "+0.2500 ± 0.0000, higher in 2 of 2"  # which way is better is not known


def test_lower_is_better_where_it_is(runs, compare):
    for split, values in ((1, (0.5, 0.4)), (2, (0.5, 0.6))):
        for mix, value in zip(("none", "gradmix"), values, strict=True):
            change(runs / f"{mix}/split-{split}", osr__deep_knn__fpr95_known=value)
    change(runs / "gradmix/split-2", osr__deep_knn__fpr95_known=0.45)
    out = compare(runs / "none", runs / "gradmix")[1]
    (row,) = re.findall(r"  FPR95 known of deep_knn, % ↓\n.*\n(.*)", out)
    assert row.endswith("-7.50 ± 2.50, better in 2 of 2")


def test_one_pair_is_no_evidence(runs, compare, tmp_path):
    code, out, _ = compare(runs / "none/split-1", runs / "gradmix/split-1")
    assert code == 0
    (row,) = re.findall(r"  AUROC of deep_knn, % ↑\n.*\n(.*)", out)
    assert row.endswith("n=1   +5.00 (n = 1: no evidence)") and "higher in" not in out and "better in" not in out
    assert "fewer than five pairs: too few to tell" in out
    assert "fewer than five pairs: too few to tell" in (tmp_path / "compare.html").read_text()


@pytest.mark.parametrize("pairs", [4, 5])
def test_five_pairs_are_not_called_too_few(pairs):
    config = SimpleNamespace(accept=0.95, per_class=False)
    numbers = {"osr/deep_knn/auroc": 0.5}
    runs = {(split,): [SimpleNamespace(numbers=numbers, config=config)] for split in range(pairs)}
    told = text({"data": [Group("one", runs), Group("other", runs)]})
    assert f"0.00 ± 0.00, better in 0 of {pairs}" in told and ("too few to tell" in told) == (pairs < 5)


def test_nothing_has_no_sign():
    assert gap(Difference(-1e-9, 0.001, 0, 1, 5), 100, "higher") == "0.00 ± 0.10, better in 0 of 5"


def test_the_same_run_twice_counts_once_and_runs_again_are_one_unit(runs, compare):
    shutil.copytree(runs / "none/split-0", runs / "none/again")
    paths = find_runs([runs, runs / "none", runs / "none/split-0"])
    assert len(paths) == 7
    ((_, groups),) = group_runs([read_run(path, images=False) for path in paths]).items()
    assert sorted(len(group.runs) for group in groups) == [3, 3]


def test_what_an_evaluation_was_told_sets_runs_apart(runs):
    """gradmix-eval may have measured something else than config.yaml says, and says so in metrics.json."""
    for split, told in ((1, {"detector_options": {"deep_knn": {"k": 9}}}), (2, {"data/unknown_root": "far"})):
        path = runs / f"none/split-{split}/metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | told))
    sets = group_runs([read_run(path, images=False) for path in find_runs([runs / "none"])])
    assert {name: [group.label for group in groups] for name, groups in sets.items()} == {
        "data.unknown_root=None": ["detector_options.deep_knn.k=default", "detector_options.deep_knn.k=9"],
        "data.unknown_root=far": ["method=joint, mix=none"],
    }


def test_other_test_images_are_another_data_set(runs):
    """With data.pseudo_unknown known classes test as unknown ones, and the unknown ones not at all."""
    for split in (1, 2, 3):
        path = runs / f"gradmix/split-{split}/config.yaml"
        path.write_text(path.read_text().replace("pseudo_unknown: 0", "pseudo_unknown: 2"))
    sets = group_runs([read_run(path, images=False) for path in find_runs([runs / "none", runs / "gradmix"])])
    assert list(sets) == ["data.pseudo_unknown=0", "data.pseudo_unknown=2"]


def test_a_folder_of_images_is_the_same_however_it_was_typed(runs, tmp_path):
    for typed, folder in (("ph", runs / "none/split-1"), ("./ph", runs / "gradmix/split-1")):
        text = (folder / "config.yaml").read_text()
        text = text.replace("name: digits", "name: imagefolder").replace("root: null", f"root: {typed}", 1)
        (folder / "config.yaml").write_text(text)
        change(folder, data={"name": "imagefolder", "root": str(tmp_path / "ph"), "split": 1, "known": None})

    def labels():
        sets = group_runs([read_run(runs / f"{mix}/split-1", images=False) for mix in ("none", "gradmix")])
        return [[group.label for group in groups] for groups in sets.values()]

    assert labels() == [["mix=none", "mix=gradmix"]]
    change(folder, data={"name": "imagefolder", "root": str(tmp_path / "elsewhere"), "split": 1, "known": None})
    assert len(labels()) == 2


def test_runs_trained_on_other_images_are_no_pair(runs, compare):
    """Images that were added between two trainings: other ones are drawn to train on, and to test."""
    note = "that were trained on other images (train/images in metrics.json) are no pairs."
    assert note not in compare(runs / "none", runs / "gradmix")[1]
    change(runs / "gradmix/split-1", train__images="of more images")
    code, out, _ = compare(runs / "none", runs / "gradmix")
    assert code == 0 and note in out
    (row,) = re.findall(r"  AUROC of deep_knn, % ↑\n.*\n(.*)", out)
    assert row.endswith("+2.00 (n = 1: no evidence)")  # split 2 alone: 0.72 - 0.70
    path = runs / "none/split-2/metrics.json"  # one that does not say so, as weights from elsewhere
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "train/images"}))
    assert row in compare(runs / "none", runs / "gradmix")[1]
    change(runs / "gradmix/split-2", train__images=[1])
    code, _, err = compare(runs / "none", runs / "gradmix")
    assert code == 2 and "metrics.json: train/images" in err and len(err.strip().splitlines()) == 1


def test_other_thresholds_are_no_difference(runs, compare):
    """False alarms and balanced decisions follow accept and per_class; the threshold has no part in the others."""
    keys = [f"osr/deep_knn/{name}" for name in ("false_alarms", "balanced_accuracy", "fpr95")]

    def gaps():
        ((_, groups),) = group_runs([read_run(path, images=False) for path in find_runs([runs])]).items()
        assert len(groups) == 2
        return [difference(groups[1], groups[0], key) is not None for key in keys]

    note = "accept or per_class differ: false alarms and balanced decisions, which follow them"
    assert gaps() == [True, True, True] and note not in compare(runs)[1]
    for told in ({"accept": 0.5, "per_class": False}, {"accept": 0.95, "per_class": True}):
        for split in (1, 2, 3):
            change(runs / f"gradmix/split-{split}", evaluation={**told, "primary": "deep_knn"})
        assert gaps() == [False, False, True] and note in compare(runs)[1]


def test_every_number_is_there_also_of_later_runs(runs, compare, tmp_path):
    path = runs / "gradmix/split-2/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"osr/vim/auroc": 0.98765}))
    assert compare(runs)[0] == 0
    page = (tmp_path / "compare.html").read_text()
    assert re.findall(r'data-key="osr/vim/auroc" data-value="0.98765">([\d.]+)<', page) == ["0.9877"]


def test_one_run_alone(digits_run, compare):
    code, out, _ = compare(digits_run)
    assert code == 0
    assert "method=joint, mix=gradmix" in out and "±" not in out.split("Mean ± standard")[0]


def test_bad_input_is_one_line(compare, tmp_path, runs):
    (tmp_path / "empty").mkdir()
    shutil.copytree(runs / "none/split-0", tmp_path / "unfinished")
    (tmp_path / "unfinished/metrics.json").unlink()
    for folder, message in (
        ("empty", "empty: no evaluated run there"),
        ("nowhere", "nowhere: no evaluated run there"),
        ("unfinished", "has not finished training; repeat the gradmix-pretrain command"),
    ):
        code, _, err = compare(folder)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    (runs / "none/split-1/metrics.json").write_text("{")
    code, _, err = compare(runs)
    assert code == 2 and "metrics.json: damaged" in err
    assert compare()[0] == 2
