"""The paper's tables: a matrix of runs, stopped and continued at will, and what they give.

    python benchmarks/paper.py --experiment tinyimagenet_osr --root PATH --mix none cutmix gradmix --splits 0 \\
        --epochs 100 --minutes 9.5                      # again and again, until nothing is left to run
    python benchmarks/paper.py --minutes 0 --save       # tables of all runs so far; results/paper.json, docs/results.md

Each run is ``gradmix-pretrain experiment=...`` in a folder of its own under ``--runs``. When the time is over the
current one saves and exits; the next call goes on from there. Numbers are the last checkpoint's; settings are chosen
with ``--override data.pseudo_unknown=5`` and a ``--tag``, never on the unknown classes.

What is added to a setting has a tag with a ``+``, and is compared with ``mix=none`` without it: ``--mix gradmix
--override distill=ema --tag +ema`` beside ``--mix none``; likewise ``outliers=attribution``, or ``distill=run
distill.teacher=FOLDER``. ``--override method=palm --tag palm`` is a setting of its own.

Controls of equal compute: ``--mix none --epochs 200``, ``--mix extra_view``, ``--mix random_box``.
"""

import argparse
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from machine import RESULTS, plot, save
from safetensors.torch import load_file

from gradmix.eval.detectors import DeepKNN
from gradmix.eval.metrics import auroc
from gradmix.ssl.runs.files import write_json

PAGE = Path(__file__).parent.parent / "docs/results.md"
TIME_TO_STOP = 20  # seconds that a run gets to save and exit
# What makes a row: the same setting may be run for other splits and seeds.
SETTING = ("data", "pseudo_unknown", "method", "mix", "evidence", "epochs", "tag")
IDENTITY = (*SETTING, "split", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="tinyimagenet_osr", help="one of configs/experiment, or none")
    parser.add_argument("--root", help="data.root")
    parser.add_argument("--mix", nargs="+", default=["none", "cutmix", "gradmix"])
    parser.add_argument("--evidence", nargs="+", default=["loss"], help="loss, agreement: for mix=gradmix")
    parser.add_argument("--splits", nargs="+", default=["0", "1", "2", "3", "4"], help="or none: all classes known")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, help="instead of the experiment's")
    parser.add_argument("--override", nargs="*", default=[], help="more of gradmix-pretrain's arguments")
    parser.add_argument("--tag", default="", help="a name for what --override changes")
    parser.add_argument("--corruptions", help="also test robustness: make, or the folder of CIFAR-10-C")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing new and stop after so long")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"))
    parser.add_argument("--join", action="store_true", help="also score features of runs with different tags, joined")
    parser.add_argument("--results", type=Path, help="write the rows there, added to those that it has")
    parser.add_argument(
        "--save", action="store_true", help="the same to results/paper.json, and the table to docs/results.md"
    )
    options = parser.parse_args()
    if options.override and not options.tag:
        parser.error("--tag: name what --override changes, or two settings would share their folders")

    left = run_all(options) if options.minutes > 0 else 0
    rows = merge(options, [row_of(path.parent) for path in sorted(options.runs.glob("*/*/metrics.json"))])
    print(table(rows))
    if options.join:
        print(joined(options.runs))
    if options.save:
        save("paper", rows)
        if lines := auroc_by_epochs(rows):
            plot(RESULTS / "paper.png", lines, "epochs", "AUROC, %")
        write_page(PAGE, table(rows))
    elif options.results:
        write_json(options.results, rows)
    print(f"\nruns left: {left}" if left else "\nnothing left to run")


def run_all(options: argparse.Namespace) -> int:
    """Runs that are not finished when the time is over."""
    deadline = time.monotonic() + 60 * options.minutes
    left = 0
    for folder, overrides in matrix(options):
        needed = ["metrics.json", *(["metrics_corruptions.json"] if options.corruptions else [])]
        if all((folder / name).exists() for name in needed):
            continue
        if left or time.monotonic() > deadline - TIME_TO_STOP or not finish(folder, overrides, options, deadline):
            left += 1
    return left


