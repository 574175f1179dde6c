"""A tiny digits run in a process of its own, forked from one that has imported everything: as mortal as any other."""

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import gradmix.eval.report
import gradmix.ssl.callbacks
import gradmix.ssl.runs.files
import gradmix.ssl.train
from gradmix.eval.commands.pretrain import main
from gradmix.eval.detectors import DeepKNN
from gradmix.eval.protocols.online import OnlineKNN
from gradmix.ssl.callbacks import Checkpoints
from gradmix.ssl.pretrain import Pretraining
from gradmix.ssl.runs.files import write_text

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
ARGUMENTS = (
    *("epochs=3", "batch_size=128", "encoder.width=4", "data.image_size=8", "trainer.accelerator=cpu"),
    *("knn_every=1", "pictures_every=0", "detectors=[deep_knn]", "checkpoint_seconds=0"),
)
STEPS = 15
DONE, SAVED, RESUMED, HIT = range(4)  # what a run tells on its board: steps; HIT, when trouble struck, in ns


@dataclass
class Trouble:
    """A signal that a run sends to itself, ``delay`` seconds after it has entered a place for the ``count``-th time."""

    place: str
    signal: int
    count: int = 1
    delay: float = 0.0

    def install(self, board: np.memmap) -> None:
        owner, name = {
            "training": (Pretraining, "training_step"),
            "validation": (OnlineKNN, "accuracy"),
            "FAISS fit": (DeepKNN, "fit"),
            "checkpoint": (gradmix.ssl.callbacks, "write_atomically"),
            "results": (gradmix.ssl.runs.files, "save_file"),
        }[self.place]
        enter = getattr(owner, name)

        def strike() -> None:
            time.sleep(self.delay)
            board[HIT] = time.monotonic_ns()
            os.kill(os.getpid(), self.signal)

        def entered(*arguments, **options):
            self.count -= 1
            if self.count == 0:
                threading.Thread(target=strike, daemon=True).start()
            return enter(*arguments, **options)

        setattr(owner, name, entered)


def work(folder: Path, environment: dict[str, str], arguments: tuple[str, ...], trouble: Trouble | None) -> None:
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= environment
    tempfile.tempdir = None
    torch.set_num_threads(1)
    board = np.memmap(folder / "board", np.int64, "r+", shape=(4,))
    tell(board)
    if trouble is not None:
        trouble.install(board)
    # Half of the time of so small a run would be its report, which nothing depends on.
    gradmix.eval.report.write_report = lambda run_dir, data: write_text(run_dir / "report.html", "left out")
    sys.argv = ["gradmix-pretrain", *ARGUMENTS, *arguments]
    main()


def tell(board: np.memmap) -> None:
    start, end, save = Checkpoints.on_train_start, Checkpoints.on_train_batch_end, Checkpoints.save

    def on_train_start(self, trainer, module):
        board[RESUMED] = board[DONE] = board[SAVED] = module.start
        start(self, trainer, module)

    def on_train_batch_end(self, trainer, module, *rest):
        board[DONE] = module.steps
        end(self, trainer, module, *rest)

    def save_and_tell(self, trainer, module):
        save(self, trainer, module)
        board[SAVED] = module.steps

    Checkpoints.on_train_start, Checkpoints.on_train_batch_end = on_train_start, on_train_batch_end
    Checkpoints.save = save_and_tell


@dataclass
class Run:
    """A run's folder ``folder/run`` and what its processes told."""

    folder: Path
    environment: dict[str, str]

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run_dir = self.folder / "run"
        self.board = np.memmap(self.folder / "board", np.int64, "w+", shape=(4,))

    def start(self, trouble: Trouble | None = None, arguments: tuple[str, ...] = ("run_dir=run",)):
        process = CONTEXT.Process(target=work, args=(self.folder, self.environment, arguments, trouble))
        process.start()
        return process

    def finish(self, timeout: float = 300) -> float:
        """Let it run to its end; seconds that took."""
        began = time.monotonic()
        process = self.start()
        process.join(timeout)
        assert process.exitcode == 0, self.log()
        return time.monotonic() - began

    def log(self) -> str:
        return (self.folder / "log").read_text()[-3000:]

    def strays(self) -> list[Path]:
        return [path for path in self.run_dir.rglob("*") if "tmp" in path.name]

    def hashes(self) -> dict[str, str]:
        paths = (self.run_dir / "checkpoints").glob("step-*.ckpt")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def metrics(self) -> dict:
        return json.loads((self.run_dir / "metrics.json").read_text())

    def weights(self) -> dict[str, torch.Tensor]:
        names = ("backbone.safetensors", "head.safetensors")
        return {f"{name} {key}": value for name in names for key, value in load_file(self.run_dir / name).items()}

    def assert_like(self, other: "Run") -> None:
        """It ended as if nothing had happened: weights bit for bit, numbers but for times, no strays."""
        mine, theirs = self.weights(), other.weights()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        differ = ("train/seconds", "train/images_per_s", "train/resumed_from_step", "git/revision")
        numbers = [{k: v for k, v in run.metrics().items() if k not in differ} for run in (self, other)]
        assert numbers[0] == numbers[1]
        assert not self.strays()
        assert (self.run_dir / "report.html").is_file()


def newest_step(run: Run) -> int:
    """Of what the next process will find; 0 where there is no checkpoint."""
    return max((int(name[5:13]) for name in run.hashes()), default=0)
