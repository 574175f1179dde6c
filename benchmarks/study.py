"""What GradMix is worth: few images, many epochs, as docs/study.md says.

    python benchmarks/study.py --archive cifar10-jpeg.tar.xz --stage joint --parallel 2
    python benchmarks/study.py --archive cifar10-jpeg.tar.xz --stage beyond --parallel 2    # past the paper
    python benchmarks/study.py --save               # rows of all runs so far: results/study.json, plots, docs/study.md

Every run is one ``gradmix-pretrain`` in a folder under ``--runs``, one thread each. What was stopped goes on from its
checkpoint when the same line is given again; what is finished is left alone. Settings are chosen by choose.py before.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from machine import RESULTS, save
from paper import COLUMNS, differences, finish, markdown, row_of, spread, write_page
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAGE = Path(__file__).parent.parent / "docs" / "study.md"
IMAGES = 200  # training images of each class
FEW = 50  # in the stage of that name
EPOCHS = 300
PAIRS = 5  # fewer are too few for a result
SETTING = (
    *("data=cifar10", "encoder=resnet18", "encoder.width=16", "batch_size=256", "method.temperature=0.1"),
    *("optimizer=adam", "knn_every=0", "pictures_every=0", "test_every=25", "trainer.precision=32-true"),
)
TWICE = "none, twice as long"
ARMS = {
    "none": ["mix=none"],
    TWICE: ["mix=none"],
    "cutmix": ["mix=cutmix"],
    "random_box": ["mix=random_box"],
    "extra_view": ["mix=extra_view"],
    "gradmix (loss)": ["mix=gradmix", "+mix.options.evidence=loss"],
    "gradmix (agreement)": ["mix=gradmix", "+mix.options.evidence=agreement"],
}
# What may give back what mixing takes away (docs/recipes/past-the-paper.md). ARM:name is the folder of that arm's run
# on the same split, which is trained before.
LOSS = ("mix=gradmix", "+mix.options.evidence=loss")
BEYOND = {
    "gradmix, ema teacher": [*LOSS, "distill=ema"],
    "gradmix, taught by none": [*LOSS, "distill=run", "distill.teacher=ARM:none"],
    "gradmix, outliers": [*LOSS, "outliers=attribution"],
    "gradmix, border": [*LOSS, "+mix.options.border=0.125"],
    "gradmix, background": [*LOSS, "+mix.options.paste=background"],
    "sphor, none": ["method=sphor", "mix=none"],
    "sphor, mixup": ["method=sphor", "mix=mixup"],
    "sphor, mixup, ema teacher": ["method=sphor", "mix=mixup", "distill=ema", "distill.form=logits"],
    "sphor, mixup, taught by none": [
        *("method=sphor", "mix=mixup", "distill=run", "distill.form=logits", "distill.teacher=ARM:sphor, none"),
    ],
    "sphor, outliers": ["method=sphor", *LOSS, "outliers=attribution"],
    "palm": ["method=palm", "mix=none"],
    "palm, gradmix": ["method=palm", *LOSS],
    "cider": ["method=cider", "mix=none"],
}
ALL = ARMS | BEYOND
STAGES = {
    "joint": (ARMS, ["method=joint"]),
    "chosen": (
        {name: ARMS[name] for name in ("none", "gradmix (loss)", "random_box", "cutmix", TWICE)},
        ["method=joint"],
    ),
    "few": ({name: ARMS[name] for name in ("none", "gradmix (loss)", "cutmix")}, ["method=joint", "test_every=100"]),
    "supcon": (ARMS, ["method=supcon"]),
    "simclr": (ARMS, ["method=simclr", "data.split=null"]),
    "sphor": ({name: ARMS[name] for name in ("none", "gradmix (loss)", "cutmix", TWICE)}, ["method=sphor"]),
    "beyond": (
        {name: ARMS[name] for name in ("none", TWICE, "gradmix (loss)")} | BEYOND,
        ["method=joint"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="CIFAR-10 as train/<class>/ and test/<class>/ in a tar file")
    parser.add_argument("--stage", choices=STAGES, default="joint")
    parser.add_argument("--arms", nargs="+", help="some of the stage's, by name")
    parser.add_argument(
        "--splits",
        nargs="+",
        type=int,
        default=[0, 1, 2, 3, 4],
        help="each with a seed of its own; from 5 on the same five splits of classes again",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="shorter, to rehearse")
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; runs save and go on next time")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--override", nargs="*", default=[], help="more of gradmix-pretrain's arguments, to rehearse")
    parser.add_argument("--results", type=Path, help="write the rows of --runs there, and nothing else")
    parser.add_argument("--save", action="store_true", help="write results/study.json, plots and docs/study.md")
    options = parser.parse_args()
    if options.save and options.override:
        parser.error("--save is for the study's own settings; rehearse with --override in another folder (--runs)")
    if options.archive:
        run_all(options)
    rows = [row for path in sorted(options.runs.glob("*/*/metrics.json")) if (row := study_row(path.parent))]
    if options.results:
        options.results.write_text(json.dumps(rows, indent=1))
    if options.save:
        path = RESULTS / "study.json"
        known = {identity(row): row for row in (json.loads(path.read_text()) if path.exists() else [])}
        rows = list((known | {identity(row): row for row in rows}).values())
        save("study", rows)
        write_page(PAGE, table(rows))
        write_page(PAGE, comparison(rows), "comparison")
        plots(rows)
    print(table(rows))


def run_all(options: argparse.Namespace) -> None:
    """Split by split, so that there is something to compare whenever the time is over."""
    os.environ["OMP_NUM_THREADS"] = "1"
    arms, of_stage = STAGES[options.stage]
    arms = {name: arms[name] for name in options.arms} if options.arms else arms
    deadline = time.monotonic() + 60 * options.minutes
    chosen = {"all": [], "gradmix": []}  # the defaults
    if options.stage in ("chosen", "few"):
        chosen = json.loads((RESULTS / "study-choice.json").read_text())  # by choose.py, before
    jobs = []
    for split, (arm, of_arm) in itertools.product(options.splits, arms.items()):
        of_arm = [with_teacher(text, options.runs / options.stage, split) for text in of_arm]
        root = subset(options.archive, options.runs / "images", split, FEW if options.stage == "few" else IMAGES)
        epochs = options.epochs * (2 if arm == TWICE else 1)
        overrides = [*SETTING, f"data.root={root}", f"data.split={split % 5}", f"seed={split}", f"epochs={epochs}"]
        overrides += [
            *of_stage,
            *of_all(chosen["all"], of_arm),
            *of_arm,
            *own(chosen["gradmix"], of_arm),
            *options.override,
        ]
        jobs.append((folder_of(options.runs / options.stage, arm, split), last_wins(overrides)))
    queue = argparse.Namespace(corruptions=None)  # of paper.py's options, what finish() looks at

    def work(job: tuple[Path, list[str]]) -> None:
        if not (job[0] / "metrics.json").exists() and time.monotonic() < deadline:
            finish(*job, queue, deadline)

    taught = [job for job in jobs if any(text.startswith("distill.teacher=") for text in job[1])]
    with ThreadPoolExecutor(options.parallel) as pool:
        for part in ([job for job in jobs if job not in taught], taught):  # teachers first
            list(pool.map(work, part))


def folder_of(stage: Path, arm: str, split: int) -> Path:
    return stage / f"{arm} {split}".replace(" ", "_")


def with_teacher(override: str, stage: Path, split: int) -> str:
    """``distill.teacher=ARM:name`` with the folder of that arm's run."""
    key, _, arm = override.partition("=ARM:")
    return f"{key}={folder_of(stage.absolute(), arm, split)}" if arm else override


