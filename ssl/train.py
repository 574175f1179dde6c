"""Training from a config to weights in the run's folder; the same call goes on where it stopped."""

import inspect
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from gradmix.registry import nearest
from gradmix.ssl.callbacks import Checkpoints, Pictures, Progress, newest_checkpoint
from gradmix.ssl.checks import check_root, check_values
from gradmix.ssl.config import Config
from gradmix.ssl.data.images import ImageSet
from gradmix.ssl.data.loader import check_batch_size
from gradmix.ssl.data.open_set import OpenSetData
from gradmix.ssl.guard import Guard
from gradmix.ssl.loggers import asked_for, loggers
from gradmix.ssl.machine import check_limits, check_queue, decoders, least_time, precision
from gradmix.ssl.networks.backbones import backbone_metadata, check_encoder
from gradmix.ssl.objective import check_losses
from gradmix.ssl.optimizer import learning_rate
from gradmix.ssl.pretrain import Pretraining, build_mixer
from gradmix.ssl.runs.files import write_json, write_tensors
from gradmix.ssl.runs.folder import check_free, claim
from gradmix.ssl.teacher import check_teacher

# What Lightning's Trainer may not be told, for the run's folder would not hold everything any more.
OURS = {
    **dict.fromkeys(("max_epochs", "min_epochs", "max_steps", "min_steps"), "epochs= says how long to train"),
    **dict.fromkeys(("max_time", "limit_train_batches", "overfit_batches", "fast_dev_run"), "a run is all its epochs"),
    **dict.fromkeys(("default_root_dir", "enable_checkpointing"), "run_dir= says where everything is kept"),
    **dict.fromkeys(("callbacks", "plugins"), "in Python, gradmix.ssl.train.train takes callbacks"),
}


