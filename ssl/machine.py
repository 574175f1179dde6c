"""What this machine has to give, and whether a run can fit, before it starts. Estimates are from below."""

import copy
import os
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from gradmix.ssl.config import Config

STATES = {"adam": 2, "adamw": 2}  # what an optimizer keeps per weight; 1 for the others
GIB = 2**30
GROUP = Path("/sys/fs/cgroup")  # this process's container
MOST_DECODERS = 16  # a few feed any card
LONG = 3600  # seconds of a training on a CPU from which on it says what is quicker


def usable_cpus() -> int:
    """CPUs that this process may use: schedulers and containers often allow fewer than there are."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, (GROUP / "cpu.max").read_text().split())
    except (OSError, ValueError):  # no such file, or "max"
        return cpus
    return max(1, min(cpus, -(-quota // period)))


def decoders(asked: int | None, processes: int = 1) -> int:
    """Processes that decode images for one of the ``processes`` that train on this machine.

    Args:
        asked: ``data.workers``; None: what the machine has, shared, and at most 16, for each holds two batches.
    """
    cpus = usable_cpus()
    return min(MOST_DECODERS, max(1, cpus // processes)) if asked is None else min(asked, cpus)


def free_memory() -> int | None:
    """Bytes of main memory that this process can still take, within its container's limit; None where unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        taken, limit = (int((GROUP / f"memory.{name}").read_text()) for name in ("current", "max"))
        kept = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        found += [limit - taken + int(kept.get("inactive_file", 0))]  # copies of files, which give way
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return min(found, default=None)


def check_limits(config: Config, network: nn.Module, images: int, num_features: int) -> str:
    """What a step takes, in words, if everything fits.

    Args:
        network: images ``[N, 3, S, S]`` to projections.
        images: in all sets.
        num_features: F, of the backbone.

    Raises:
        ValueError: checkpoints, features or a batch take more than is free; the message says how much.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    features = 4 * images * (num_features + config.encoder.head_dim)
    checkpoint = weights * (1 + STATES.get(config.optimizer.name, 1))
    # two checkpoints and the one being written; the backbone again for the run and for each detector; features twice
    needed = 3 * checkpoint + (1 + len({"deep_knn", config.primary, *config.detectors})) * weights + 2 * features
    _check("run_dir: the run's files", needed, shutil.disk_usage(_existing(Path(config.run_dir))).free, "on the disk")

    memory = free_memory()
    hint = "a narrower encoder has shorter features"
    _check(f"data: the features of {images} images", features, memory, "in memory", hint)

    on_gpu = torch.cuda.is_available() and config.trainer.get("accelerator", "auto") != "cpu"
    places = config.trainer.get("num_nodes", 1) * (gpus_of(config) if on_gpu else 1)
    views = (2 if config.mix.name == "none" else 4) * config.batch_size // places  # the mixed ones have a graph too
    views = min(views, config.speed.micro_batch or views)
    half = "16" in str(precision(config))
    assert config.data.image_size is not None  # chosen by the images, when they were listed
    batch = views * activation_bytes(network, config.data.image_size) // (2 if half else 1)
    free = torch.cuda.mem_get_info(own_gpu(config))[0] if on_gpu else memory
    hint = "try a smaller batch_size, or speed.micro_batch"
    _check(f"batch_size: the activations of {views} views", batch, free, "on the device", hint)
    return f"a step of {config.batch_size} images takes at least {batch / GIB:.2f} GiB" + (
        f" of {free / GIB:.2f} GiB free" if free is not None else ""
    )


def check_queue(batch_bytes: int, workers: int) -> None:
    """
    Args:
        batch_bytes: what a worker hands over at a time; two of them lie in shared memory for each worker.
        workers: of all processes on this machine, which share it.

    Raises:
        ValueError: shared memory is too small for them; a process that runs out of it dies without a word.
    """
    shared = Path("/dev/shm")
    if workers and shared.is_dir():
        hint = "try fewer data.workers (0: none), a smaller batch_size, or more of it (docker run --shm-size=8g)"
        what, free = f"data.workers: what {workers} workers hold ready", shutil.disk_usage(shared).free
        _check(what, 2 * workers * batch_bytes, free, "in /dev/shm", hint)


def pick_device(asked: str = "auto") -> str:
    """``cpu``, ``cuda`` or ``mps``; ``auto`` is the GPU that CUDA sees, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[asked]:
        found = ", ".join(name for name, available in there.items() if available)
        raise ValueError(f"device: torch finds no {asked} on this machine (there is {found}); auto takes what there is")
    return asked


def gpus_of(config: Config) -> int:
    """How many of this machine's GPUs a run takes; at least one."""
    asked = config.trainer.get("devices", "auto")
    if isinstance(asked, list):
        return max(1, len(asked))
    return asked if isinstance(asked, int) and asked > 0 else max(1, torch.cuda.device_count())


