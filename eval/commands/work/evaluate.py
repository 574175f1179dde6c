"""What gradmix-eval does: evaluate a run again, or all runs of its splits."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from gradmix.eval.config import EvalConfig
from gradmix.eval.features.feature_sets import FEATURES, FeatureSets, divide, read_sets, sets_of
from gradmix.eval.protocols.evaluate import device_of, evaluate, measured
from gradmix.eval.protocols.measures import choose_measures
from gradmix.eval.protocols.robustness import corruption_table, evaluate_corruptions
from gradmix.eval.protocols.subject import subject_of_features
from gradmix.eval.report import write_report
from gradmix.eval.report.comparison import write_comparison
from gradmix.eval.report.summary import describe_data, over_splits, table
from gradmix.eval.report.tensorboard import write_tensorboard
from gradmix.eval.runs.compare import compare, comparison_table
from gradmix.eval.runs.export import export_backbone
from gradmix.eval.runs.folder import GROUPS, UNFINISHED, defaults
from gradmix.eval.runs.foreign import Foreign, adopt, check_transfer_classes, features_run, read_foreign, transfer
from gradmix.eval.runs.groups import find_runs
from gradmix.eval.runs.numbers import check_same_data, check_trained_on
from gradmix.ssl.checks import check_root
from gradmix.ssl.config import Config
from gradmix.ssl.data.names import check_names
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.data.sources import folders_read
from gradmix.ssl.runs.files import remove_strays, replacing, write_json
from gradmix.ssl.runs.folder import FILES, FOLDERS, check_classes, check_free, claim, read_config
from gradmix.ssl.runs.lock import alone_in
from gradmix.ssl.runs.outputs import check_output, check_writable


def run_eval(config: EvalConfig) -> None:
    """Evaluate, compare or export, as the config says, and print what came of it.

    Raises:
        ValueError: bad input, in one line.
    """
    if config.features is not None:
        print(as_text(evaluate_features(config), config))
        print(f"\n{Path(str(config.out)).expanduser()}: report.html, metrics.json, and the detector")
        return
    run_dir, out, parts, foreign = find_run(config)
    if config.against is not None or config.export:
        if foreign is not None:
            adopt(*foreign)
        for part in parts or [""]:
            if config.against is not None:
                other = Path(config.against).expanduser() / part
                print(comparison_table(run_dir / part, other, compare(run_dir / part, other)))
            else:
                for path in export_backbone(run_dir / part, config.export, out / part / "export"):
                    print(f"{path}: written")
        return
    result, path = measure_parts(config, run_dir, out, parts, foreign)
    print(as_text(result, config))
    over = f"; mean ± standard deviation over {len(parts)} splits" if len(parts) > 1 else ""
    print(f"\n{path}: every number{over}")


def evaluated(config: EvalConfig) -> tuple[Path, dict[str, Any], str]:
    """For :func:`gradmix.evaluate`: the folder of the results, the numbers, and the table of them."""
    numbers, path = measure_parts(config, *find_run(config))
    return path.parent, numbers, as_text(numbers, config)


def find_run(config: EvalConfig) -> tuple[Path, Path, list[str], Foreign | None]:
    """The run's folder, that of the results, those of its splits (if any) in both, and a run that is none yet.

    Raises:
        ValueError: not exactly one of ``run`` and ``checkpoint``, or an ``out`` that is something else's.
    """
    if (config.run is None) == (config.checkpoint is None):
        raise ValueError(
            "run: missing; give run=DIR, or checkpoint=FILE with encoder=, data= and out=, or features=FILE with out="
        )
    if config.run is not None and config.encoder.name:
        raise ValueError("encoder: belongs to checkpoint=FILE; a run has a network of its own, leave it out")
    if config.test_features is not None or config.unknown_features is not None:
        raise ValueError("test_features, unknown_features: belong to features=FILE, which is missing")
    if config.out is not None:
        check_out(config, Path(config.out).expanduser())
    if config.run is not None:
        foreign, run_dir = None, Path(config.run).expanduser()
    else:
        foreign = read_foreign(config)
        run_dir = Path(foreign[0].run_dir).expanduser()
        check_free(run_dir, foreign[0], "out")
    out = run_dir / f"transfer-{config.data.name}" if config.run and config.data.name else run_dir
    out = out if config.out is None else Path(config.out).expanduser()
    parts = [path.name for path in sorted(run_dir.glob("split-*"))] if not (run_dir / "config.yaml").exists() else []
    if out.resolve() == run_dir.resolve():
        out = run_dir  # by another name
    elif not config.export and config.against is None:
        for folder in (out, *sorted(out.glob("split-*")), *(out / part for part in parts)):
            if (folder / "config.yaml").exists():
                raise ValueError(f"out: {folder} is another run's folder, whose results would be lost; give another")
    return run_dir, out, parts, foreign


def check_out(config: EvalConfig, out: Path) -> None:
    """
    Raises:
        ValueError: what would be written there is something that is read.
    """
    named = (config.against, config.unknown_root, *config.unknown_roots.values(), config.corruptions, config.root)
    read = [Path(str(name)).expanduser() for name in named if name is not None]
    check_output("out", out, folders=[*read, *folders_read(config.data)])
    if config.checkpoint is not None:
        check_output("out", out / "backbone.safetensors", files=[Path(config.checkpoint).expanduser()])


def measure_parts(
    config: EvalConfig, run_dir: Path, out: Path, parts: list[str], foreign: Foreign | None
) -> tuple[dict[str, Any], Path]:
    """Evaluate a run, or those of its splits: the numbers, or their mean, and the file that they are in."""
    path = out / ("metrics.json" if config.corruptions is None else "metrics_corruptions.json")
    if not parts:
        return eval_one(config, run_dir, out, foreign), path
    with_page = out == run_dir and config.corruptions is None  # the page has nothing of corruptions
    means = [path, run_dir / "report.html"] if with_page else [path]
    result = over_splits([eval_one(config, run_dir / part, out / part, foreign, means) for part in parts])
    write_json(path, result)
    if with_page:
        write_comparison(find_runs([run_dir]), run_dir / "report.html")
    return result, path


def as_text(result: dict[str, Any], config: EvalConfig) -> str:
    """The numbers as the terminal shows them."""
    return table(result) if config.corruptions is None else f"{corruption_table(result)}\n{table(result)}"


def eval_one(
    config: EvalConfig, run_dir: Path, out: Path, foreign: Foreign | None = None, means: Sequence[Path] = ()
) -> dict[str, Any]:
    """
    Args:
        foreign: what is to become the run in ``run_dir``, once everything that can be checked was checked.
        means: files about this run and others, which are taken away before the run's numbers are replaced.

    Raises:
        ValueError: bad input, in one line.
    """
    run = read_config(run_dir) if foreign is None else deepcopy(foreign[0])
    if run.data.name == FEATURES:
        raise ValueError(f"run: {run_dir} was made of features=, with no network to evaluate; give features= and out=")
    take_over(run, config)
    check_squares(run, config)
    transfer(run, config)
    if config.unknown_root is not None or config.unknown_roots:
        run.data.unknown_root, run.data.unknown_roots = config.unknown_root, config.unknown_roots
    run.data.root = run.data.root if config.root is None else config.root
    check_root(run.data, "root" if config.root is not None else "data.root")
    choose_measures(run, config)
    device = device_of(run, config.device)
    if foreign is None and not (run_dir / "training.json").exists():
        raise ValueError(f"run: {run_dir} {UNFINISHED}")
    key = "run" if config.out is None else "out"
    with alone_in(out, key):
        check_writable(key, out, FILES, FOLDERS)
        remove_strays(out)
        if out != run_dir or config.data.name:
            check_same_data(key if config.out is not None else "data", out, run)
        try:
            data = load_data(run.data, run.seed, look=True)
        except ValueError as error:
            root = run.data.root
            if config.run is None or config.data.name or root is None or Path(root).expanduser().is_dir():
                raise
            raise ValueError(f"{error}; root=PATH says where it lies now") from error
        print(describe_data(run.data, data))
        check_names(data.classes, data.train, data.held_out, data.test)
        if config.data.name:
            check_transfer_classes(run, data)
        else:
            check_classes(run_dir, data.classes)
            if foreign is None:
                check_trained_on(run_dir, data)
        choose_measures(run, config, data)
        if foreign is not None:
            adopt(*foreign)
        if config.corruptions is not None:
            result = evaluate_corruptions(run_dir, run, data, config.corruptions, device, out)
            remove(means)
            return result
        with replacing(out, "metrics.json") as new:
            result = evaluate(run_dir, run, data, device, new, config)
            remove(means)
        if out == run_dir:  # elsewhere lies no config.yaml to report on
            write_tensorboard(run_dir, run, result, data)
            write_report(run_dir, data)
        return result


def remove(files: Sequence[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)


def check_squares(run: Config, config: EvalConfig) -> None:
    """
    Raises:
        ValueError: other data is to become other squares than those that the run's network knows.
    """
    groups = (config.data.name if group == "data" else getattr(run, group).name for group in GROUPS)
    usual = defaults(tuple(groups)) if config.run and config.data.name else {}
    if usual.get("data.name") != config.data.name:
        return  # the option of a --config-dir, which may say a size of its own
    for key in ("image_size", "fit"):
        given, own = getattr(config.data, key), getattr(run.data, key)
        if given not in (own, usual[f"data.{key}"]):
            raise ValueError(f"data.{key}: the run has {own}, and other data gets the same; leave it out")


def take_over(run: Config, config: EvalConfig) -> None:
    """What gradmix-eval says of detectors counts instead of the run's own."""
    run.detectors = run.detectors if config.detectors is None else config.detectors
    for name, options in config.detector_options.items():
        own = run.detector_options.get(name)
        if isinstance(own, dict) and isinstance(options, dict):
            options = {**own, **options}
        run.detector_options[name] = options
    run.primary = run.primary if config.primary is None else config.primary
    run.accept = run.accept if config.accept is None else config.accept
    run.per_class = run.per_class if config.per_class is None else config.per_class


