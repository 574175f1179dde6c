"""Any of the four commands in a process of its own, forked from one that has imported everything."""

import ctypes
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import gradmix.eval.commands.work.compare
import gradmix.eval.commands.work.evaluate
import gradmix.eval.commands.work.pretrain
import gradmix.eval.commands.work.score  # noqa: F401  so that children need not
from gradmix.eval.commands import compare, evaluate, pretrain, score

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
COMMANDS = {"pretrain": pretrain, "eval": evaluate, "score": score, "compare": compare}
TINY = (
    *("epochs=2", "batch_size=8", "encoder.width=4", "data.image_size=8", "trainer.accelerator=cpu", "knn_every=0"),
    *("pictures_every=0", "detectors=[deep_knn]", "checkpoint_seconds=0", "data=imagefolder", "data.workers=0"),
)


def work(folder: Path, name: str, arguments: tuple, prepare: Callable | None) -> None:
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    sys.argv = [f"gradmix-{name}", *map(str, arguments)]
    if prepare is not None:
        prepare()
    COMMANDS[name].main()


def start(folder: Path, name: str, *arguments, prepare: Callable | None = None):
    process = CONTEXT.Process(target=work, args=(folder, name, arguments, prepare))
    process.start()
    return process


def finish(folder: Path, name: str, *arguments, code: int = 0, prepare: Callable | None = None) -> str:
    """Let it run to its end; what it said."""
    process = start(folder, name, *arguments, prepare=prepare)
    process.join(300)
    said = (folder / "log").read_text()
    assert process.exitcode == code, (process.exitcode, said)
    assert "Traceback" not in said, said
    return said


def refused(folder: Path, name: str, *arguments, prepare: Callable | None = None) -> str:
    """The one line that it says with exit code 2."""
    said = finish(folder, name, *arguments, code=2, prepare=prepare)
    (line,) = [one for one in said.splitlines() if one.startswith(f"gradmix-{name}: ")]
    return line


def as_an_ordinary_user() -> None:
    """Root without its capabilities: what modes forbid is forbidden."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(header, nothing):
        raise OSError("capset")


def with_files_of_at_most(size: int) -> Callable:
    """What a full disk is like, for files of more bytes."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def stopped_after(step: int) -> Callable:
    """Someone stops the training after that step."""
    return partial(_stop_after, step)


def _stop_after(step: int) -> None:
    from gradmix.ssl.guard import Guard

    start_of_step = Guard.on_before_backward

    def ask(self, trainer, module, loss):
        start_of_step(self, trainer, module, loss)
        if module.steps == step:
            self.received = 15

    Guard.on_before_backward = ask


def write_digits(folder: Path, per_class: int = 20) -> Path:
    """Files of digits, three classes in folders."""
    digits = load_digits()
    for label in range(3):
        (folder / f"class {label}").mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == label][:per_class]):
            Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"class {label}" / f"{number:02}.png")
    return folder
