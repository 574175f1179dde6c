"""Configs and checkpoints of someone who means harm: nothing is executed, nothing written outside the run's folder."""

import contextlib
import os
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from gradmix.ssl.callbacks import Checkpoints

TINY = ("epochs=1", "batch_size=128", "encoder.width=4", "data.image_size=8", "knn_every=0", "pictures_every=0")


class Execute:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


OVERRIDES = [
    "+_target_=os.mkdir",
    "+method._target_=os.mkdir",
    "+data={_target_:os.mkdir,path:MARK}",
    "mix.options._target_=os.mkdir",
    "mix.options={_target_:os.mkdir,path:MARK}",
    "detector_options.deep_knn._target_=os.mkdir",
    "detector_options.deep_knn={_target_:os.mkdir,path:MARK}",
    "trainer._target_=os.mkdir",
    "trainer.callbacks=[{_target_:os.mkdir,path:MARK}]",
    "trainer.plugins=[{_target_:os.mkdir,path:MARK}]",
    "trainer.logger=true",
    "trainer.default_root_dir=MARK",
    "trainer.enable_checkpointing=true",
    "+hydra.callbacks.evil={_target_:os.mkdir,path:MARK}",
    "++hydra.launcher._target_=os.mkdir",
    "hydra/launcher=evil",
    "hydra.run.dir=MARK",
    "hydra.searchpath=[file://EVIL]",
    "--experimental-rerun=EVIL.pickle",
    "encoder.init=EVIL.pickle",
    "data.name=../../MARK",
]


@pytest.mark.parametrize("override", OVERRIDES)
def test_hostile_overrides(override, command, tmp_path):
    mark, evil = tmp_path / "executed", tmp_path / "evil"
    (tmp_path / "evil.pickle").write_bytes(pickle.dumps(Execute(mark)))
    before = sorted(tmp_path.iterdir())
    result = command("pretrain", *TINY, "run_dir=run", override.replace("MARK", str(mark)).replace("EVIL", str(evil)))
    assert result.code == 2, result.err
    assert len(result.err.strip().splitlines()) == 1 and "Traceback" not in result.err
    assert sorted(path for path in tmp_path.iterdir() if path.name != "run") == before


RUN = (*TINY, "trainer.accelerator=cpu", "checkpoint_seconds=0", "run_dir=run")


@pytest.fixture
def stopped(command, monkeypatch, tmp_path):
    """A run as it was after four of its five steps, its newest checkpoint, and the weights that it ended with."""
    save = Checkpoints.save

    def save_and_copy(self, trainer, module):
        save(self, trainer, module)
        if module.steps == 4:
            shutil.copytree("run", "stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_copy)
        assert command("pretrain", *RUN).code == 0
    weights = load_file(tmp_path / "run/backbone.safetensors")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "stopped").rename(tmp_path / "run")
    return torch.load(tmp_path / "run/checkpoints/step-00000004.ckpt", weights_only=True), weights


def saved(value):
    return lambda path, state: torch.save(value(state), path)


def bomb(path, state):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26))


def changed(part, name, value):
    """A checkpoint with one value exchanged."""

    def change(state):
        inner = state[part] if part else state
        inner[name] = value(inner[name]) if callable(value) else value
        return state

    return saved(change)


# What is written as newer checkpoints, all of which are passed over.
PASSED_OVER = {
    "a pickle that executes": lambda path, state: path.write_bytes(pickle.dumps(Execute("executed"))),
    "a torch file that executes": saved(lambda state: state | {"module": Execute("executed")}),
    "executes beside the weights": saved(lambda state: state | {"x": Execute("executed")}),
    "a page": lambda path, state: path.write_text("<html>404</html>"),
    "nothing": lambda path, state: path.write_bytes(b""),
    "a zip bomb": bomb,
    "a list": saved(lambda state: [1, 2, 3]),
    "a path as its step": changed(None, "step", "../../../executed"),
    "not a number": changed("module", "backbone.conv1.weight", lambda weight: weight * float("nan")),
}
# What makes the command refuse.
REFUSED = {
    "another network": changed("module", "backbone.conv1.weight", lambda weight: weight[:1]),
    "another optimizer": changed("optimizer", "param_groups", []),
    "other images": changed(None, "images", "0" * 64),
}


def write_checkpoint(write, path, state, step):
    path.unlink(missing_ok=True)
    write(path, {**state, "step": step, "module": dict(state["module"]), "optimizer": dict(state["optimizer"])})


