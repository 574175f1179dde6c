import fcntl
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

# torch takes seconds, and not every process of the tests needs it: functions import it.
ROOT = Path(__file__).parent.parent
CACHE = pytest.StashKey[str]()
# Who runs the tests in the background or under nohup ignores these, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Processes of "forkserver" start from one that has imported these (seconds), and has nothing else of this one.
multiprocessing.set_forkserver_preload(["gradmix.eval.commands.work.pretrain", "pytest"])


def pytest_configure(config):
    """A cache of the tests' own, not the user's: one for all processes, which the first one takes away at the end."""
    if not hasattr(config, "workerinput"):
        config.stash[CACHE] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="gradmix-tests-")


def pytest_unconfigure(config):
    if CACHE in config.stash:
        shutil.rmtree(config.stash[CACHE], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--stress", action="store_true", help="also collect tests/stress (long)")
    parser.addoption("--stress-share", type=float, default=1.0, help="share of the stress cases to run, to rehearse")


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name == "stress" and not config.getoption("--stress") else None


def pytest_terminal_summary(terminalreporter):
    """What the tests ran on, at the end, for whoever reads a log of another machine."""
    import torch

    from gradmix.ssl.machine import usable_cpus

    lines = [line.partition(":")[::2] for line in _cpuinfo()]
    about = {name.strip(): value.strip() for name, value in lines}  # of the last CPU
    model, flags = about.get("model name", platform.machine()), about.get("flags", "").split()
    instructions = next((name for name in ("avx512f", "avx2") if name in flags), "no AVX2")
    terminalreporter.write_line(
        f"ran on: Python {platform.python_version()}, torch {torch.__version__}, {model} ({instructions}), "
        f"{usable_cpus()} CPUs, {torch.get_num_threads()} threads a process, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"
    )


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="session")
def start_processes():
    """start_processes(function, arguments, n): n processes, each calling function(rank, *arguments); ends with them."""
    import torch

    def start(function, arguments, count):
        processes = torch.multiprocessing.start_processes(
            function, arguments, count, join=False, start_method="forkserver"
        )
        try:
            while not processes.join():
                pass
        finally:
            for process in processes.processes:  # nobody waits for one that hangs, after the test's time is up
                process.kill()

    return start


@pytest.fixture
def in_processes(start_processes, tmp_path):
    """in_processes(function, n): n processes of one gloo group, each calling function(rank, tmp_path)."""

    def run(function, count):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        start_processes(_in_a_group, (count, meeting, function, tmp_path), count)

    return run


def _in_a_group(rank, count, meeting, function, folder):
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    function(rank, folder)
    # All meet, then each process just ends. destroy_process_group() can wait for ever in torch 2.6: it keeps
    # the lock of Python while it waits for a thread of gloo that needs this lock to give a tensor back.
    torch.distributed.barrier()


@pytest.fixture
def damage():
    """damage(saved, damaged, generator): a copy of a folder with one file cut short, or one of its bits flipped."""

    def copy(saved, damaged, generator):
        shutil.copytree(saved, damaged, dirs_exist_ok=True)
        path = generator.choice(sorted(damaged.iterdir()))
        content = bytearray(path.read_bytes())
        if generator.random() < 0.5:
            content = content[: generator.integers(len(content))]
        else:
            content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        path.write_bytes(content)

    return copy


@pytest.fixture
def benchmarks(monkeypatch):
    """The scripts in benchmarks/ can be imported; afterwards they are gone."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (ROOT / "benchmarks" / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def files_up_to():
    """files_up_to(room): a context in which no file grows beyond so many bytes, as on a disk that fills up."""

    @contextmanager
    def limited(room):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run one of the commands in this process, in an empty folder: command("pretrain", "epochs=1", ...)."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        code = typed(name, *arguments)
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


def typed(name, *arguments):
    """The exit code of one of the commands, run in this process."""
    from gradmix.eval.commands import compare, detector, embed, evaluate, pretrain, score

    modules = {
        "pretrain": pretrain,
        "eval": evaluate,
        "embed": embed,
        "score": score,
        "detector": detector,
        "compare": compare,
    }
    with _quick_evaluation(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "0")
        patch.setattr(sys, "argv", [f"gradmix-{name}", *map(str, arguments)])
        try:
            modules[name].main()
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture
def started(tmp_path):
    """started(output, "pretrain", "epochs=1", ...): the process of a command in an empty folder, which writes to a file
    or terminal. Unlike a new Python it has nothing to import.
    """
    context, processes = multiprocessing.get_context("forkserver"), []

    def start(output, name, *arguments):
        processes.append(context.Process(target=_typed_there, args=(tmp_path, output, name, *arguments)))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def _typed_there(folder, output, name, *arguments):
    os.setsid()
    os.chdir(folder)
    shown = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY)
    for stream in (1, 2):
        os.dup2(shown, stream)
    sys.exit(typed(name, *arguments))


@contextmanager
def _quick_evaluation():
    """Linear probes train for fewer steps, and maps show fewer images. Tests of these two have them whole."""
    from gradmix.eval.classifiers import linear
    from gradmix.eval.report import feature_map

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LEAST_STEPS", 200)
        patch.setattr(feature_map, "POINTS", 100)
        yield


@pytest.fixture(scope="module")
def quick_evaluation():
    """The same for what a test calls without a command."""
    with _quick_evaluation():
        yield


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A small finished run, the same for all processes of pytest. Read only; tests that change it take a copy."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "digits"
    folder.mkdir(exist_ok=True)
    words = ("epochs=2", "encoder.width=4", "knn_every=1", "pictures_every=1", "trainer.accelerator=cpu")
    with open(folder / "lock", "w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.chdir(folder)
        assert typed("pretrain", *words, "run_dir=run") == 0  # finished already: nothing is done
    return folder / "run"
