"""What gradmix-eval does: evaluate a run again, or all runs of its splits."""

from pathlib import Path

from gradmix.eval.config import EvalConfig
from gradmix.eval.protocols.evaluate import device_of, evaluate
from gradmix.eval.protocols.measures import choose_measures
from gradmix.eval.protocols.robustness import corruption_table, evaluate_corruptions
from gradmix.eval.report import write_report
from gradmix.eval.report.comparison import write_comparison
from gradmix.eval.report.summary import over_splits, table
from gradmix.eval.report.tensorboard import write_tensorboard
from gradmix.eval.runs.compare import compare, comparison_table
from gradmix.eval.runs.export import export_backbone
from gradmix.eval.runs.foreign import adopt, check_transfer_classes, transfer
from gradmix.eval.runs.groups import find_runs
from gradmix.ssl.data.names import check_names
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.runs.files import remove_strays, replacing, write_json
from gradmix.ssl.runs.folder import check_classes, read_config
from gradmix.ssl.runs.lock import alone_in
from gradmix.ssl.runs.outputs import check_output, folders_read


def run_eval(config: EvalConfig) -> None:
    if (config.run is None) == (config.checkpoint is None):
        raise ValueError("run: missing; give run=DIR, or checkpoint=FILE with encoder=, data= and out=")
    if config.out is not None:
        check_out(config, Path(config.out).expanduser())
    run_dir = adopt(config) if config.run is None else Path(config.run).expanduser()
    out = run_dir / f"transfer-{config.data.name}" if config.run and config.data.name else run_dir
    out = out if config.out is None else Path(config.out).expanduser()
    parts = [path.name for path in sorted(run_dir.glob("split-*"))] if not (run_dir / "config.yaml").exists() else []
    if config.against is not None:
        other = Path(config.against).expanduser()
        for part in parts or [""]:
            print(comparison_table(run_dir / part, other / part, compare(run_dir / part, other / part)))
    elif config.export:
        for part in parts or [""]:
            for path in export_backbone(run_dir / part, config.export, out / part / "export"):
                print(f"{path}: written")
    else:
        measure_parts(config, run_dir, out, parts)


def check_out(config: EvalConfig, out: Path) -> None:
    """
    Raises:
        ValueError: what would be written there is something that is read.
    """
    read = [name for name in (config.against, config.unknown_root, config.corruptions, config.root) if name is not None]
    check_output("out", out, folders=[*(Path(name).expanduser() for name in read), *folders_read(config.data)])
    if config.checkpoint is not None:
        check_output("out", out / "backbone.safetensors", files=[Path(config.checkpoint).expanduser()])


def measure_parts(config: EvalConfig, run_dir: Path, out: Path, parts: list[str]) -> None:
    """Evaluate a run, or those of its splits, and print the numbers, or their mean."""
    clean = config.corruptions is None
    name, as_text = ("metrics.json", table) if clean else ("metrics_corruptions.json", corruption_table)
    results = [eval_one(config, run_dir / part, out / part) for part in parts or [""]]
    result = over_splits(results) if parts else results[0]
    if parts:
        write_json(out / name, result)
    if parts and out == run_dir:
        write_comparison(find_runs([run_dir]), run_dir / "report.html")
    print(as_text(result))
    over = f"; mean ± standard deviation over {len(parts)} splits" if len(parts) > 1 else ""
    print(f"\n{out / name}: every number{over}")


def eval_one(config: EvalConfig, run_dir: Path, out: Path) -> dict:
    run = read_config(run_dir)
    run.detectors = run.detectors if config.detectors is None else config.detectors
    run.detector_options |= config.detector_options
    transfer(run, config)
    for key in ("root", "unknown_root"):
        if getattr(config, key) is not None:
            setattr(run.data, key, getattr(config, key))
    choose_measures(run, config)
    if not (run_dir / "training.json").exists():
        raise ValueError(f"run: {run_dir} has not finished training; gradmix-pretrain run_dir={run_dir} goes on")
    with alone_in(out, "run" if config.out is None else "out"):
        remove_strays(out)
        data = load_data(run.data, run.seed, out / "scan.json")
        check_names(data.classes, data.train, data.held_out, data.test)
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
