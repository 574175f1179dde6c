"""Before every optimizer step: is it finite, and has anyone been asked to stop?"""

import signal
import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm

from gradmix.ssl.data.loader import Batch, refusal
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.runs.signals import SIGNALS

SMALLEST_SCALE = 2.0**-14  # a gradient scaler halves its 2**16 at every overflow; so far down, all overflow


@dataclass
class Verdict:
    """What is known of one optimizer step, perhaps still on its way from the device.

    Attributes:
        step: batches seen, over all epochs.
        lr: learning rate.
        rows: this process's rows of the training set, over the batches that were accumulated.
        bad: why image files of this process's rows can't be read.
        flags: ``[4]`` on the host: loss not finite, gradient not finite, image not readable, number of the signal (0
            for none).
        copied: recorded behind the copy of ``flags``; None when they are there already.
    """

    step: int
    lr: float
    rows: Tensor
    bad: tuple[str, ...]
    flags: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> list[int]:
        """``flags``, waiting for them if need be."""
        if self.copied is not None:
            self.copied.synchronize()
        return [int(flag) for flag in self.flags]


class Guard(Callback):
    """Stops before a step whose loss or gradient is not finite, or leaves it out; hears signals. All processes alike.

    So they do at an image file that can't be read: only one process sees it, and the others would wait for that one.

    On a CPU the optimizer never sees a step that is not finite. A GPU's verdict is copied beside its other work and
    read one optimizer step later, so that the host never waits for it; nothing is saved before it is read. Skipping
    has to know before the step, so there the host does wait.

    Args:
        on_nonfinite: ``"error"``, or ``"skip"``: weights, BatchNorm statistics and optimizer stay as they are.
        limit: skipped steps that a run may have in all.

    Attributes:
        skipped: steps left out so far.
        received: number of the signal that this process received, 0 for none.
        saved: step of the newest checkpoint, None before the first.

    Raises:
        FloatingPointError: out of ``trainer.fit``, with the step, learning rate and rows of the batch.
        ValueError: an image file can't be read.
    """

    def __init__(self, on_nonfinite: str, limit: int, skipped: int = 0) -> None:
        self.skips, self.limit, self.skipped = on_nonfinite == "skip", limit, skipped
        self.received = self.agreed = 0
        self.saved: int | None = None
        self.pending: Verdict | None = None
        self.start_step()

    def start_step(self) -> None:
        """Forget the batches of the optimizer step that is over."""
        self.rows: list[Tensor] = []
        self.bad_images: tuple[str, ...] = ()
        self.bad_losses: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:
        if threading.current_thread() is not threading.main_thread():  # Python hands them to the main one alone
            return
        ignored = {number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN} - {signal.SIGINT}
        self.handlers = {number: signal.signal(number, self.hear) for number in SIGNALS if number not in ignored}

    def teardown(self, trainer: Trainer, module: Pretraining, stage: str) -> None:
        for number, handler in getattr(self, "handlers", {}).items():
            signal.signal(number, handler)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal until the step is over; at the second Ctrl-C, exit."""
        if self.received and number == signal.SIGINT:  # a person who does not want to wait for the step
            kept = "nothing is saved yet" if self.saved is None else f"what is saved is step {self.saved}"
            print(f"stopped at once; {kept}; the same command goes on", file=sys.stderr)
            sys.exit(128 + number)  # on a KeyboardInterrupt, Lightning would end the process with another code
        self.received = number

    @property
    def stop(self) -> int:
        """Number of the signal that asked the run to stop; several processes agree on it at an optimizer step."""
        return self.agreed if torch.distributed.is_initialized() else self.received

    def on_train_batch_start(self, trainer: Trainer, module: Pretraining, batch: Batch, batch_idx: int) -> None:
        if self.skips and not self.rows:
            self.buffers = [buffer.clone() for buffer in module.buffers()]
            self.scalars = module.scalars
        self.rows.append(batch.index)
        self.bad_images += batch.bad

    def on_before_backward(self, trainer: Trainer, module: Pretraining, loss: Tensor) -> None:
        self.bad_losses.append(~loss.detach().isfinite())

    def on_before_optimizer_step(self, trainer: Trainer, module: Pretraining, optimizer: torch.optim.Optimizer) -> None:
        bad_loss = torch.stack(self.bad_losses).any()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        bad_gradient = ~get_total_norm(gradients, float("inf")).isfinite()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scaled = scaler is not None
        if scaler is not None:  # it expects overflows, and skips them
            bad_gradient &= scaler.scale(torch.ones_like(bad_loss, dtype=torch.float)) < SMALLEST_SCALE
        received = torch.full_like(bad_loss, self.received, dtype=torch.float)
        unread = torch.full_like(received, bool(self.bad_images))
        flags = torch.stack([bad_loss.float(), bad_gradient.float(), unread, received])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        late = flags.is_cuda and not self.skips
        flags, copied = flags.to("cpu", non_blocking=late), torch.cuda.Event() if late else None
        if copied is not None:
            copied.record()
        lr, rows = optimizer.param_groups[0]["lr"], torch.cat(self.rows)
        verdict = Verdict(module.steps, lr, rows, self.bad_images, flags, copied)
        self.start_step()
        self.settle()  # the step before, where it is late
        self.pending = verdict
        if not late and self.settle():
            optimizer.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient
            for buffer, before in zip(module.buffers(), self.buffers, strict=True):
                buffer.copy_(before)
            module.scalars = self.scalars  # what is reported, too, is of the last step that was taken

    def is_finite(self) -> bool:
        """Whether the verdict that is still pending, if any, finds nothing wrong. It stays pending."""
        return self.pending is None or not any(self.pending.read()[:3])

    def settle(self) -> bool:
        """Read the verdict that is still pending, if any; whether it says to skip.

        Raises:
            FloatingPointError: the loss or a gradient is not finite, and the step may not be skipped.
            ValueError: an image file can't be read.
        """
        verdict, self.pending = self.pending, None
        if verdict is None:
            return False
        bad_loss, bad_gradient, unread, self.agreed = verdict.read()
        if unread:
            raise ValueError(refusal(verdict.bad) if verdict.bad else "data: another process names an unreadable image")
        if not bad_loss and not bad_gradient:
            return False
        if self.skips and self.skipped < self.limit:
            self.skipped += 1
            return True
        what = "loss" if bad_loss else "gradient"
        hint = (
            f"{self.skipped} steps were skipped before, max_skipped_steps={self.limit} allows no more"
            if self.skips
            else "try a lower optimizer.base_lr, or leave such steps out with on_nonfinite=skip"
        )
        if self.scaled and not bad_loss:
            hint = "float16 overflows at every scale, try trainer.precision=bf16-mixed or 32-true"
        raise FloatingPointError(
            f"the {what} is not finite at step {verdict.step}, learning rate {verdict.lr:.3g}, images "
            f"{verdict.rows.tolist()} of the training set; {hint}; the checkpoints are from before"
        )


def check_finite(weights: dict[str, Tensor], optimizer: dict[str, Any], step: int) -> None:
    """
    Raises:
        FloatingPointError: a weight, statistic or part of the optimizer's state is not finite.
    """
    moments = {f"optimizer {i} {key}": value for i, of in optimizer["state"].items() for key, value in of.items()}
    tensors = {name: value for name, value in {**weights, **moments}.items() if isinstance(value, Tensor)}
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad[:3])}: not finite after step {step}; nothing is saved, the checkpoints are from before"
        )
