"""Where the curves go: TensorBoard's events in the run's folder, and what ``trainer.logger`` adds."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pytorch_lightning import LightningModule
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from gradmix.ssl.config import Config

# Name, the package that it needs, and how to make it. A run that goes on begins another of theirs.
LOGGERS: dict[str, tuple[str, Callable[[Path], Logger]]] = {
    "csv": ("csv", lambda run: CSVLogger(run, name="csv")),
    "wandb": ("wandb", lambda run: WandbLogger(name=run.name, save_dir=run, project="gradmix")),
    "mlflow": ("mlflow", lambda run: MLFlowLogger("gradmix", run_name=run.name, save_dir=str(run / "mlruns"))),
}


def asked_for(config: Config) -> list[str]:
    """The loggers beside TensorBoard, by name.

    Raises:
        ValueError: one needs a package that is not installed.
    """
    asked = config.trainer.get("logger", [])
    names = [name for name in ([asked] if isinstance(asked, str) else asked) if name in LOGGERS]
    for name in names:
        package, _ = LOGGERS[name]
        if find_spec(package) is None:
            raise ValueError(f"trainer.logger: {name} needs the package {package}; pip install {package}")
    return names


def loggers(config: Config) -> list[Logger]:
    """TensorBoard's first: it takes pictures too."""
    run = Path(config.run_dir)
    ours: list[Logger] = [TensorBoardLogger(run, name="", version="tensorboard")]
    return ours + [LOGGERS[name][1](run) for name in asked_for(config)]


def log(module: LightningModule, numbers: dict[str, float], step: int) -> None:
    """Tell all of the trainer's loggers."""
    for logger in module.loggers:
        logger.log_metrics(numbers, step)