def test_hostile_checkpoints_are_passed_over(stopped, command, tmp_path, monkeypatch):
    """One above the other, each newer than that of the third step: had one been taken, the run had gone on from it."""
    state, weights = stopped
    written = [tmp_path / f"run/checkpoints/step-{step:08}.ckpt" for step, _ in enumerate(PASSED_OVER, start=4)]
    for step, (path, write) in enumerate(zip(written, PASSED_OVER.values(), strict=True), start=4):
        write_checkpoint(write, path, state, step)
    resumed = []
    start = Checkpoints.on_train_start
    monkeypatch.setattr(Checkpoints, "on_train_start", lambda self, *a: (resumed.append(self.resume), start(self, *a)))
    with pytest.warns(UserWarning, match="damaged checkpoint skipped") as warned:
        result = command("pretrain", *RUN)
    told = [str(warning.message) for warning in warned]
    for path, kind in zip(written, PASSED_OVER, strict=True):
        assert any(path.name in text for text in told), kind
    assert result.code == 0, result.err
    assert resumed[0]["step"] == 3
    ended = load_file(tmp_path / "run/backbone.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in ended.items())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_hostile_checkpoints_are_refused(stopped, command, tmp_path):
    state, _ = stopped
    for kind, write in REFUSED.items():
        write_checkpoint(write, tmp_path / "run/checkpoints/step-00000004.ckpt", state, 4)
        result = command("pretrain", *RUN)
        assert result.code == 2 and "run" in result.err, kind
        assert not (tmp_path / "run/backbone.safetensors").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


EVIL_FILES = {
    "data/mine.yaml": [
        "hydra: {callbacks: {evil: {_target_: os.mkdir, path: MARK}}}",
        "hydra: {job_logging: {version: 1, handlers: {evil: {(): os.mkdir, path: MARK}}, root: {handlers: [evil]}}}",
        "hydra: {hydra_logging: {version: 1, handlers: {evil: {(): os.mkdir, path: MARK}}, root: {handlers: [evil]}}}",
        "hydra: {run: {dir: MARK}}",
        "hydra: {job: {chdir: true}, run: {dir: MARK}}",
        "hydra: {launcher: {_target_: os.mkdir}}",
        "hydra: {job: {env_set: {LD_PRELOAD: MARK}}}",
        "data: {name: digits, root: '${oc.env:HOME}'}",
        "mix: {options: {_target_: os.mkdir, path: MARK}}",
        "data: {name: digits, root: '${data.unknown_root}', unknown_root: '${method.name}'}",
    ],
    "hydra/callbacks/evil.yaml": ["evil: {_target_: os.mkdir, path: MARK}"],
}
NAMED = "# @package _global_\nseed: 3\n"


def write_config_dir(folder, place, text, mark):
    (folder / place).parent.mkdir(parents=True)
    (folder / place).write_text(NAMED + text.replace("MARK", str(mark)) + "\n")


@pytest.mark.parametrize(("place", "text"), [(place, text) for place, texts in EVIL_FILES.items() for text in texts])
@pytest.mark.parametrize("flags", [(), ("--multirun",), ("--cfg=job",)], ids=["run", "multirun", "cfg"])
def test_config_dir_of_a_stranger(place, text, flags, command, tmp_path):
    mark, conf = tmp_path / "executed", tmp_path / "conf"
    if place.startswith("hydra"):
        write_config_dir(conf, "data/mine.yaml", "defaults: [{override /hydra/callbacks: evil}]", mark)
        (conf / place).parent.mkdir(parents=True)
        (conf / place).write_text("# @package hydra.callbacks\n" + text.replace("MARK", str(mark)))
    else:
        write_config_dir(conf, place, text, mark)
    result = command("pretrain", f"--config-dir={conf}", *flags, *TINY, "data=mine", "run_dir=run")
    assert result.code == 2, result
    assert len(result.err.strip().splitlines()) == 1 and "Traceback" not in result.err
    if not place.startswith("hydra"):
        assert re.search(r"set by a file of --config-dir|names no code|is filled in", result.err), result.err
        assert "hydra.mode" not in result.err  # that is Hydra's own
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


@pytest.mark.parametrize("flags", [(), ("--multirun",)], ids=["run", "multirun"])
def test_a_harmless_config_dir(flags, command, tmp_path):
    """The control: so far the command gets with a file that only has values."""
    write_config_dir(tmp_path / "conf", "data/mine.yaml", "data: {name: digits, split: '${mix.attribution_every}'}", "")
    result = command("pretrain", f"--config-dir={tmp_path / 'conf'}", *flags, *TINY, "data=mine", "data.known=[77]")
    assert result.code == 2 and result.err.startswith("gradmix-pretrain: data.known: 77 is no class"), result.err
    assert {path.name for path in tmp_path.iterdir()} <= {"conf", "runs"}  # no multirun.yaml


@pytest.mark.parametrize("name", ["eval", "score", "embed"])
def test_multirun_of_other_commands_leaves_nothing_beside(name, command, tmp_path):
    command(name, "--multirun")
    assert list(tmp_path.iterdir()) == []


def test_the_evil_callback_runs_where_nobody_looks(command, tmp_path, monkeypatch):
    """The control: without the check the canary fires."""
    monkeypatch.setattr("gradmix.eval.commands.command_line.configs_are_checked", contextlib.nullcontext)
    mark, conf = tmp_path / "executed", tmp_path / "conf"
    write_config_dir(conf, "data/mine.yaml", EVIL_FILES["data/mine.yaml"][0], mark)
    command("pretrain", f"--config-dir={conf}", *TINY, "data=mine", "run_dir=run", "epochs=-1")
    assert mark.is_dir()
