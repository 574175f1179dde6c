"""Whose a run's folder is, and which classes its model knows."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from gradmix.ssl.runs.folder import check_classes, claim, read_config


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
    (tmp_path / "head.safetensors").touch()  # it got somewhere
    claim(tmp_path, config(tmp_path, checkpoint_seconds=7, on_nonfinite="skip"))
    with pytest.raises(ValueError, match=r"epochs is 2 there and 3 here; seed is 0 there and 4 here"):
        claim(tmp_path, config(tmp_path, epochs=3, seed=4))
    elsewhere, otherwise = config(tmp_path), config(tmp_path)
    elsewhere.trainer |= {"devices": 1, "strategy": "ddp"}  # where it computes is free
    claim(tmp_path, elsewhere)
    otherwise.trainer |= {"accumulate_grad_batches": 4}  # what it computes is not
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches is None there and 4 here"):
        claim(tmp_path, otherwise)
    (tmp_path / "head.safetensors").unlink()
    claim(tmp_path, config(tmp_path, epochs=3))  # only a failed start
    assert read_config(tmp_path).epochs == 3
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.system ['touch executed']\n")
    with pytest.raises(ValueError, match=r"config\.yaml: not a config"):
        claim(tmp_path, config(tmp_path))
