"""The three commands: gradmix-pretrain, gradmix-eval, gradmix-score."""

from dataclasses import replace
from pathlib import Path

from gradmix.eval.command_line import run_command
from gradmix.eval.config import EvalConfig, ScoreConfig
from gradmix.ssl.checks import check_values
from gradmix.ssl.config import Config


def pretrain() -> None:
    """gradmix-pretrain: train, then evaluate."""
    run_command("pretrain", "train a backbone, then evaluate it.", Config, run_pretrain)


def evaluate() -> None:
    """gradmix-eval: evaluate a run again."""
    run_command("eval", "evaluate a trained run again.", EvalConfig, run_eval)


def score() -> None:
    """gradmix-score: score image files with a saved detector."""
    run_command("score", "score image files with a saved detector.", ScoreConfig, run_score)


def run_pretrain(config: Config) -> None:
    check_values(config)
    # Imported here, so that --help and errors in the config answer at once.
    from gradmix.eval.evaluate import check_detectors
    from gradmix.eval.groups import find_runs
    from gradmix.eval.report.comparison import write_comparison
    from gradmix.eval.summary import over_splits, table
    from gradmix.ssl.data import splits_of
    from gradmix.ssl.files import write_json

    check_detectors(config)
    config.run_dir = str(Path(config.run_dir).expanduser())
    if config.data.split != "all":
        result = pretrain_one(config)
        if result is None:
            return
        print(table(result))
        print(f"\n{config.run_dir}: report.html, metrics.json, weights, detector and TensorBoard events")
        return
    results = []
    for split in range(len(splits_of(config.data))):
        one = replace(config, data=replace(config.data, split=split), run_dir=f"{config.run_dir}/split-{split}")
        results.append(pretrain_one(one))
    if None in results:
        return
    summary, folder = over_splits(results), Path(config.run_dir)
    write_json(folder / "metrics.json", summary)
    write_comparison(find_runs([folder]), folder / "report.html")
    print(table(summary))
    print(f"\nmean ± standard deviation over {len(results)} splits; {folder}: report.html, and the runs in split-*")


def pretrain_one(config: Config) -> dict | None:
    """The run's numbers; None on all but the first process, which go on to the next run while it evaluates."""
    from pytorch_lightning.utilities import rank_zero_only

    from gradmix.eval.evaluate import check_neighbours, device_of, evaluate
    from gradmix.eval.features import extract_together
    from gradmix.eval.online import watchers
    from gradmix.eval.report import write_report
    from gradmix.eval.summary import describe
    from gradmix.eval.tensorboard import write_tensorboard
    from gradmix.ssl.data import load_data
    from gradmix.ssl.files import read_json, remove_strays, replacing
    from gradmix.ssl.losses import world_size
    from gradmix.ssl.run import alone_in, claim
    from gradmix.ssl.train import check, train

    run_dir, first = Path(config.run_dir), rank_zero_only.rank == 0
    check(config)
    with alone_in(run_dir):
        if (run_dir / "config.yaml").exists():
            claim(run_dir, config)  # before anything is written there
        if first:
            remove_strays(run_dir)
        if (run_dir / "report.html").exists():  # the last thing to be written
            if not first:
                return None
            print(f"{run_dir}: finished already; gradmix-eval run={run_dir} evaluates again")
            return read_json(run_dir / "metrics.json")
        data = load_data(config.data, config.seed, run_dir / "scan.json")
        if first:
            print(describe(config, data))
        check_neighbours(config, data)
        if not (run_dir / "training.json").exists():
            train(config, data, watchers(data, config))
            if world_size() > 1:
                extract_together(run_dir, data.sets(), device_of(config), config.data.workers)
        if not first:
            return None
        with replacing(run_dir, "metrics.json") as new:
            result = evaluate(run_dir, config, data, device_of(config), new)
        write_tensorboard(run_dir, config, result, data)
        write_report(run_dir, data)
        return result