def of_all(chosen: list[str], of_arm: list[str]) -> list[str]:
    """What was chosen for every arm; weights of losses are those of the stage's method, not of an arm's own."""
    own_method = any(text.startswith("method=") for text in of_arm)
    return [key for key in chosen if not (own_method and key.startswith("method."))]


def own(chosen: list[str], of_arm: list[str]) -> list[str]:
    """What was chosen for GradMix: its own options for it and for its control, weight and epochs for all that mix."""
    options = "mix=gradmix" in of_arm or "mix=random_box" in of_arm
    mixes = "mix=none" not in of_arm
    return [key for key in chosen if (options if key.startswith("+mix.options.") else mixes)]


def last_wins(overrides: list[str]) -> list[str]:
    """Hydra refuses a key that is given twice."""
    return [f"{key}={value}" for key, value in dict(text.split("=", 1) for text in overrides).items()]


def subset(archive: Path, folder: Path, seed: int, images: int = IMAGES) -> Path:
    """So many training images of each class, drawn by the seed, and all test images, as links into one copy."""
    import numpy as np

    whole, target = folder / "whole", folder / f"{images}-seed{seed}"
    if not whole.exists():
        partial = folder / "partial"
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        root = next(path.parent for path in sorted(partial.rglob("train")) if path.is_dir())
        root.rename(whole)
    if not target.exists():
        making = folder / f"{images}-seed{seed}-making"
        for of_class in sorted((whole / "train").iterdir()):
            (making / "train" / of_class.name).mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in of_class.iterdir())
            for index in sorted(np.random.default_rng(seed).permutation(len(names))[:images]):
                os.link(of_class / names[index], making / "train" / of_class.name / names[index])
        (making / "test").symlink_to(Path("..") / whole.name / "test")
        making.rename(target)
    return target.absolute()


