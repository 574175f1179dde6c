"""gradmix-pretrain: train, then evaluate."""

from dataclasses import replace
from pathlib import Path

from gradmix.eval.commands.command_line import run_command
from gradmix.ssl.checks import check_values
from gradmix.ssl.config import Config


def main() -> None:
    """gradmix-pretrain."""
    run_command("pretrain", "train a backbone, then evaluate it.", Config, run_pretrain)


def run_pretrain(config: Config) -> None:
    check_values(config)
    # Imported here, so that --help and errors in the config answer at once.
    from gradmix.eval.protocols.evaluate import check_detectors
    from gradmix.eval.report.comparison import write_comparison
    from gradmix.eval.report.summary import over_splits, table
    from gradmix.eval.runs.groups import find_runs
    from gradmix.ssl.data.open_set import splits_of
    from gradmix.ssl.runs.files import write_json

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

    from gradmix.eval.features.extraction import extract_together
    from gradmix.eval.protocols.evaluate import check_neighbours, device_of, evaluate
    from gradmix.eval.protocols.online import watchers
    from gradmix.eval.report import write_report
    from gradmix.eval.report.summary import describe
    from gradmix.eval.report.tensorboard import write_tensorboard
    from gradmix.ssl.data.open_set import load_data
    from gradmix.ssl.losses import world_size
    from gradmix.ssl.runs.files import read_json, remove_strays, replacing
    from gradmix.ssl.runs.folder import claim, read_config
    from gradmix.ssl.runs.lock import alone_in
    from gradmix.ssl.train import check, train

    run_dir, first = Path(config.run_dir), rank_zero_only.rank == 0
    check(config)
    with alone_in(run_dir):
        if (run_dir / "config.yaml").exists():
            if config.data.image_size is None:  # chosen when the run began
                config = replace(config, data=replace(config.data, image_size=read_config(run_dir).data.image_size))
            claim(run_dir, config)  # before anything is written there
        if first:
            remove_strays(run_dir)
        if (run_dir / "report.html").exists():  # the last thing to be written
            if not first:
                return None
            print(f"{run_dir}: finished already; gradmix-eval run={run_dir} evaluates again")
            return read_json(run_dir / "metrics.json")
        data = load_data(config.data, config.seed)
        config = replace(config, data=replace(config.data, image_size=data.train.size))
        if first:
            print(describe(config, data))
        check_neighbours(config, data)
        if not (run_dir / "training.json").exists():
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


def look_at(config: Config, data, first: bool):
    """The data without the files that can't be read, which training passes over when their turn comes.

    Of several processes the first decodes every file, and the others read what it found.
    """
    import torch

    from gradmix.ssl.data.open_set import load_data
    from gradmix.ssl.losses import world_size

    if data.looked_at:
        return data
    if not first:
        torch.distributed.barrier()
    looked_at = load_data(config.data, config.seed, look=True)
    if first and world_size() > 1:
        torch.distributed.barrier()
    return looked_at