def run_eval(config: EvalConfig) -> None:
    check_values(config)
    from gradmix.eval.compare import compare, comparison_table
    from gradmix.eval.export import export_backbone
    from gradmix.eval.foreign import adopt
    from gradmix.eval.groups import find_runs
    from gradmix.eval.report.comparison import write_comparison
    from gradmix.eval.robustness import corruption_table
    from gradmix.eval.summary import over_splits, table
    from gradmix.ssl.files import write_json

    if (config.run is None) == (config.checkpoint is None):
        raise ValueError("run: missing; give run=DIR, or checkpoint=FILE with encoder=, data= and out=")
    run_dir = adopt(config) if config.run is None else Path(config.run).expanduser()
    out = run_dir / f"transfer-{config.data.name}" if config.run and config.data.name else run_dir
    out = out if config.out is None else Path(config.out).expanduser()
    parts = [path.name for path in sorted(run_dir.glob("split-*"))] if not (run_dir / "config.yaml").exists() else []
    if config.against is not None:
        other = Path(config.against).expanduser()
        for part in parts or [""]:
            print(comparison_table(run_dir / part, other / part, compare(run_dir / part, other / part)))
        return
    if config.export:
        for part in parts or [""]:
            for path in export_backbone(run_dir / part, config.export, out / part / "export"):
                print(f"{path}: written")
        return
    name = "metrics.json" if config.corruptions is None else "metrics_corruptions.json"
    as_text = table if config.corruptions is None else corruption_table
    results = [eval_one(config, run_dir / part, out / part) for part in parts or [""]]
    if parts:
        write_json(out / name, over_splits(results))
    if parts and out == run_dir:
        write_comparison(find_runs([run_dir]), run_dir / "report.html")
    print(as_text(over_splits(results) if parts else results[0]))
    print(
        f"\n{out / name}: every number"
        + (f"; mean ± standard deviation over {len(parts)} splits" if len(parts) > 1 else "")
    )


def eval_one(config: EvalConfig, run_dir: Path, out: Path) -> dict:
    from gradmix.eval.evaluate import check_detectors, device_of, evaluate
    from gradmix.eval.foreign import check_transfer_classes, transfer
    from gradmix.eval.report import write_report
    from gradmix.eval.robustness import evaluate_corruptions
    from gradmix.eval.tensorboard import write_tensorboard
    from gradmix.ssl.data import load_data
    from gradmix.ssl.files import remove_strays, replacing
    from gradmix.ssl.run import alone_in, check_classes, read_config

    run = read_config(run_dir)
    run.detectors = run.detectors if config.detectors is None else config.detectors
    run.detector_options |= config.detector_options
    transfer(run, config)
    for key in ("root", "unknown_root"):
        if getattr(config, key) is not None:
            setattr(run.data, key, getattr(config, key))
    check_detectors(run)
    if not (run_dir / "training.json").exists():
        raise ValueError(f"run: {run_dir} has not finished training; gradmix-pretrain run_dir={run_dir} goes on")
    with alone_in(out, "run" if config.out is None else "out"):
        remove_strays(out)
        data = load_data(run.data, run.seed, out / "scan.json")
        if config.data.name:
            check_transfer_classes(run, data)
        else:
            check_classes(run_dir, data.classes)
        if config.corruptions is not None:
            return evaluate_corruptions(run_dir, run, data, config.corruptions, device_of(run), out)
        with replacing(out, "metrics.json") as new:
            result = evaluate(run_dir, run, data, device_of(run), new, config)
        if out == run_dir:  # elsewhere lies no config.yaml to report on
            write_tensorboard(run_dir, run, result, data)
            write_report(run_dir, data)
        return result


def run_score(config: ScoreConfig) -> None:
    check_values(config)
    from gradmix.eval.score_file import write_scores
    from gradmix.eval.scoring import Scorer, find_images
    from gradmix.eval.sheets import write_sheets

    paths = find_images(config.images)
    scorer = Scorer(config.detector)
    out = Path(config.out).expanduser()
    rows, unknown, unreadable = write_scores(scorer, paths, out, config.batch_size, progress=True)
    print(f"{out}: {rows} images, {unknown} unknown, {unreadable} unreadable")
    if scorer.detector.threshold is None:
        print("no threshold was calibrated (data.holdout=0), so nothing is called unknown")
    if config.explain is not None:
        shown, sheets = write_sheets(scorer, paths, Path(config.explain).expanduser(), config.explain_limit)
        print(f"{config.explain}: {sheets} sheets with {shown} images and their nearest training images")
    if unreadable:
        raise ValueError(f"images: {unreadable} of {rows} files can't be read; the error column of {out} says why")