def own_gpu(config: Config) -> int:
    """The GPU that Lightning will give this process. Asked of another one, CUDA would keep memory there for good."""
    place = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    devices = config.trainer.get("devices")
    return devices[place] if isinstance(devices, list) and place < len(devices) else place % torch.cuda.device_count()


def precision(config: Config) -> str:
    """What ``trainer.precision=auto`` means here: bfloat16 autocast on GPUs that have it, float32 everywhere else."""
    asked = config.trainer.get("precision", "auto")
    if asked != "auto":
        return asked
    on_gpu = torch.cuda.is_available() and config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def check_device(config: Config) -> None:
    """
    Raises:
        ValueError: float16 on a CPU, where Lightning would take bfloat16 without saying so in the results; mixing on
            Apple's GPU with a torch that lacks two operations there.
    """
    where, asked = config.trainer.get("accelerator", "auto"), str(precision(config))
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    on_cpu = where == "cpu" or (where == "auto" and not cuda and not mps)
    if on_cpu and asked in ("16-mixed", "16"):
        raise ValueError(f"trainer.precision: {asked} needs a GPU; bf16-mixed is the half precision of CPUs")
    on_mps = mps and (where == "mps" or (where in ("auto", "gpu") and not cuda))
    if on_mps and config.mix.name != "none" and torch.__version__ < "2.13":
        raise ValueError(
            f"trainer.accelerator: mixing on Apple's GPU needs torch 2.13 or newer, this is {torch.__version__}; "
            "update torch, or give trainer.accelerator=cpu or mix=none"
        )


def activation_bytes(network: nn.Module, image_size: int) -> int:
    """Bytes of float32 that one image leaves for the backward pass; computed without computing (meta tensors)."""
    network = copy.deepcopy(network).to("meta").train()

    def kept(images: int) -> int:
        storages: set[torch.UntypedStorage] = set()

        def pack(tensor: Tensor) -> Tensor:
            storages.add(tensor.untyped_storage())  # the same object for all views of one tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = network(torch.empty(images, 3, image_size, image_size, device="meta"))
        del out
        return sum(storage.nbytes() for storage in storages)

    return (kept(4) - kept(2)) // 2  # what does not grow with the batch is the weights


def seconds_per_view(network: nn.Module, image_size: int) -> float:
    """Seconds of one view's forward and backward pass on one CPU, measured on a copy of the network."""
    network, views = copy.deepcopy(network).train(), max(2, min(64, 2 * 224**2 // image_size**2))
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # of several, each would wait for those that other processes hold up
    try:
        with torch.random.fork_rng(devices=[]):
            for _ in range(2):  # the first one warms caches up
                start = time.perf_counter()
                network(torch.zeros(views, 3, image_size, image_size)).sum().backward()
                seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(seconds) / views


def least_time(config: Config, network: nn.Module, image_size: int, steps: int, processes: int) -> str | None:
    """What so many steps will take on this CPU at the least, in words.

    None where that is less than a minute, and where a pass in float32 does not tell.

    Args:
        network: images ``[N, 3, S, S]`` to projections.
        processes: that share each batch.
    """
    if config.speed.compile or precision(config) not in ("32-true", "32"):
        return None
    mix = config.mix
    always = mix.name != "none" and mix.probability == 1 and mix.start_epoch == 0 and mix.end_epoch is None
    views = (4 if always else 2) * config.batch_size // processes  # mixed ones pass through the network too
    seconds = steps * views * seconds_per_view(network, image_size) / torch.get_num_threads()
    if seconds < 60:
        return None
    hint = f"; quicker: {', '.join(quicker(config, image_size))}" if seconds >= LONG else ""
    return f"expected time: {duration(seconds)} or more on this CPU{hint}"


def duration(seconds: float) -> str:
    """In words: 3:55 could be minutes or hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def quicker(config: Config, image_size: int) -> list[str]:
    """Settings that make a long training on a CPU shorter."""
    width = None if config.encoder.init else config.encoder.width or 64  # weights from elsewhere fix it
    wide = config.encoder.name.startswith("resnet") and width is not None and width > 16
    return [
        *(["data.image_size=64"] if image_size > 64 else []),
        *(["encoder.width=16"] if wide else []),
        *(["mix=none"] if config.mix.name != "none" else []),
        "fewer epochs=",
    ]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _check(what: str, needed: int, free: int | None, where: str, hint: str = "") -> None:
    if free is not None and needed > free:
        raise ValueError(
            f"{what} need at least {needed / GIB:.2f} GiB, {free / GIB:.2f} GiB are free {where}"
            + (f"; {hint}" if hint else "")
        )