def evaluate_features(config: EvalConfig, sets: FeatureSets | None = None) -> dict[str, Any]:
    """Evaluate features from elsewhere; ``config.out`` becomes a run's folder, without a network.

    Args:
        sets: instead of those that ``config.features`` and its kin name.

    Raises:
        ValueError: features or settings that make no sense.
    """
    if config.run is not None or config.checkpoint is not None:
        raise ValueError("features: beside run= or checkpoint=; give one of them")
    run = features_run(config)
    take_over(run, config)
    choose_measures(run, config)
    out = Path(run.run_dir)
    names = [name for name in (config.features, config.test_features, config.unknown_features) if name is not None]
    files = [Path(name).expanduser() for name in names]
    for name in ("config.yaml", "metrics.json", "report.html"):
        check_output("out", out / name, files)
    check_free(out, run, "out")
    sets = read_sets(config) if sets is None else sets
    data, parts = divide(sets, run.data, run.seed)
    check_names(data.classes)
    measures = choose_measures(run, config, data)
    with alone_in(out, "out"):
        claim(out, run, "out")
        remove_strays(out)
        with replacing(out, "metrics.json") as new:
            subject = subject_of_features(new, run, data, device_of(run, config.device), config, parts)
            result = measured(subject, measures, new)
        write_tensorboard(out, run, result, data)
        write_report(out, data)
        return result


def evaluated_arrays(config: EvalConfig, arrays: dict[str, Any]) -> tuple[Path, dict[str, Any], str]:
    """For :func:`gradmix.evaluate_features`: folder, numbers, and the table."""
    result = evaluate_features(config, sets_of(arrays))
    return Path(str(config.out)).expanduser(), result, as_text(result, config)