def study_row(folder: Path) -> dict:
    """A finished run: paper.py's row, and the curves by epoch."""
    row = row_of(folder)
    name, _, split = folder.name.rpartition("_")
    arm = next(arm for arm in ALL if arm.replace(" ", "_") == name)
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    steps = json.loads((folder / "training.json").read_text())["train/steps"]
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("test/")]
    curves = {
        tag.removeprefix("test/"): {
            str(round(event.step * row["epochs"] / steps)): event.value for event in events.Scalars(tag)
        }
        for tag in tags
    }
    return row | {"stage": folder.parent.name, "arm": arm, "split": int(split), "tag": "", "curves": curves}


with_error = partial(spread, of_mean=True)


def identity(row: dict) -> tuple:
    return row["stage"], row["arm"], row["split"], row["epochs"]


MEASURES = {name: COLUMNS[name] for name in ("AUROC", "OSCR", "kNN", "linear")}


def table(rows: list[dict]) -> str:
    """Mean and standard error over the splits, and the paired difference to ``none``, in points."""
    lines = [["stage", "arm", "epochs", "runs", *(title for name in MEASURES for title in (name, "over none"))]]
    groups = by_arm(rows)
    for (stage, arm, epochs), by_split in groups.items():
        half = epochs // 2 if arm == TWICE else epochs
        base = groups.get((stage, "none", half), {})
        cells = [stage, arm, str(epochs), str(len(by_split))]
        for measure in MEASURES.values():
            values = [v for row in by_split.values() if (v := measure(row)) is not None]
            apart = differences(measure, ((row, base[split]) for split, row in by_split.items() if split in base))
            few = f" (of {len(values)})" if 0 < len(values) < len(by_split) else ""  # where a run lacks a number
            cells += [with_error(values) + few, "" if arm == "none" else with_error(apart, "+.2f")]
        lines.append(cells)
    return markdown(lines)


def by_arm(rows: list[dict]) -> dict[tuple[str, str, int], dict[int, dict]]:
    """The rows by (stage, arm, epochs), in the order of the pages, and in each by split."""
    groups: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        groups.setdefault((row["stage"], row["arm"], row["epochs"]), {})[row["split"]] = row
    order = list(ALL)
    return dict(sorted(groups.items(), key=lambda group: (group[0][0], order.index(group[0][1]))))


