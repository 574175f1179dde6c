"""The three commands: gradmix-pretrain, gradmix-eval, gradmix-score."""

import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradmix.eval.config import EvalConfig, ScoreConfig
from gradmix.eval.help import help_text
from gradmix.registry import nearest
from gradmix.ssl.config import Config, register_configs

PATHS = (
    *("run", "run_dir", "against", "corruptions", "root", "unknown_root", "data.root", "data.unknown_root"),
    *("encoder.init", "checkpoint", "detector", "images", "out", "explain"),
)
# What systems send, and what schedulers send before they preempt (Windows has no SIGUSR1).
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def pretrain() -> None:
    """gradmix-pretrain: train, then evaluate."""
    _command("pretrain", "train a backbone, then evaluate it.", Config, run_pretrain)


def evaluate() -> None:
    """gradmix-eval: evaluate a run again."""
    _command("eval", "evaluate a trained run again.", EvalConfig, run_eval)


def score() -> None:
    """gradmix-score: score image files with a saved detector."""
    _command("score", "score image files with a saved detector.", ScoreConfig, run_score)


def run_pretrain(config: Config) -> None:
    # Imported here, so that --help and errors in the config answer at once.
    from gradmix.eval.evaluate import check_detectors, table
    from gradmix.eval.groups import find_runs
    from gradmix.eval.report.comparison import write_comparison
    from gradmix.ssl.data import splits_of
    from gradmix.ssl.files import write_json

    check_detectors(config)
    if config.data.split != "all":
        print(table(pretrain_one(config)))
        print(f"\n{config.run_dir}: report.html, metrics.json, weights, detector and TensorBoard events")
        return
    results = []
    for split in range(len(splits_of(config.data))):
        one = replace(config, data=replace(config.data, split=split), run_dir=f"{config.run_dir}/split-{split}")
        results.append(pretrain_one(one))
    summary, folder = over_splits(results), Path(config.run_dir)
    write_json(folder / "metrics.json", summary)
    write_comparison(find_runs([folder]), folder / "report.html")
    print(table(summary))
    print(f"\nmean ± standard deviation over {len(results)} splits; {folder}: report.html, and the runs in split-*")


def pretrain_one(config: Config) -> dict:
    from pytorch_lightning.utilities import rank_zero_only

    from gradmix.eval.evaluate import device_of, evaluate
    from gradmix.eval.online import watchers
    from gradmix.eval.report import write_report
    from gradmix.eval.tensorboard import write_tensorboard
    from gradmix.ssl.data import load_data
    from gradmix.ssl.files import read_json, remove_strays, replacing
    from gradmix.ssl.run import claim
    from gradmix.ssl.train import train

    run_dir = Path(config.run_dir)
    if (run_dir / "config.yaml").exists():
        claim(run_dir, config)  # before anything is written there
    if rank_zero_only.rank == 0:
        remove_strays(run_dir)
    if (run_dir / "report.html").exists():  # the last thing to be written
        print(f"{run_dir}: finished already; gradmix-eval run={run_dir} evaluates again")
        return read_json(run_dir / "metrics.json")
    data = load_data(config.data, config.seed, run_dir / "scan.json")
    print(describe(config, data))
    if config.knn_k > len(data.train):
        raise ValueError(f"knn_k: {config.knn_k} is larger than the training set, {len(data.train)} images")
    if not (run_dir / "training.json").exists():
        train(config, data, watchers(data, config))
    if rank_zero_only.rank != 0:  # the other processes of a distributed run have nothing left to do
        sys.exit(0)
    with replacing(run_dir, "metrics.json") as new:
        result = evaluate(run_dir, config, data, device_of(config), new)
    write_tensorboard(run_dir, config, result, data)
    write_report(run_dir, data)
    return result


def describe(config: Config, data) -> str:
    """One paragraph on what is about to happen."""
    known = len(data.classes)
    unknown = int((data.test.labels < 0).sum()) if known else 0
    others = f"{len(data.unknown)} unknown"
    if config.data.unknown_root is not None:
        others = f"unknown: {config.data.unknown_root}"
    lines = [
        f"{config.data.name}: {len(data.train)} training, {len(data.held_out)} held-out, {len(data.test)} test images"
        + (f" ({unknown} of unknown classes)" if unknown else ""),
    ]
    if known:
        shown = ", ".join(data.classes[:10]) + (", ..." if known > 10 else "")
        lines.append(f"{known} known classes: {shown}; {others}")
    if data.bad:
        lines.append(f"{len(data.bad)} image files can't be read and are left out: bad_images.json")
    lines.append(
        f"{config.method.name} with mix={config.mix.name}, {config.encoder.name} width {config.encoder.width}, "
        f"{config.epochs} epochs, batch {config.batch_size}"
    )
    return "\n".join(lines)


def over_splits(results: list[dict]) -> dict:
    """Mean and sample standard deviation of every number that all splits have."""
    import numpy as np

    first = results[0]
    numbers = [
        key
        for key, value in first.items()
        # the ends of an interval over one split's images; their mean would be the interval of nothing
        if isinstance(value, float | int) and all(key in r for r in results) and not key.endswith(("_low", "_high"))
    ]
    summary: dict = {"splits": len(results)}
    for key in numbers:
        values = [r[key] for r in results]
        summary |= {key: float(np.mean(values)), f"{key}/std": float(np.std(values, ddof=1))}
    others = {key: value for key, value in first.items() if isinstance(value, str)}
    return summary | others


def run_eval(config: EvalConfig) -> None:
    from gradmix.eval.compare import compare, comparison_table
    from gradmix.eval.evaluate import table
    from gradmix.eval.export import export_backbone
    from gradmix.eval.foreign import adopt
    from gradmix.eval.groups import find_runs
    from gradmix.eval.report.comparison import write_comparison
    from gradmix.eval.robustness import corruption_table
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
    print(f"\n{out / name}: every number" + (f"; mean ± standard deviation over {len(parts)} splits" if parts else ""))


