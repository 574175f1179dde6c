"""Settings compared on held-back known classes, many short runs: what a default or a study's setting is chosen by.

    python benchmarks/choose.py demo --parallel 2                                   # the default job, on digits
    python benchmarks/choose.py study --archive cifar10-jpeg.tar.xz --parallel 2    # the study's, on 1,200 photographs
    python benchmarks/choose.py study --archive cifar10-jpeg.tar.xz --minutes 0 --save    # freeze what the rows choose
    python benchmarks/choose.py demo --minutes 0                                    # the table of the rows so far

The last two known classes of each split play the unknown ones, and are left out of training (``data.pseudo_unknown``);
no unknown class is looked at. The demo takes the setting with the highest mean AUROC of deep_knn on the features, over
the five splits. Rows go to ``--rows``; what is in it is not run again. No run folder is kept: this trains with the same
code as gradmix-pretrain and measures kNN accuracy and every detector's AUROC, nothing else.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS
from study import EPOCHS, SETTING, last_wins, subset, with_error

GRADMIX, NONE = "mix=gradmix", "mix=none"
QUARTER = "method.selfsup=0.25"
TARGETS = ["method.targets=1.0", "method.smoothing=0.1"]
DEMO = {
    "default": [],
    "none": [NONE],
    "quarter": [QUARTER],
    "none, quarter": [NONE, QUARTER],
    "quarter, temperature 0.05": [QUARTER, "method.temperature=0.05"],
    "quarter, temperature 0.2": [QUARTER, "method.temperature=0.2"],
    "quarter, temperature 0.5": [QUARTER, "method.temperature=0.5"],
    "quarter, rotate 20": [QUARTER, "data.augment.rotate=20"],
    "quarter, rotate 5": [QUARTER, "data.augment.rotate=5"],
    "quarter, crop 0.8": [QUARTER, "data.augment.crop=[0.8,1.0]"],
    "quarter, crop 0.4": [QUARTER, "data.augment.crop=[0.4,1.0]"],
    "quarter, lr 0.005": [QUARTER, "optimizer.base_lr=5e-3"],
    "quarter, lr 0.02": [QUARTER, "optimizer.base_lr=2e-2"],
    "quarter, 20 epochs": [QUARTER, "epochs=20"],
    "quarter, 80 epochs": [QUARTER, "epochs=80"],
    "quarter, width 32": [QUARTER, "encoder.width=32"],
    "quarter, batch 128": [QUARTER, "batch_size=128"],
    "quarter, weight 0.5": [QUARTER, "mix.weight=0.5"],
    "quarter, keep 0.7": [QUARTER, "+mix.options.keep=[0.7,0.95]"],
    "quarter, weight decay": [QUARTER, "optimizer.weight_decay=1e-3"],
    "eighth": ["method.selfsup=0.125"],
    "simclr": ["method=simclr"],
    "supcon": ["method=supcon"],
    "none, supcon": [NONE, "method=supcon"],
    "sphor": ["method=sphor"],
    "sphor, mixup": ["method=sphor", "mix=mixup"],
    "sphor, none": ["method=sphor", NONE],
    "sphor, rotate 20": ["method=sphor", "data.augment.rotate=20"],
    "sphor, crop 0.8": ["method=sphor", "data.augment.crop=[0.8,1.0]"],
    "sphor, temperature 0.2": ["method=sphor", "method.temperature=0.2"],
    "sphor, temperature 0.05": ["method=sphor", "method.temperature=0.05"],
    "sphor, border": ["method=sphor", "+mix.options.border=0.125"],
    "sphor, random box": ["method=sphor", "mix=random_box"],
    "sphor, ema": ["method=sphor", "distill=ema"],
    "sphor, ema, quarter": ["method=sphor", "distill=ema", "distill.weight=0.25", "distill.mixed=0.25"],
    "sphor, ema logits, quarter": [
        *("method=sphor", "distill=ema", "distill.form=logits", "distill.weight=0.25", "distill.mixed=0.25"),
    ],
    "sphor, outliers": ["method=sphor", "outliers=attribution"],
    "sphor, outliers, quarter": ["method=sphor", "outliers=attribution", "outliers.weight=0.25"],
    "quarter, targets": [QUARTER, *TARGETS],
    "quarter, targets mixed": [QUARTER, *TARGETS, "method.mixed_loss=targets", "method.attribution=targets"],
}


# One thing changed at a time, from the defaults. What is shared is tried without mixing and with GradMix.
SHARED = {"selfsup 0.25": "method.selfsup=0.25", "temperature 0.05": "method.temperature=0.05"}
SHARED |= {"temperature 0.2": "method.temperature=0.2"}
OWN = {
    "agreement": "+mix.options.evidence=agreement",
    "keep 0.7 to 0.95": "+mix.options.keep=[0.7,0.95]",
    "keep 0.3 to 0.7": "+mix.options.keep=[0.3,0.7]",
    "last two stages": "+mix.options.layers=2",
    "weight 0.5": "mix.weight=0.5",
    "supervised": "method.mixed_loss=supervised",
    "first half only": f"mix.end_epoch={EPOCHS // 2}",
    "second half only": f"mix.start_epoch={EPOCHS // 2}",
}
STUDY = {"none": [NONE], "gradmix": [GRADMIX]}
STUDY |= {f"{mix.removeprefix('mix=')}, {name}": [mix, key] for name, key in SHARED.items() for mix in (NONE, GRADMIX)}
STUDY |= {f"gradmix, {name}": [GRADMIX, key] for name, key in OWN.items()}
CHOICE = RESULTS / "study-choice.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["demo", "study"])
    parser.add_argument("--settings", nargs="+", help="some of them, by name")
    parser.add_argument("--archive", type=Path, help="for study: CIFAR-10 in a tar file")
    parser.add_argument("--images", type=Path, default=Path("runs/study/images"), help="where it is unpacked")
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, help="for study: shorter")
    parser.add_argument("--parallel", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing new after so long")
    parser.add_argument("--rows", type=Path, help="JSON lines; default runs/choose-WHAT.jsonl")
    parser.add_argument("--save", action="store_true", help="for study: write results/study-choice.json")
    options = parser.parse_args()
    if options.save and (options.what != "study" or options.epochs):
        parser.error("--save is for the study at its full length")
    settings = DEMO if options.what == "demo" else STUDY
    settings = {name: settings[name] for name in options.settings or settings}
    path = options.rows or Path(f"runs/choose-{options.what}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if options.what == "study":  # not a rehearsal's
        rows = [row for row in rows if f"epochs={options.epochs or EPOCHS}" in row["overrides"]]
    have = {(row["setting"], row["split"]) for row in rows}

    jobs = []
    for split, (name, overrides) in itertools.product(options.splits, settings.items()):
        common = [f"data.split={split}", f"seed={split}", "data.pseudo_unknown=2", "knn_every=0", "pictures_every=0"]
        if options.what == "study":
            root = subset(options.archive, options.images, split)
            common = [*SETTING, "method=joint", f"data.root={root}", f"epochs={EPOCHS}", *common, "test_every=0"]
        overrides = [*common, *overrides]
        if options.epochs:
            overrides = [text for text in overrides if not text.startswith(("epochs=", "mix.start", "mix.end"))]
            overrides.append(f"epochs={options.epochs}")
        if (name, split) not in have:
            jobs.append((name, split, last_wins(overrides)))
    deadline = time.monotonic() + 60 * options.minutes
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.parallel, spawn, begin) as pool, open(path, "a") as file:
        for done in as_completed([pool.submit(measure, (deadline, *job)) for job in jobs]):
            if (row := done.result()) is not None:
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
    print(table(rows))
    if options.save and not rows:
        parser.error("--save: there are no rows to choose by")
    if options.what == "study" and rows:
        chosen = choice(rows)
        print(f"chosen: {chosen}")
        if options.save:
            CHOICE.write_text(json.dumps(chosen, indent=1) + "\n")


def choice(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What docs/study.md says is chosen: at most one shared setting, for every arm, and one of GradMix's own.

    A setting is chosen when its AUROC lies above the default's by more than the standard error of that difference,
    paired by split, and by more than any other.
    """
    found = {(row["setting"], row["split"]): row["auroc"]["deep_knn@features"] for row in rows}
    splits = sorted({split for _, split in found})

    def gain(pairs: list[tuple[str, str]]) -> float:
        """Mean over splits of the mean over ``pairs`` of (setting, default), if it is above its standard error."""
        whole = [s for s in splits if all((name, s) in found for pair in pairs for name in pair)]
        gains = [statistics.mean(found[new, s] - found[old, s] for new, old in pairs) for s in whole]
        if len(gains) < 2 or statistics.mean(gains) <= statistics.stdev(gains) / len(gains) ** 0.5:
            return 0.0
        return statistics.mean(gains)

    shared = {key: gain([(f"{mix}, {name}", mix) for mix in ("none", "gradmix")]) for name, key in SHARED.items()}
    own = {key: gain([(f"gradmix, {name}", "gradmix")]) for name, key in OWN.items() if name != "agreement"}
    best = {part: max(gains, key=gains.get) for part, gains in (("all", shared), ("gradmix", own))}
    return {
        "all": [best["all"]] if shared[best["all"]] > 0 else [],
        "gradmix": [best["gradmix"]] if own[best["gradmix"]] > 0 else [],
    }


