"""What a person sees: a bar in a terminal, silence elsewhere, --help, Tab."""

import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
from itertools import pairwise
from types import SimpleNamespace

import pytest
import timm

from gradmix.eval.commands.help import settings
from gradmix.eval.config import ScoreConfig
from gradmix.ssl.callbacks import Progress
from gradmix.ssl.config import Config

QUICK = ("epochs=2", "batch_size=128", "encoder.width=4", "data.image_size=8", "knn_every=1", "pictures_every=0")
QUICK += ("trainer.accelerator=cpu", "run_dir=run")
SCRIPT = "from gradmix.eval.commands.pretrain import main; main()"


def test_a_terminal_shows_loss_knn_speed_and_time_left(started):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    process, shown = started(os.ttyname(theirs), "pretrain", *QUICK), b""
    while (ready := select.select([ours], [], [], 0.1)[0]) or process.is_alive():
        shown += os.read(ours, 65536) if ready else b""
    for end in (ours, theirs):
        os.close(end)
    assert process.exitcode == 0, shown.decode()
    bar = re.findall(r"training: +\d+%.*?\[\d\d:\d\d<\d\d:\d\d.*?\]", shown.decode())
    assert bar and re.search(r"loss=\d+\.\d+, (knn=[\d.]+%, )?img/s=\d+, took=\d\d:\d\d", bar[-1])  # also of two epochs
    assert "warn" not in shown.decode().lower()


def test_elsewhere_nothing_but_results(tmp_path):
    result = subprocess.run([sys.executable, "-c", SCRIPT, *QUICK], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\r" not in result.stdout and "deep_knn on pixels" in result.stdout


def training(steps):
    scalars = {"train/loss": SimpleNamespace(item=lambda: 1.5)}
    module = SimpleNamespace(start=0, steps=0, loader=range(steps), scalars=scalars)
    return module, SimpleNamespace(is_global_zero=True)


def test_after_five_steps_a_training_says_how_long_it_will_take(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("gradmix.ssl.callbacks.time.perf_counter", lambda: now)
    progress = Progress(images_per_step=10)
    module, trainer = training(1000)
    progress.on_train_start(trainer, module)
    for step in range(1, 8):
        module.steps, now = step, now + 10
        progress.on_train_batch_end(trainer, module, None, SimpleNamespace(epoch=0), step)
    told = capsys.readouterr().out
    assert "expected time: 2 h 45 min, measured over 5 steps" in told


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 16])
def test_the_time_that_a_training_will_take_is_that_of_its_slow_decoding(capsys, monkeypatch, workers):
    """Each worker decodes in turn, ten seconds a batch, and is two batches ahead of the training at most."""
    steps, ends, ready = 40 * workers, [0.0], []
    for step in range(steps):
        free = ready[step - workers] if step >= workers else 0.0
        asked = ends[step - 2 * workers] if step >= 2 * workers else 0.0
        ready.append(max(free, asked) + 10)
        ends.append(max(ends[-1], ready[-1]) + (0.1 if step else 60))
    now = 0.0
    monkeypatch.setattr("gradmix.ssl.callbacks.time.perf_counter", lambda: now)
    progress = Progress(images_per_step=10)
    progress.workers, progress.log_every_steps = workers, 10**6  # no curves
    module, trainer = training(steps)
    progress.on_train_start(trainer, module)
    said = ""
    while not said:
        module.steps += 1
        now = ends[module.steps]
        progress.on_train_batch_end(trainer, module, None, SimpleNamespace(epoch=0), 0)
        said = capsys.readouterr().out
    assert re.match(r"expected time: [^,]+, measured over \d+ steps", said)
    units = {"h": 3600, "min": 60, "s": 1}
    seconds = sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+) (h|min|s)\b", said.split(",")[0]))
    assert seconds == pytest.approx(ends[-1] - now, rel=0.03)
    assert progress.images_per_s == pytest.approx(workers, rel=0.03)  # 10 images in 10 seconds from each