def eval_one(config: EvalConfig, run_dir: Path, out: Path) -> dict:
    from gradmix.eval.evaluate import check_detectors, device_of, evaluate
    from gradmix.eval.foreign import check_transfer_classes, transfer
    from gradmix.eval.report import write_report
    from gradmix.eval.robustness import evaluate_corruptions
    from gradmix.eval.tensorboard import write_tensorboard
    from gradmix.ssl.data import load_data
    from gradmix.ssl.files import remove_strays, replacing
    from gradmix.ssl.run import check_classes, read_config

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
    from gradmix.eval.scoring import Scorer, find_images, write_scores
    from gradmix.eval.sheets import write_sheets

    if config.batch_size < 1 or config.explain_limit < 1:
        key = "batch_size" if config.batch_size < 1 else "explain_limit"
        raise ValueError(f"{key}: expected at least 1, got {getattr(config, key)}")
    paths = find_images(config.images)
    scorer = Scorer(config.detector)
    out = Path(config.out).expanduser()
    rows, unknown, unreadable = write_scores(scorer.score(paths, config.batch_size, progress=True), out)
    print(f"{out}: {rows} images, {unknown} unknown, {unreadable} unreadable")
    if scorer.detector.threshold is None:
        print("no threshold was calibrated (data.holdout=0), so nothing is called unknown")
    if config.explain is not None:
        shown, sheets = write_sheets(scorer, paths, Path(config.explain).expanduser(), config.explain_limit)
        print(f"{config.explain}: {sheets} sheets with {shown} images and their nearest training images")
    if unreadable:
        raise ValueError(f"images: {unreadable} of {rows} files can't be read; the error column of {out} says why")


def _command(name: str, summary: str, schema: type, run: Callable) -> None:
    """Run a command under Hydra. Bad input: one line on stderr, exit code 2; --debug shows the traceback."""
    debug = "--debug" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(name, summary, schema))
        return
    refuse_code(name, sys.argv[1:])
    typed = sys.argv
    sys.argv = [typed[0], *(_quoted(argument) for argument in typed[1:] if argument != "--debug")]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and the lines below say it shorter
    register_configs()
    ConfigStore.instance().store(f"{name}_schema", schema)

    composed = []

    # The work itself is done outside Hydra, which would add a line of its own to every error.
    @hydra.main(config_path="pkg://gradmix.configs", config_name=name, version_base="1.3")
    def compose(config) -> None:
        composed.append(config)

    # While training, Guard listens instead.
    before = {number: signal.signal(number, lambda number, frame: sys.exit(128 + number)) for number in SIGNALS}
    try:
        compose()
        sys.argv = typed  # the report shows it
        for config in composed:  # several with --multirun, none with --help
            # Once more into the schema, as plain values: Hydra's + adds any key.
            plain = OmegaConf.to_container(config, resolve=True)
            config = OmegaConf.merge(OmegaConf.structured(schema), plain)
            if missing := sorted(OmegaConf.missing_keys(config)):
                raise ValueError(f"{missing[0]}: missing; give it as {missing[0]}=VALUE")
            run(OmegaConf.to_object(config))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug or not isinstance(
            error, ValueError | OSError | FloatingPointError | HydraException | OmegaConfBaseException
        ):
            raise
        print(f"gradmix-{name}: {explain(error, schema)}", file=sys.stderr)
        sys.exit(2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_code(name: str, arguments: list[str]) -> None:
    """Hydra's own settings can name any function to be called, and --experimental-rerun reads a pickle."""
    for argument in arguments:
        if re.match(r"[+~]*hydra([./@:=]|$)|--experimental-rerun", argument):
            print(f"gradmix-{name}: {argument.split('=')[0]}: Hydra's own settings are fixed", file=sys.stderr)
            sys.exit(2)


def explain(error: Exception, schema: type) -> str:
    """An exception in one line, with the nearest key where a key is unknown."""
    if isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__  # Hydra says that it failed, OmegaConf why
    text = str(error)
    if text.startswith("Caught "):  # in a DataLoader worker, whose traceback is the message
        text = text.splitlines()[-1].partition(": ")[2]
    unknown = re.search(r"Key '[^']+' (?:is )?not in .*\s+full_key: (\S+)", text)
    if unknown:
        wrong = unknown.group(1)
        return f"{wrong}: no such key; {nearest(wrong, _keys(OmegaConf.structured(schema)))}"
    missing_option = re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\s+(.*)", text, re.DOTALL)
    if missing_option:
        asked, group, options = missing_option.groups()
        name = asked.split("/")[-1]
        return f"{group}: no option {name!r}; {nearest(name, options.split())}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = re.search(r"full_key: (\S+)", text)
    return (f"{key.group(1)}: " if key else "") + (lines[0] if lines else type(error).__name__)


def _keys(config, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(prefix + str(key))
        if OmegaConf.is_dict(config._get_node(key)):
            keys += _keys(config._get_node(key), f"{prefix}{key}.")
    return keys


def _quoted(argument: str) -> str:
    """Hydra's grammar reads blanks, commas and brackets in values; a path has to be quoted to survive it.
    Any argument of Lightning's Trainer may be given, also one that configs/pretrain.yaml does not list."""
    key, equals, value = argument.partition("=")
    if equals and key.lstrip("+") in PATHS and not value.startswith(("'", '"')) and value != "null":
        return key + "='" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if equals and key.startswith(("trainer.", "mix.options.", "detector_options.")):
        return "++" + argument
    return argument