def matrix(options: argparse.Namespace) -> Iterable[tuple[Path, list[str]]]:
    """Folder and arguments of every run: first each mix once, then the next seed, then the next split."""
    for split, seed, mix in itertools.product(options.splits, options.seeds, options.mix):
        for evidence in options.evidence if mix == "gradmix" else [""]:
            overrides = [f"mix={mix}", f"seed={seed}", *options.override]
            if options.experiment != "none":
                overrides.append(f"experiment={options.experiment}")
            overrides.append(f"data.split={'null' if split == 'none' else split}")
            if evidence:
                overrides.append(f"+mix.options.evidence={evidence}")
            if options.root:
                overrides.append(f"data.root={options.root}")
            if options.epochs:
                overrides.append(f"epochs={options.epochs}")
            parts = [mix, evidence, f"epochs{options.epochs or ''}", f"split{split}", f"seed{seed}", options.tag]
            yield options.runs / options.experiment / "-".join(part for part in parts if part), overrides


def finish(folder: Path, overrides: list[str], options: argparse.Namespace, deadline: float) -> bool:
    """Train and evaluate one run, or as much of it as there is time for. Whether it is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = {"metrics.json": ("gradmix-pretrain", [*overrides, f"run_dir={folder}"])}
    if options.corruptions:
        steps["metrics_corruptions.json"] = ("gradmix-eval", [f"run={folder}", f"corruptions={options.corruptions}"])
    for result, (command, arguments) in steps.items():
        if (folder / result).exists():
            continue
        start = time.monotonic()
        with open(folder / "log.txt", "a") as log:
            script = Path(sys.executable).with_name(command)  # Lightning starts further processes from its path
            process = subprocess.Popen([script, *arguments], stdout=log, stderr=log)
            try:
                process.wait(max(1, deadline - TIME_TO_STOP - start))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.send_signal(signal.SIGTERM)  # saves and exits
                process.wait(60)
        spent = json.loads(path.read_text()) if (path := folder / "minutes.json").exists() else 0
        write_json(path, round(spent + (time.monotonic() - start) / 60, 2))
        done = (folder / result).exists()
        print(
            f"{folder.name}: {command} {'finished' if done else 'goes on later'}, exit {process.returncode}", flush=True
        )
        if process.returncode not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
            sys.exit(f"{folder / 'log.txt'}: {(folder / 'log.txt').read_text().strip().splitlines()[-1]}")
        if not done:
            return False
    return True


def row_of(folder: Path) -> dict:
    """What a finished run gave, and what it was."""
    from gradmix.ssl.runs.folder import read_config

    config, metrics = read_config(folder), json.loads((folder / "metrics.json").read_text())
    detectors: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if key.startswith("osr/"):
            _, detector, name = key.split("/")
            detectors.setdefault(detector, {})[name] = value
    corruptions = folder / "metrics_corruptions.json"
    return {
        "data": config.data.name,
        "split": config.data.split,
        "pseudo_unknown": config.data.pseudo_unknown,
        "method": config.method.name,
        "mix": config.mix.name,
        "evidence": config.mix.options.get("evidence", ""),
        "tag": folder.name.partition(f"seed{config.seed}")[2].lstrip("-"),
        "epochs": config.epochs,
        "seed": config.seed,
        "commit": metrics["git/revision"],
        "minutes": json.loads(path.read_text()) if (path := folder / "minutes.json").exists() else None,
        "device": metrics["hardware"],
        "versions": {key: value for key, value in metrics.items() if key.startswith("version/")},
        "detectors": detectors,
        "closed_set_accuracy": detectors.get("deep_knn", {}).get("closed_set_accuracy"),
        "knn_top1": metrics.get("knn/top1"),
        "linear_top1": metrics.get("linear/top1"),
        "corruptions": json.loads(corruptions.read_text()) if corruptions.exists() else None,
    }


def merge(options: argparse.Namespace, rows: list[dict]) -> list[dict]:
    """These rows and those that were written before; a run that is in both counts once, as it is now."""
    path = RESULTS / "paper.json" if options.save else options.results
    old = json.loads(path.read_text()) if path and path.exists() else []
    return list({tuple(row[key] for key in IDENTITY): row for row in [*old, *rows]}.values())


# Columns of the tables: a share of a row, None where it was not measured.
COLUMNS: dict[str, Callable[[dict], float | None]] = {
    "AUROC": lambda row: row["detectors"].get("deep_knn", {}).get("auroc"),
    "OSCR": lambda row: row["detectors"].get("deep_knn", {}).get("oscr"),
    "pixels": lambda row: row["detectors"].get("pixels", {}).get("auroc"),
    "closed set": lambda row: row["closed_set_accuracy"],
    "kNN": lambda row: row["knn_top1"],
    "linear": lambda row: row["linear_top1"],
}


def table(rows: list[dict]) -> str:
    """Per setting, mean and deviation over splits and seeds in per cent, and the paired difference to ``mix=none``."""
    settings: dict[tuple, list[dict]] = {}
    for row in rows:
        settings.setdefault(tuple(row[key] for key in SETTING), []).append(row)
    lines = [["data", "epochs", "mix", "runs", "AUROC over none", *COLUMNS]]
    for setting, its_rows in sorted(settings.items(), key=lambda item: tuple(map(str, item[0]))):
        data, pseudo, method, mix, evidence, epochs, tag = setting
        baseline = {
            (row["split"], row["seed"]): row
            for row in settings.get((data, pseudo, method, "none", "", epochs, tag.partition("+")[0]), [])
        }
        pairs = [(row, baseline[place]) for row in its_rows if (place := (row["split"], row["seed"])) in baseline]
        what = f"{data}, {method}" + (f", {pseudo} held back" if pseudo else "")
        cells = [what, str(epochs), " ".join(part for part in (mix, evidence, tag) if part)]
        cells += [str(len(its_rows)), "" if mix == "none" else spread(differences(COLUMNS["AUROC"], pairs), "+.2f")]
        cells += [spread([value for row in its_rows if (value := of(row)) is not None]) for of in COLUMNS.values()]
        lines.append(cells)
    return markdown(lines)


def differences(measure: Callable[[dict], float | None], pairs: Iterable[tuple[dict, dict]]) -> list[float]:
    """First row minus second, of the pairs in which both were measured."""
    values = [(measure(first), measure(second)) for first, second in pairs]
    return [a - b for a, b in values if a is not None and b is not None]


def spread(values: list[float], form: str = ".2f", of_mean: bool = False) -> str:
    """In per cent: the mean; of two values or more also their deviation, or with ``of_mean`` the mean's own error."""
    if not values:
        return ""
    mean = format(100 * statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values) / (math.sqrt(len(values)) if of_mean else 1):.2f}"