@pytest.mark.parametrize(("seconds", "speed"), [(0.5, "20"), (2.5, "4.0")])
def test_elsewhere_a_line_every_ten_seconds_then_every_minute(capsys, monkeypatch, seconds, speed):
    now = 1000.0
    monkeypatch.setattr("gradmix.ssl.callbacks.time.perf_counter", lambda: now)
    progress = Progress(images_per_step=10)
    progress.log_every_steps = 10**6  # no curves
    steps = int(200 / seconds)
    module, trainer = training(steps)
    progress.on_train_start(trainer, module)
    said = [0.0]
    for step in range(1, steps + 1):
        module.steps, progress.knn, now = step, 87.5, now + seconds
        before = capsys.readouterr().err
        progress.on_train_batch_end(trainer, module, None, SimpleNamespace(epoch=0), step)
        line = before + capsys.readouterr().err
        if line:
            said.append(step * seconds)
            spoken = line
            if step < steps:
                left = int((steps - step) * seconds + 0.5)
                rest = rf"img/s {re.escape(speed)}, left 0\d:\d\d, until \d\d:\d\d\n"
                assert re.fullmatch(rf"step {step}/{steps}, loss 1\.500, knn 87\.5%, {rest}", line)
                minutes, rest = map(int, re.search(r"left (\d\d):(\d\d)", line).groups())
                assert abs(60 * minutes + rest - left) <= 1
    assert spoken.endswith(", took 03:20\n")  # the last one
    pauses = [later - earlier for earlier, later in pairwise(said)]
    assert all(pause <= 10 for pause, end in zip(pauses, said[1:], strict=True) if end <= 60)
    assert max(pauses) <= 60 and len(said) < 14


def test_help_has_a_line_for_every_option_and_key(command):
    text = command("pretrain", "--help").out
    for option in (
        "data=digits *",
        "data=imagefolder",
        "method=simclr",
        "mix=cutmix",
        "encoder=resnet50",
        "encoder=timm/NAME",
        "optimizer=lars",
    ):
        assert re.search(rf"^  {re.escape(option)} +\S+", text, re.M), option
    for one in settings(Config):
        assert re.search(rf"^  {re.escape(one.name)}=", text, re.M), one.name
    assert re.search(r"^  epochs=100 +passes over the training images$", text, re.M)
    assert re.search(r"^  optimizer.name=adam +optimizer \(adam \| adamw \| sgd \| lars\)$", text, re.M)
    assert all(len(line) <= 120 for line in text.splitlines())
    text = command("score", "-h").out
    assert all(re.search(rf"^  {one.name}=", text, re.M) for one in settings(ScoreConfig))


@pytest.mark.parametrize(
    ("name", "typed", "code"),
    [
        ("pretrain", "--help", 0),
        ("pretrain", "epochz=3", 2),
        ("pretrain", "epochs=0", 2),
        ("pretrain", "--shell-completion query=bash", 0),
        ("evaluate", "--help", 0),
        ("score", "detectr=1", 2),
        ("detector", "--help", 0),
        ("compare", "--help", 0),
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(name, typed, code):
    script = f"""
import sys
from gradmix.eval.commands.{name} import main
try:
    main()
    code = 0
except SystemExit as stop:
    code = stop.code
sys.exit(99 if "torch" in sys.modules else code)
"""
    environment = {**os.environ, "COMP_LINE": "gradmix-pretrain dat"}
    command = [sys.executable, "-c", script, *typed.split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("gradmix-pretrain dat", {"data=", "data."}),
        ("gradmix-pretrain data=ci", {"data=cifar10", "data=cifar100", "data=cifar_plus10", "data=cifar_plus50"}),
        ("gradmix-pretrain mix=res", {"mix=resizemix"}),
        ("gradmix-pretrain encoder=resnet1", {"encoder=resnet18", "encoder=resnet101"}),
        (
            "gradmix-pretrain encoder=timm/test_v",
            {f"encoder=timm/{name}" for name in timm.list_models("test_v*")},
        ),
        ("gradmix-pretrain epo", {"epochs="}),
        ("gradmix-pretrain data.unk", {"data.unknown_root=", "data.unknown_roots."}),
    ],
)
def test_tab_completes(command, monkeypatch, typed, offered):
    monkeypatch.setenv("COMP_LINE", typed)
    result = command("pretrain", "--shell-completion", "query=bash")
    assert set(shlex.split(result.out)) == offered


def test_the_completion_installs_itself(command):
    script = command("pretrain", "--shell-completion", "install=bash").out
    assert "complete -o nospace -o default -F hydra_bash_completion gradmix-pretrain" in script