def comparison(rows: list[dict]) -> str:
    """GradMix minus each other arm, in points, paired by split; bold: a result by the protocol's rule."""
    measures = {name: COLUMNS[name] for name in ("AUROC", "OSCR", "closed set", "kNN", "linear")}
    lines = [["stage", f"{MAIN} minus", "pairs", *measures]]
    groups = by_arm(rows)
    for (stage, arm, epochs), theirs in groups.items():
        ours = groups.get((stage, MAIN, epochs // 2 if arm == TWICE else epochs), {})
        pairs = [(ours[split], theirs[split]) for split in sorted(ours.keys() & theirs.keys())]
        if arm != MAIN and len(pairs) >= PAIRS:
            cells = [result_in_bold(differences(measure, pairs)) for measure in measures.values()]
            lines.append([stage, arm, str(len(pairs)), *cells])
    return markdown(lines)


def result_in_bold(values: list[float]) -> str:
    """Mean and standard error in points. A result: over two errors, and four of five in the mean's direction."""
    if len(values) < PAIRS:
        return ""
    text, mean = with_error(values, "+.2f"), statistics.mean(values)
    beyond = abs(mean) > 2 * statistics.stdev(values) / math.sqrt(len(values))
    return f"**{text}**" if beyond and sum(value * mean > 0 for value in values) >= 0.8 * len(values) else text


TITLES = {"osr/deep_knn/auroc": "AUROC of unknown classes, %", "knn/top1": "kNN accuracy on known classes, %"}
MAIN = "gradmix (loss)"  # against none


def plots(rows: list[dict]) -> None:
    """Per stage, AUROC and kNN against epochs: the mean of every arm over the splits all arms have, and below it the
    main comparison, split by split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for stage in sorted({row["stage"] for row in rows}):
        of_stage = [row for row in rows if row["stage"] == stage]
        tags = [tag for tag in TITLES if any(tag in row["curves"] for row in of_stage)]
        figure, panels = pyplot.subplots(2, len(tags), figsize=(6 * len(tags), 7.5), squeeze=False)
        for tag, (above, below) in zip(tags, panels.T, strict=True):
            curves: dict[str, dict[int, dict[int, float]]] = {}  # arm: split: epoch: %
            for row in of_stage:
                curve = {int(epoch): 100 * value for epoch, value in row["curves"].get(tag, {}).items()}
                curves.setdefault(row["arm"], {})[row["split"]] = curve
            shared = sorted(set.intersection(*map(set, curves.values())))
            for arm in (arm for arm in ALL if arm in curves):
                epochs = sorted(set.intersection(*(set(curves[arm][split]) for split in shared)))
                means = [statistics.mean(curves[arm][split][epoch] for split in shared) for epoch in epochs]
                above.plot(epochs, means, label=arm)
            above.set_title(f"every arm, mean of splits {', '.join(map(str, shared))}", fontsize=10)
            above.set_ylabel(TITLES[tag])
            apart = differences_by_epoch(curves, MAIN)
            for split, curve in apart.items():
                below.plot(list(curve), list(curve.values()), linewidth=1, alpha=0.6, label=f"split {split}")
            epochs = sorted(set.intersection(*map(set, apart.values()))) if apart else []
            means = [statistics.mean(curve[epoch] for curve in apart.values()) for epoch in epochs]
            below.plot(epochs, means, color="black", linewidth=2, label="mean")
            below.axhline(0, color="grey", linewidth=0.8)
            below.set_title(f"{MAIN} minus none, by split", fontsize=10)
            below.set_xlabel("epochs")
            below.set_ylabel("points")
            for axes in (above, below):
                axes.grid(alpha=0.3)
        for axes, columns in zip(panels[:, 0], (1, 3), strict=True):
            axes.legend(fontsize=8, ncol=columns, framealpha=0.5)
        figure.tight_layout()
        figure.savefig(PAGE.parent / f"study-{stage}.png", dpi=110)


def differences_by_epoch(curves: dict[str, dict[int, dict[int, float]]], arm: str) -> dict[int, dict[int, float]]:
    """Of an arm to ``none`` at every epoch, by split."""
    base, ours = curves.get("none", {}), curves.get(arm, {})
    return {
        split: {
            epoch: ours[split][epoch] - base[split][epoch] for epoch in sorted(ours[split].keys() & base[split].keys())
        }
        for split in sorted(ours.keys() & base.keys())
    }


if __name__ == "__main__":
    main()
