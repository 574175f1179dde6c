"""What happens beside training: checkpoints, the progress bar, curves and pictures."""

import errno
import math
import signal
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from tqdm.auto import tqdm

from gradmix.ssl.data.loader import Batch
from gradmix.ssl.guard import Guard, check_finite
from gradmix.ssl.loggers import log
from gradmix.ssl.machine import duration
from gradmix.ssl.pictures import mixing_picture
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.runs.files import write_atomically


class EpochCallback(Callback):
    """Something that is done at the end of every n-th epoch, and of the last.

    Lightning's own epoch hooks are of no use here: to it the whole training is one sequence of batches, so that a
    run can go on between any two steps.
    """

    every_epochs: int

    def on_train_batch_end(
        self, trainer: Trainer, module: Pretraining, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        epoch = batch.epoch + 1
        ends = batch.step + 1 == module.loader.steps_per_epoch
        if ends and (epoch % self.every_epochs == 0 or epoch == module.config.epochs) and trainer.is_global_zero:
            self.on_epoch(trainer, module)

    def on_epoch(self, trainer: Trainer, module: Pretraining) -> None:
        """What to do; only the first process calls it."""
        raise NotImplementedError


def newest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read; damaged ones are passed over with a warning. None where there is none.

    Raises:
        ValueError: there are checkpoints, but all are damaged.
        OSError, MemoryError: one can't be read now; it may be whole.
    """
    paths = sorted(folder.glob("step-*.ckpt"), reverse=True)
    for path in paths:
        try:
            return read_checkpoint(path)
        except Exception as error:  # a damaged file can raise nearly anything, and sends a reader to impossible places
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"{path}: damaged checkpoint skipped ({reason})", stacklevel=2)
    if paths:
        raise ValueError(f"{folder}: no checkpoint can be read; delete the folder to train from the start")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, by ``KEYS``.

    Raises:
        ValueError: damaged, or of another step than its name says.
        FloatingPointError: weights that are not finite.
    """
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed, so that it could be of any size in memory")
        if (damaged := archive.testzip()) is not None:  # torch writes checksums but does not look at them
            raise ValueError(f"{damaged} does not match its checksum")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if path.name != checkpoint_name(state["step"]):
        raise ValueError(f"of step {state['step']}")
    check_finite(state["module"], state["optimizer"], state["step"])
    return {key: state[key] for key in KEYS} | {"teacher": state.get("teacher")}  # older ones had none


# step, skipped steps, fingerprint of the images, the last step's numbers, and what training changes
KEYS = ("step", "skipped", "images", "scalars", "module", "optimizer", "schedule", "precision")


def checkpoint_name(step: int) -> str:
    """The file of a step."""
    return f"step-{step:08d}.ckpt"


class Checkpoints(Callback):
    """Saves every so many seconds, at the end, and when asked to stop (then exits 128 + signal); keeps the last two.

    A checkpoint is the weights, the optimizer, the schedule and the step. Everything random is a function of the
    seed and the step, so nothing else is needed to go on exactly.

    Args:
        guard: says whether to stop, and whether the weights are fit to be saved.
        images: fingerprint of the training set, so that no other one is trained on after a stop.
        resume: the checkpoint to go on from.
    """

    def __init__(self, folder: Path, every_seconds: float, guard: Guard, images: str, resume: dict[str, Any] | None):
        self.folder, self.every_seconds, self.guard = folder, every_seconds, guard
        self.images, self.resume = images, resume
        self.last_saved = time.monotonic()
        guard.saved = None if resume is None else resume["step"]

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:
        if self.resume is None:
            return
        optimizer, saved = trainer.optimizers[0], self.resume["optimizer"]
        if len(optimizer.param_groups) > 1 == len(saved["param_groups"]):
            raise ValueError(
                f"{self.folder}: the run began when optimizer.weight_decay still fell on biases and BatchNorm; go on "
                "with the version of gradmix that began it, or begin again in another run_dir="
            )
        if "fused" in optimizer.defaults:  # a matter of today's precision and on_nonfinite=, not of the run's
            for group in saved["param_groups"]:
                group["fused"] = optimizer.defaults["fused"]
        try:
            optimizer.load_state_dict(saved)
            trainer.lr_scheduler_configs[0].scheduler.load_state_dict(self.resume["schedule"])
            if self.resume["precision"]:  # empty where no gradients were scaled; they may be now
                trainer.precision_plugin.load_state_dict(self.resume["precision"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.folder}: the newest checkpoint is of another optimizer ({error})") from error

    def on_train_batch_end(
        self, trainer: Trainer, module: Pretraining, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if module.steps % trainer.accumulate_grad_batches:
            return  # gradients are half collected
        # Clocks differ between processes. What a save reads early, the others read at the next step: until then the
        # process that saved neither leaves nor raises, or they would wait for it.
        stop, due = self.guard.stop, time.monotonic() - self.last_saved >= self.every_seconds
        if stop or (due and self.guard.is_finite()):
            self.save(trainer, module)
        if stop:
            self.leave(trainer, module, stop)

    def on_train_end(self, trainer: Trainer, module: Pretraining) -> None:
        self.save(trainer, module)
        # Behind the last step nobody agrees on anything any more, and a process that left alone would end the others.
        received = torch.tensor(self.guard.received, device=module.device)
        if stop := int(trainer.strategy.reduce(received, reduce_op="max")):
            self.leave(trainer, module, stop)

    def leave(self, trainer: Trainer, module: Pretraining, number: int) -> None:
        """End the process as the signal ``number`` asks, and say how to go on."""
        if trainer.is_global_zero:
            name = signal.Signals(number).name
            print(f"stopped by {name}, saved after step {module.steps}; the same command goes on", file=sys.stderr)
        sys.exit(128 + number)

    def save(self, trainer: Trainer, module: Pretraining) -> None:
        """Write a checkpoint of this step, and remove all but the last two.

        Raises:
            FloatingPointError: the weights are not finite.
        """
        self.guard.settle()
        self.last_saved = time.monotonic()
        state: dict[str, Any] = {
            "step": module.steps,
            "skipped": self.guard.skipped,
            "images": self.images,
            "teacher": module.taught_by,
            "scalars": module.scalars,
            "module": module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "precision": trainer.precision_plugin.state_dict(),
        }
        check_finite(state["module"], state["optimizer"], module.steps)
        if not trainer.is_global_zero:
            return

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # given a path, torch hides why it can't write
                try:
                    torch.save(state, file)
                except RuntimeError as error:  # what torch's writer makes of a full disk or a limit
                    raise OSError(str(error).splitlines()[0]) from error

        write_atomically(self.folder / checkpoint_name(module.steps), write)
        self.guard.saved = module.steps
        for old in sorted(self.folder.glob("step-*.ckpt"))[:-2]:
            old.unlink()


class Progress(Callback):
    """One bar over the whole training, lines where the output is not a terminal; and the curves.

    A line every ten seconds in the first minute, then one a minute, and one at the end of more than ten seconds.

    Attributes:
        seconds, images: of this session, without its first step, which warms caches up, and without those after it that
            are quick because workers had decoded their images meanwhile.
        workers: processes that decode images, each two batches ahead; 0 where images lie in memory.
        knn: the latest kNN accuracy in percent, put here by the callback that measures it.
    """

    log_every_steps = 10
    first_steps = 5  # at least, over which the time that a run will take is measured
    first_minute, seconds_per_line = 10.0, 60.0  # between two lines

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.seconds = 0.0
        self.images = 0
        self.workers = 0
        self.knn: float | None = None
        self._started = 0.0
        self._done = self._counted = 0  # steps of this session; and those that took ``seconds``

    @property
    def images_per_s(self) -> float:
        """Of this session; 0 before its second step."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:
        self.total = module.start + len(module.loader)
        self.bar = tqdm(
            total=self.total,
            initial=module.start,
            desc="training",
            unit="step",
            disable=None if trainer.is_global_zero else True,  # None: where the output is no terminal
            mininterval=0.5,
            dynamic_ncols=True,
        )
        self._line_at = self._step_at = self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: Pretraining, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now, before = time.perf_counter(), self._step_at
        self._step_at = now
        self._done += 1
        begin = 1 + 3 * self.workers  # two batches each were ready; while these were taken, the third began
        if self._done in (1, begin):
            self._started, self._counted = now, 0
        else:
            self._counted += 1
            self.seconds, self.images = now - self._started, self._counted * self.images_per_step
        rounds = max(1, self.workers)  # batches that workers began together come together
        measured = math.ceil(self.first_steps / rounds) * rounds
        left = (self.total - module.steps) * self.seconds * self.images_per_step / max(self.images, 1)
        if self._done == begin + measured and left >= 30 and trainer.is_global_zero:
            tqdm.write(f"expected time: {duration(left)}, measured over {measured} steps")
        last = module.steps == self.total
        if self.bar.update(1) or (last and not self.bar.disable):
            end = {name: value for name, value in self.end(module).items() if name != "left"}  # the bar has it
            self.bar.set_postfix(self.status(module) | end, refresh=last)
        elif self.bar.disable and trainer.is_global_zero:
            pause = self.first_minute if now - self._begin <= 60 else self.seconds_per_line
            late = now - self._line_at + (now - before) >= pause  # the next step would be
            if late or (last and now - self._begin >= self.first_minute):
                self._line_at = now
                told = {"step": f"{module.steps}/{self.total}"} | self.status(module) | self.end(module)
                print(", ".join(f"{name} {value}" for name, value in told.items()), file=sys.stderr)
        if module.steps % self.log_every_steps == 0 and trainer.is_global_zero:
            curves = {name: value.item() for name, value in module.scalars.items()}
            curves |= {"train/images_per_s": self.images_per_s, "train/epoch": batch.epoch}
            curves["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            log(module, curves, module.steps)

    def status(self, module: Pretraining) -> dict[str, str]:
        """Only for when it is shown: reading the loss makes a GPU wait."""
        loss = module.scalars.get("train/loss")  # None where every step so far was left out
        shown = {} if loss is None else {"loss": f"{loss.item():.3f}"}
        if self.knn is not None:
            shown["knn"] = f"{self.knn:.1f}%"
        if self.images:  # after one step nobody knows
            shown["img/s"] = f"{self.images_per_s:.{1 if self.images_per_s < 10 else 0}f}"
        return shown

    def end(self, module: Pretraining) -> dict[str, str]:
        """How much longer, and until when; at the end, how long it took."""
        left = (self.total - module.steps) * self.seconds * self.images_per_step / max(self.images, 1)
        if module.steps == self.total:
            return {"took": tqdm.format_interval(time.perf_counter() - self._begin)}
        if not self.images:
            return {}
        day = "%H:%M" if left < 12 * 3600 else "%a %H:%M"
        return {"left": tqdm.format_interval(left), "until": time.strftime(day, time.localtime(time.time() + left))}

    def teardown(self, trainer: Trainer, module: Pretraining, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class Pictures(EpochCallback):
    """Views, attribution maps and mixed images of the first eight pairs, to TensorBoard, every so many epochs."""

    def __init__(self, every_epochs: int) -> None:
        self.every_epochs = every_epochs

    def on_epoch(self, trainer: Trainer, module: Pretraining) -> None:
        if module.pictures is not None or module.disrupted is not None:
            picture = mixing_picture(module.pictures, module.backbone.constants, disrupted=module.disrupted)
            cast(TensorBoardLogger, module.loggers[0]).experiment.add_image("mixing", picture, module.steps)