def train(config: Config, data: OpenSetData, callbacks: Sequence[Callback] = ()) -> None:
    """Train and write ``checkpoints/``, TensorBoard events, ``backbone.safetensors``, ``head.safetensors``.

    ``training.json`` is written last: a run that has it is trained. A run that has checkpoints goes on from the
    newest readable one.

    Args:
        config: the run's configuration; ``run_dir`` must be free or belong to the same config.
        data: ``train`` is what is trained on.
        callbacks: more Lightning callbacks, such as evaluation while training.

    Raises:
        ValueError: bad input, one line.
        FloatingPointError: a loss, gradient or weight is not finite.
    """
    run_dir = Path(config.run_dir)
    check(config)
    check_batch_size(config.batch_size, len(data.train))
    check_teacher(config, data.classes)
    seed_everything(config.seed, verbose=False)
    module = Pretraining(config, data.train)
    network = torch.nn.Sequential(module.backbone, module.head)
    images = len(data.train) + len(data.held_out) + len(data.test)
    takes = check_limits(config, network, images, module.backbone.num_features)
    check_free(run_dir, config)
    resume, fingerprint = newest_checkpoint(run_dir / "checkpoints"), data.train.fingerprint()
    if resume is not None:
        if resume["step"] > config.epochs * (len(data.train) // config.batch_size):
            raise ValueError(f"{run_dir / 'checkpoints'}: step {resume['step']} is behind the end of the training")
        if resume["images"] != fingerprint:
            raise ValueError(f"data: not the training images that {run_dir} began with; choose another run_dir=")
        if resume["teacher"] != module.taught_by:
            raise ValueError(f"distill.teacher: not the weights that {run_dir} began with; choose another run_dir=")
        try:
            module.load_state_dict(resume["module"])
        except RuntimeError as error:
            raise ValueError(f"{run_dir / 'checkpoints'}: weights of another network ({error})") from error
        module.scalars = resume["scalars"]
    start = module.start = module.steps = 0 if resume is None else resume["step"]
    progress = Progress(config.batch_size)
    guard = Guard(config.on_nonfinite, config.max_skipped_steps, 0 if resume is None else resume["skipped"])
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint_seconds, guard, fingerprint, resume)
    trainer = build_trainer(config, [*callbacks, progress, guard, checkpoints])
    here = trainer.world_size // trainer.num_nodes  # processes on this machine
    workers = decoders(config.data.workers, here)
    if data.train.images is None:
        progress.workers = workers
        views = module.crops.count if data.train.photographs else 1
        check_queue(config.batch_size // trainer.world_size * views * 3 * data.train.size**2, workers * here)
    check_batch_size(config.batch_size, len(data.train), trainer.world_size, mixes=module.mixer is not None)
    if trainer.is_global_zero:
        claim(run_dir, config)  # not before all of it has shown that it can be built
        if data.bad:
            write_json(run_dir / "bad_images.json", data.bad)
        print(where_images_lie(config, data.train, trainer.strategy.root_device, workers))
        announce(config, data.train, network, start, takes, trainer)
    if start < config.epochs * (len(data.train) // config.batch_size):  # else stopped before the files below
        trainer.fit(module)
    if trainer.is_global_zero:
        metadata = backbone_metadata(module.backbone, data.train.size, config.data.fit)
        metadata["classes"] = json.dumps(data.classes)
        write_tensors(run_dir / "backbone.safetensors", module.backbone.state_dict(), metadata)
        write_tensors(run_dir / "head.safetensors", module.head.state_dict())
        write_json(
            run_dir / "training.json",
            {
                "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "train/steps": module.steps,
                "train/resumed_from_step": start,
                "train/skipped_steps": guard.skipped,
                "train/seconds": round(progress.seconds, 2),
                "train/images_per_s": round(progress.images_per_s, 1),
                "train/lr": learning_rate(config),
                "train/precision": precision(config),
                **({"train/images": data.drawn} if data.drawn else {}),
                **({"train/teacher": module.taught_by} if module.taught_by else {}),
                **{name: value.item() for name, value in module.scalars.items()},
            },
        )
    trainer.strategy.barrier()


def announce(
    config: Config, images: ImageSet, network: torch.nn.Module, start: int, takes: str, trainer: Trainer
) -> None:
    """Say what is to come, and what it will cost.

    Args:
        takes: of memory, in words.
    """
    steps = config.epochs * (len(images) // config.batch_size)
    print(f"{images.size} x {images.size} pixels, {steps} steps, {takes}")
    if start:
        print(f"goes on after step {start}")
    if trainer.strategy.root_device.type == "cpu" and start < steps:
        if least := least_time(config, network, images.size, steps - start, trainer.world_size):
            print(least)


def where_images_lie(config: Config, images: ImageSet, device: torch.device, workers: int) -> str:
    """One line for the log: small sets lie decoded on the training device, others are decoded again and again."""
    mebibytes = len(images) * 3 * images.size**2 / 2**20
    if images.images is not None:
        return f"training images: {mebibytes:.1f} MiB in memory on {device}"
    if images.photographs:
        return f"training images: views are cut from the files as they are needed, by {workers} workers"
    return (
        f"training images: {mebibytes:.0f} MiB exceed data.memory_gib={config.data.memory_gib:g} or half of the free "
        f"memory, decoded as they are needed by {workers} workers"
    )


def check(config: Config) -> None:
    """
    Raises:
        ValueError: what no images are needed to see: a value that makes no sense, an encoder, mixer, method or
            trainer argument that does not exist.
    """
    check_values(config)
    check_root(config.data)
    for key in OURS:
        if key in config.trainer:
            raise ValueError(f"trainer.{key}: not to be set here; {OURS[key]}")
    known = set(inspect.signature(Trainer).parameters)
    for key in config.trainer:
        if key not in known:
            raise ValueError(f"trainer.{key}: Lightning's Trainer has no such argument; {nearest(key, known)}")
    asked_for(config)
    check_encoder(config.encoder)
    if config.optimizer.warmup_epochs > config.epochs:
        raise ValueError(
            f"optimizer.warmup_epochs: {config.optimizer.warmup_epochs} are more than epochs={config.epochs}"
        )
    if config.optimizer.name == "lars" and not config.optimizer.weight_decay:
        raise ValueError(
            "optimizer.weight_decay: LARS scales the steps of what decays only; without, this is plain SGD at "
            "LARS's learning rate; give a little, as 1e-6, or take optimizer=sgd"
        )
    if config.mix.end_epoch is not None and config.mix.end_epoch <= config.mix.start_epoch:
        raise ValueError(
            f"mix.end_epoch: {config.mix.end_epoch} is not behind mix.start_epoch={config.mix.start_epoch}, nothing "
            "would be mixed; mix=none says so"
        )
    build_mixer(config.mix)
    check_losses(config)
    if config.outliers.name == "mixed" and config.mix.name in ("none", "extra_view"):
        raise ValueError(
            f"outliers.name: mix={config.mix.name} mixes nothing that could be an outlier; outliers=attribution needs "
            "no mix"
        )
    if config.speed.compile and config.speed.micro_batch is not None:
        raise ValueError("speed.compile: not with speed.micro_batch, which would count BatchNorm's statistics twice")
    check_teacher(config)


def build_trainer(config: Config, callbacks: list[Callback]) -> Trainer:
    """Lightning's trainer, with the config's ``trainer`` part.

    Raises:
        ValueError: Lightning does not take it.
    """
    quiet_lightning()
    if config.pictures_every:
        callbacks = [*callbacks, Pictures(config.pictures_every)]
    torch.set_float32_matmul_precision("high" if config.speed.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.speed.tf32
    settings = {
        "max_epochs": 1,  # to Lightning, all our epochs are one sequence; see TrainLoader
        "enable_checkpointing": False,  # Checkpoints does it
        "enable_progress_bar": False,  # Progress does it
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **config.trainer,
        "logger": loggers(config),
        "precision": precision(config),
    }
    try:
        return Trainer(**settings, callbacks=callbacks)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from error


def quiet_lightning() -> None:
    """Silence hints that a user of these commands can't act on."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for message in (
        "The `srun` command",
        ".*does not have many workers",
        ".*isinstance.treespec.*",
        ".*smaller than the logging",
        ".*in eval mode at the start",  # a teacher
    ):
        warnings.filterwarnings("ignore", message, module="pytorch_lightning")