def markdown(lines: list[list[str]]) -> str:
    """A page's table; the first line has the titles."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def joined(runs: Path) -> str:
    """AUROC of the features of all tags of one split and seed, each L2-normalised, side by side (arXiv 2404.10370)."""
    groups: dict[tuple, list[Path]] = {}
    for path in sorted(runs.glob("*/*/metrics.json")):
        row = row_of(path.parent)
        groups.setdefault(tuple(row[key] for key in IDENTITY if key != "tag"), []).append(path.parent / "features")
    lines = []
    for place, folders in groups.items():
        if len(folders) > 1:
            train, test = (
                torch.cat(
                    [torch.nn.functional.normalize(load_file(f / f"{part}.safetensors")["features"]) for f in folders],
                    1,
                )
                for part in ("train", "test")
            )
            labels, known = (load_file(folders[0] / f"{part}.safetensors")["labels"] for part in ("train", "test"))
            score = DeepKNN().fit(train, labels).score(test)
            lines.append(
                f"{place}, {len(folders)} joined: AUROC {100 * auroc(score[known >= 0], score[known < 0]):.2f}"
            )
    return "\n".join(lines)


def auroc_by_epochs(rows: list[dict]) -> dict[str, dict[float, float]]:
    """A line per setting that has several lengths: the mean over splits and seeds in per cent, by epochs."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if "deep_knn" in row["detectors"]:
            held_back = f"({row['pseudo_unknown']} held back)" if row["pseudo_unknown"] else ""
            parts = (row["data"], held_back, row["method"], row["mix"], row["evidence"], row["tag"])
            line = " ".join(part for part in parts if part)
            found.setdefault(line, {}).setdefault(row["epochs"], []).append(100 * row["detectors"]["deep_knn"]["auroc"])
    return {
        line: {epochs: statistics.mean(values) for epochs, values in points.items()}
        for line, points in found.items()
        if len(points) > 1
    }


def write_page(page: Path, text: str, what: str = "table") -> None:
    """Put a table into a page, in the place that says it is of the script that runs; ``what``: which of its tables."""
    start, end = f"<!-- {Path(sys.argv[0]).name} writes this {what} -->", f"<!-- end of the {what} -->"
    before, _, rest = page.read_text().partition(start)
    _, _, after = rest.partition(end)
    if not rest or not after:
        sys.exit(f"{page}: no place for the table; it must have {start} and {end}")
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    main()