def begin() -> None:
    import logging
    import warnings

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def measure(job: tuple[float, str, int, list[str]]) -> dict[str, Any] | None:
    """Train one setting on one split; kNN accuracy and AUROC per detector, in [0, 1]. None when the time is over."""
    import contextlib
    import io
    import tempfile

    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from gradmix.eval.classifiers.knn import KNNClassifier
    from gradmix.eval.detectors import DETECTORS
    from gradmix.eval.features.extraction import Model, raw_pixels
    from gradmix.eval.metrics import auroc, closed_set_accuracy
    from gradmix.eval.protocols.evaluate import device_of
    from gradmix.ssl.config import register_configs
    from gradmix.ssl.data.open_set import load_data
    from gradmix.ssl.train import train

    deadline, name, split, overrides = job
    if time.monotonic() > deadline:
        return None
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        register_configs()
        with initialize_config_module("gradmix.configs", version_base="1.3"):
            config = OmegaConf.to_object(compose("pretrain", overrides=[*overrides, f"run_dir={folder}"]))
        data = load_data(config.data, config.seed)
        with contextlib.redirect_stderr(io.StringIO()):
            train(config, data)
        trained = time.monotonic() - start
        model = Model(Path(folder), device_of(config))
        spaces = {part: dict(model.features(images, Path(folder) / part)) for part, images in data.sets().items()}
        for part, images in data.sets().items():
            spaces[part]["pixels"] = raw_pixels(images)
        known, labels = data.test.labels >= 0, data.train.labels
        row: dict[str, Any] = {"what": config.data.name, "setting": name, "split": split, "overrides": overrides}
        row |= {"seconds": round(trained, 1), "auroc": {}}
        for key in DETECTORS:
            for space in ("features", "projections", "pixels"):
                if (key, space) not in (("deep_knn", "pixels"), ("mahalanobis", "pixels")) and space == "pixels":
                    continue
                with contextlib.suppress(ValueError, TypeError):
                    score = DETECTORS[key]().fit(spaces["train"][space], labels).score(spaces["test"][space])
                    row["auroc"][f"{key}@{space}"] = float(auroc(score[known], score[~known]))
        for space in ("features", "pixels"):
            knn = KNNClassifier(20, 0.07).fit(spaces["train"][space], labels)
            chosen = knn.predict(spaces["test"][space][known])
            row[f"knn_{space}"] = float(closed_set_accuracy(chosen, data.test.labels[known]))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard error over splits in per cent; "over pixels": how many splits lie above raw pixels."""
    detectors = ["deep_knn@features", "mahalanobis@features", "relative_mahalanobis@features", "nnguide@features"]
    detectors += ["class_knn@projections", "deep_knn@projections"]
    lines = [" | ".join(["| setting", "runs", "kNN", *detectors, "over pixels", "pixels", "seconds |"])]
    lines.append("|" + " --- |" * (len(detectors) + 6))
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        over = sum(row["auroc"]["deep_knn@features"] > row["auroc"]["deep_knn@pixels"] for row in own)
        cells = [name, str(len(own)), with_error([row["knn_features"] for row in own])]
        cells += [with_error([row["auroc"][key] for row in own if key in row["auroc"]]) for key in detectors]
        cells += [f"{over} of {len(own)}", with_error([row["auroc"]["deep_knn@pixels"] for row in own])]
        cells.append(f"{statistics.mean(row['seconds'] for row in own):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
