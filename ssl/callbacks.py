"""What happens beside training: checkpoints, the progress bar, throughput, pictures."""

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from gradmix.ssl.files import write_atomically
from gradmix.ssl.images import denormalize


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own writer goes through the system's temp folder and does not reach the disk before the rename."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: str, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that can be read, and its step; damaged ones are passed over with a warning."""
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            return path, state["global_step"]
        except Exception as error:  # a damaged file can raise nearly anything
            warnings.warn(f"{path}: damaged checkpoint skipped ({str(error).splitlines()[0]})", stacklevel=2)
    return None


class Checkpoints(Callback):
    """Saves every so many seconds, between two optimizer steps, and at the end; keeps the last two."""

    def __init__(self, folder: Path, every_seconds: float):
        self.folder, self.every_seconds = folder, every_seconds
        self.last_saved = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # The main process's clock decides for all: saving is a collective operation.
        due = trainer.strategy.broadcast(time.monotonic() - self.last_saved >= self.every_seconds)
        if between_steps and due:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*.ckpt"))[:-2]:
                old.unlink()
        self.last_saved = time.monotonic()


class Progress(Callback):
    """One bar over the whole training; a line now and then when the output is not a terminal.

    Attributes:
        seconds, images: of this process's training, without the first step (it warms caches up).
        knn: the latest kNN accuracy in percent, put here by the callback that measures it.
    """

    def __init__(self, images_per_step: int):
        self.images_per_step = images_per_step
        self.seconds = 0.0
        self.images = 0
        self.knn: float | None = None
        self._started: float | None = None

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=int(trainer.estimated_stepping_batches),
            initial=trainer.global_step,
            desc="training",
            unit="step",
            disable=not trainer.is_global_zero,
            mininterval=0.5 if terminal else 20,
            dynamic_ncols=terminal,
            ascii=not terminal,
        )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._started is not None:
            self.seconds = now - self._started
            self.images += self.images_per_step
        else:
            self._started = now
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and self.bar.update(1):
            # Only when the bar is drawn: reading the loss makes a GPU wait.
            status = {"loss": f"{trainer.callback_metrics['train/loss'].item():.3f}"}
            if self.knn is not None:
                status["knn"] = f"{self.knn:.1f}%"
            self.bar.set_postfix(status, refresh=False)
        module.log("train/images_per_s", self.images_per_s)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.close()


class Pictures(Callback):
    """Views, attribution maps and mixed images of the first eight pairs, to TensorBoard, every so many epochs."""

    def __init__(self, every_epochs: int):
        self.every_epochs = every_epochs

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        due = trainer.current_epoch % self.every_epochs == 0 or last
        if due and trainer.is_global_zero and module.pictures is not None:
            module.logger.experiment.add_image("mixing", mixing_picture(*module.pictures), trainer.global_step)


def mixing_picture(views: torch.Tensor, mixed, pairs: int = 8) -> torch.Tensor:
    """A grid ``[3, H, W]`` with rows: views, attribution maps (if any), partners, mixed images."""
    rows = slice(0, min(pairs, len(views) // 2))
    tiles = [denormalize(views[rows])]
    if mixed.attribution is not None:
        tiles.append(mixed.attribution[rows, None].expand(-1, 3, -1, -1))
    tiles += [denormalize(views[mixed.partner[rows]]), denormalize(mixed.images[rows])]
    picture = torch.cat([tile.float().cpu() for tile in tiles])
    picture = torch.nn.functional.interpolate(picture, scale_factor=max(1, 64 // picture.shape[-1]))
    return make_grid(picture, nrow=len(tiles[0]))
