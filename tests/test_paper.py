"""benchmarks/paper.py: runs that are continued, and the arithmetic of its table."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper

    return paper


@pytest.fixture
def paper(benchmark, monkeypatch, capsys, tmp_path):
    def run(*arguments):
        words = ["paper.py", "--experiment", "none", "--splits", "0", "--mix", "none"]
        words += ["--override", "data=digits", "encoder.width=4", "trainer.accelerator=cpu", "--tag", "small"]
        words += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "rows.json"), "--epochs", "1"]
        monkeypatch.setattr(sys, "argv", [*words, *arguments])
        benchmark.main()
        return capsys.readouterr().out

    return run


def test_a_matrix_goes_on_until_nothing_is_left(paper, tmp_path):
    assert "runs left: 1" in paper("--minutes", "0.01")  # no time to start anything
    assert json.loads((tmp_path / "rows.json").read_text()) == []
    assert "nothing left to run" in paper()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    metrics = json.loads(next((tmp_path / "runs").rglob("metrics.json")).read_text())
    assert row["detectors"]["deep_knn"]["auroc"] == metrics["osr/deep_knn/auroc"]
    assert (row["data"], row["split"], row["mix"], row["epochs"], row["seed"]) == ("digits", 0, "none", 1, 0)
    assert row["minutes"] > 0 and row["commit"]
    again = paper()  # at once: the run is there
    assert "gradmix-pretrain" not in again and len(json.loads((tmp_path / "rows.json").read_text())) == 1


def row(mix, split, auroc):
    detectors = {"deep_knn": {"auroc": auroc, "oscr": 0.5}, "pixels": {"auroc": 0.5}}
    setting = {"data": "digits", "method": "joint", "mix": mix, "evidence": "", "epochs": 3, "tag": "", "seed": 0}
    setting["pseudo_unknown"] = 0
    return (
        setting
        | {"split": split, "detectors": detectors, "closed_set_accuracy": 0.9, "knn_top1": 0.8}
        | {"linear_top1": None}
    )


def test_the_table_has_means_deviations_and_paired_differences(benchmark):
    rows = [row("none", 0, 0.70), row("none", 1, 0.80), row("gradmix", 0, 0.72), row("gradmix", 1, 0.86)]
    rows.append(row("gradmix", 2, 0.5))  # has no partner: counts in the mean, not in the difference
    rows.append(row("gradmix", 0, 0.71) | {"tag": "+ema"})  # added to the setting: compared with none without it
    lines = {line.split("|")[3].strip(): line for line in benchmark.table(rows).splitlines()[2:]}
    assert "| 1 | +1.00 | 71.00 |" in lines["gradmix +ema"]
    # none: mean 75, deviation 7.07; gradmix: 69.33 and 18.15; differences 2 and 6: mean 4, deviation 2.83
    assert "| 2 |  | 75.00 ± 7.07 |" in lines["none"]
    assert "| 3 | +4.00 ± 2.83 | 69.33 ± 18.15 |" in lines["gradmix"]
    assert lines["none"].rstrip().endswith("| 90.00 ± 0.00 | 80.00 ± 0.00 |  |")
