"""What gradmix-pretrain does: train, then evaluate; one run, or one for each split."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradmix.eval.counted import counted
from gradmix.eval.features.extraction import extract_together
from gradmix.eval.protocols.evaluate import device_of, evaluate
from gradmix.eval.protocols.measures import choose_measures
from gradmix.eval.protocols.online import watchers
from gradmix.eval.report import write_report
from gradmix.eval.report.comparison import write_comparison
from gradmix.eval.report.summary import describe, over_splits, table
from gradmix.eval.report.tensorboard import write_tensorboard
from gradmix.eval.runs.groups import find_runs
from gradmix.eval.runs.numbers import check_trained_on, read_metrics
from gradmix.ssl.config import Config
from gradmix.ssl.data.names import check_names
from gradmix.ssl.data.open_set import OpenSetData, load_data, splits_of
from gradmix.ssl.data.sources import folders_read
from gradmix.ssl.machine import check_device
from gradmix.ssl.processes import is_first, world_size
from gradmix.ssl.runs.files import remove_strays, replacing, write_json
from gradmix.ssl.runs.folder import FILES, FOLDERS, check_free, has_begun, read_config
from gradmix.ssl.runs.lock import alone_in
from gradmix.ssl.runs.outputs import check_output, check_writable
from gradmix.ssl.train import check, train


def run_pretrain(config: Config) -> None:
    """Train and evaluate, and print the numbers.

    Raises:
        ValueError: bad input, in one line.
    """
    result = pretrain(config)
    if result is None:
        return
    print(table(result))
    if config.data.split != "all":
        print(f"\n{config.run_dir}: report.html, metrics.json, weights, detector and TensorBoard events")
    else:
        over = f"mean ± standard deviation over {counted(result['splits'], 'split')}"
        print(f"\n{over}; {config.run_dir}: report.html, and the runs in split-*")


def trained(config: Config) -> tuple[Path, dict[str, Any], str]:
    """For :func:`gradmix.pretrain`: the run's folder, its numbers, and the table of them.

    Raises:
        RuntimeError: this is not the first process of a distributed run, which alone has the numbers.
    """
    numbers = pretrain(config)
    if numbers is None:
        raise RuntimeError("only the first process of a distributed run has its numbers")
    return Path(config.run_dir), numbers, table(numbers)


def pretrain(config: Config) -> dict[str, Any] | None:
    """The run's numbers, or the mean of its splits'; None on all but the first process."""
    choose_measures(config)
    config.run_dir = str(Path(config.run_dir).expanduser())
    check_output("run_dir", Path(config.run_dir), folders=folders_read(config.data))
    if config.encoder.init is not None:
        weights = Path(config.run_dir) / "backbone.safetensors"
        check_output("run_dir", weights, files=[Path(config.encoder.init).expanduser()])
    if config.distill.teacher is not None:
        check_output("run_dir", Path(config.run_dir), [], [Path(config.distill.teacher).expanduser()])
    if config.data.split != "all":
        return pretrain_one(config)
    results: list[dict[str, Any] | None] = []
    for split in range(len(splits_of(config.data))):
        one = replace(config, data=replace(config.data, split=split), run_dir=f"{config.run_dir}/split-{split}")
        results.append(pretrain_one(one))
    finished = [result for result in results if result is not None]
    if len(finished) < len(results):
        return None
    summary, folder = over_splits(finished), Path(config.run_dir)
    write_json(folder / "metrics.json", summary)
    write_comparison(find_runs([folder]), folder / "report.html")
    return summary


def pretrain_one(config: Config) -> dict[str, Any] | None:
    """The run's numbers; None on all but the first process, which go on to the next run while it evaluates."""
    run_dir, first = Path(config.run_dir), is_first()
    check(config)
    check_device(config)
    with alone_in(run_dir):
        if config.data.image_size is None and has_begun(run_dir):  # chosen when the run began
            config = replace(config, data=replace(config.data, image_size=read_config(run_dir).data.image_size))
        check_free(run_dir, config)  # before anything is written there
        if first:
            remove_strays(run_dir)
        # The report is written last. An evaluation that was killed later may have taken the numbers away.
        if (run_dir / "report.html").exists() and (run_dir / "metrics.json").exists():
            if not first:
                return None
            numbers = read_metrics(run_dir / "metrics.json")
            other = "; the images have changed since: another run_dir= trains on them" * changed(config, numbers)
            print(f"{run_dir}: finished already; gradmix-eval run={run_dir} evaluates again{other}")
            return numbers
        if first:
            check_writable("run_dir", run_dir, FILES, FOLDERS)
        data = load_data(config.data, config.seed)
        config = replace(config, data=replace(config.data, image_size=data.train.size))
        if first:
            print(describe(config, data))
        check_names(data.classes, data.train, data.held_out, data.test)
        choose_measures(config, data=data)
        if (run_dir / "training.json").exists():
            check_trained_on(run_dir, data)
        else:
            train(config, data, watchers(data, config))
            if world_size() > 1:
                data = look_at(config, data, first)
                extract_together(run_dir, data.sets(), device_of(config), config.data.workers)
        if not first:
            return None
        data = look_at(config, data, first)
        with replacing(run_dir, "metrics.json") as new:
            result = evaluate(run_dir, config, data, device_of(config), new)
        write_tensorboard(run_dir, config, result, data)
        write_report(run_dir, data)
        return result


def changed(config: Config, numbers: dict[str, Any]) -> bool:
    """Whether a folder's files are others than the run was trained on. Nothing is decoded that was ever looked at."""
    if config.data.name != "imagefolder" or "train/images" not in numbers:
        return False
    try:
        return load_data(config.data, config.seed, pixels=False).drawn != numbers["train/images"]
    except (ValueError, OSError):  # they are not there any more, and the numbers still are
        return False


def look_at(config: Config, data: OpenSetData, first: bool) -> OpenSetData:
    """The data without the files that can't be read, which training passes over when their turn comes.

    Of several processes the first decodes every file, and the others read what it found.
    """
    if data.looked_at:
        return data
    if not first:
        torch.distributed.barrier()
    looked_at = load_data(config.data, config.seed, look=True)
    if first and world_size() > 1:
        torch.distributed.barrier()
    return looked_at
