"""Training from a config to weights in the run's folder; the same call goes on where it stopped."""

import difflib
import inspect
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger

from gradmix.ssl.backbones import backbone_metadata, stem_of
from gradmix.ssl.callbacks import AtomicCheckpointIO, Checkpoints, Pictures, Progress, newest_checkpoint
from gradmix.ssl.config import Config
from gradmix.ssl.data import OpenSetData
from gradmix.ssl.files import write_json, write_tensors
from gradmix.ssl.pretrain import Pretraining, learning_rate
from gradmix.ssl.run import claim


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
    """
    run_dir = Path(config.run_dir)
    check(config)
    seed_everything(config.seed, verbose=False)
    module = Pretraining(config, data.train)
    progress = Progress(config.batch_size)
    trainer = build_trainer(
        config, [*callbacks, progress, Checkpoints(run_dir / "checkpoints", config.checkpoint_seconds)]
    )
    if len(data.train) < config.batch_size:
        raise ValueError(
            f"batch_size: {config.batch_size} is larger than the training set of {len(data.train)} images; "
            f"try batch_size={max(2, len(data.train) // 4)}"
        )
    claim(run_dir, config)
    start = newest_checkpoint(run_dir / "checkpoints")
    trainer.fit(module, ckpt_path=None if start is None else str(start[0]))
    if trainer.is_global_zero:
        metadata = backbone_metadata(config.encoder, stem_of(module.backbone), config.data.image_size)
        write_tensors(run_dir / "backbone.safetensors", module.backbone.state_dict(), metadata)
        write_tensors(run_dir / "head.safetensors", module.head.state_dict())
        write_json(
            run_dir / "training.json",
            {
                "train/steps": trainer.global_step,
                "train/resumed_from_step": 0 if start is None else start[1],
                "train/seconds": round(progress.seconds, 2),
                "train/images_per_s": round(progress.images_per_s, 1),
                "train/lr": learning_rate(config),
                "train/loss": float(trainer.callback_metrics["train/loss"]) if progress.images else None,
            },
        )
    trainer.strategy.barrier()


def check(config: Config) -> None:
    """
    Raises:
        ValueError: a number that makes no sense, or a trainer key that Lightning does not know.
    """
    for key, least in (("epochs", 1), ("batch_size", 2), ("knn_every", 0), ("pictures_every", 0), ("seed", 0)):
        if getattr(config, key) < least:
            raise ValueError(f"{key}: expected at least {least}, got {getattr(config, key)}")
    known = set(inspect.signature(Trainer).parameters)
    for key in config.trainer:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean trainer.{near[0]}?" if near else ""
            raise ValueError(f"trainer.{key}: Lightning's Trainer has no such argument{hint}")


def build_trainer(config: Config, callbacks: list[Callback]) -> Trainer:
    quiet_lightning()
    callbacks = [*callbacks, LearningRateMonitor("step")]
    if config.pictures_every:
        callbacks.append(Pictures(config.pictures_every))
    settings = {
        "max_epochs": config.epochs,
        "logger": TensorBoardLogger(config.run_dir, name="", version="tensorboard"),
        "plugins": [AtomicCheckpointIO()],
        "enable_checkpointing": False,  # Checkpoints does it
        "enable_progress_bar": False,  # Progress does it
        "enable_model_summary": False,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
        **config.trainer,
    }
    return Trainer(**settings, callbacks=callbacks)


def quiet_lightning() -> None:
    """Silence hints that a user of these commands can't act on."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for message in (
        "The `srun` command",
        ".*does not have many workers",
        ".*isinstance.treespec.*",
        ".*smaller than the logging",
    ):
        warnings.filterwarnings("ignore", message, module="pytorch_lightning")
