"""Whose a run's folder is, and which classes its model knows."""

import json
import re
import subprocess
import sys
from threading import Timer

import pytest
import torch
from safetensors.torch import save_file

import gradmix.ssl.run
from gradmix.ssl.run import alone_in, check_classes, claim


def saved(folder, classes):
    header = {} if classes is None else {"classes": json.dumps(classes)}
    save_file({"conv1.weight": torch.zeros(1)}, folder / "backbone.safetensors", header)
    return folder


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (["cat", "dog"], "missing: emu;"),
        (["ant", "cat", "dog", "emu"], "extra: ant;"),
        (["cat", "doggy", "emu"], "renamed: dog to doggy;"),
        (["cat", "cow", "owl", "dog"], "missing: emu; extra: cow, owl;"),
        (["cat", "emu", "dog"], "in another order;"),
        ([], "missing: cat, dog, emu;"),
    ],
)
def test_other_classes_are_named(tmp_path, now, told):
    folder = saved(tmp_path, ["cat", "dog", "emu"])
    check_classes(folder, ["cat", "dog", "emu"])
    with pytest.raises(ValueError, match="with; " + re.escape(told)):
        check_classes(folder, now)


def test_weights_from_elsewhere_say_nothing_of_classes(tmp_path):
    check_classes(saved(tmp_path, None), ["cat"])


def test_a_folder_belongs_to_one_config(tmp_path, config):
    claim(tmp_path, config(tmp_path))
    claim(tmp_path, config(tmp_path, checkpoint_seconds=7, on_nonfinite="skip"))
    with pytest.raises(ValueError, match=r"epochs is 2 there and 3 here; seed is 0 there and 4 here"):
        claim(tmp_path, config(tmp_path, epochs=3, seed=4))
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.system ['touch executed']\n")
    with pytest.raises(ValueError, match=r"config\.yaml: not a config"):
        claim(tmp_path, config(tmp_path))


HOLD = """
import sys, time
from pathlib import Path
from gradmix.ssl.run import alone_in
with alone_in(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "config.yaml").touch()
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_write_one_run(tmp_path, monkeypatch):
    folder = tmp_path / "runs/one"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(gradmix.ssl.run, "PATIENCE", 0.3)
        with pytest.raises(ValueError, match=r"runs/one: another process is writing there"), alone_in(folder):
            pytest.fail("both are in")
        with alone_in(tmp_path / "runs/two"):
            pass
        holder.kill()
    with alone_in(folder):  # a killed one leaves nothing behind
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]  # two stayed empty


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"run_dir: .*file: can't be made \(File exists\)"),
        alone_in(tmp_path / "file"),
    ):
        pass


def test_who_waits_gets_the_folder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        Timer(0.5, holder.kill).start()
        with alone_in(tmp_path):
            assert holder.wait(10) != 0
