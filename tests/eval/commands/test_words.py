"""Words of other tools name the key that does it here."""

import pytest

from gradmix.eval.commands.words import WORDS, key_for
from gradmix.eval.config import DetectorConfig, EvalConfig, ScoreConfig
from gradmix.ssl.config import Config
from gradmix.ssl.keys import keys_of


@pytest.mark.parametrize("name", WORDS)
def test_every_key_of_the_table_is_one(name):
    known = [one for schema in (Config, EvalConfig, ScoreConfig, DetectorConfig) for one in keys_of(schema)]
    assert any(
        one == name or one.startswith(f"{name}.") or name.startswith(("trainer.", "mix.options.")) for one in known
    )
    for schema in (Config, EvalConfig, ScoreConfig, DetectorConfig):
        for word in WORDS[name].split():
            told = key_for(word, schema)
            assert told is None or "does it" in told or "do it" in told


@pytest.mark.parametrize(
    ("name", "typed", "key"),
    [
        ("pretrain", "lr=0.1", "optimizer.base_lr=VALUE does it: for a batch of 256"),
        ("pretrain", "lr", "optimizer.base_lr=VALUE does it"),
        ("pretrain", "--lr", "optimizer.base_lr=VALUE does it"),
        ("pretrain", "--batch-size=3", "batch_size=VALUE"),
        ("pretrain", "optimizer.lr=0.1", "optimizer.base_lr=VALUE does it"),
        ("pretrain", "model=resnet50", "encoder=NAME does it"),
        ("pretrain", "arch=resnet50", "encoder=NAME does it"),
        ("pretrain", "pretrained=true", "encoder.init=VALUE does it"),
        ("pretrain", "wandb=true", "trainer.logger=tensorboard|wandb|mlflow|csv does it"),
        ("pretrain", "gpus=2", "trainer.devices=VALUE does it"),
        ("pretrain", "bs=32", "batch_size=VALUE does it"),
        ("pretrain", "num_workers=2", "data.workers=VALUE does it"),
        ("pretrain", "imgsz=32", "data.image_size=VALUE does it"),
        ("pretrain", "temperature=0.1", "method.temperature=VALUE does it"),
        ("pretrain", "dataset=digits", "data=NAME does it"),
        ("eval", "pretrained=a.pth", "checkpoint=VALUE does it"),
        ("detector", "label=cat", "class_name=VALUE does it"),
        ("score", "model=run", "detector=VALUE does it"),
        ("pretrain", "epocs=3", "did you mean epochs?"),
    ],
)
def test_a_word_of_another_tool(command, name, typed, key):
    result = command(name, typed)
    assert result.code == 2
    assert key in result.err and len(result.err.splitlines()) == 1, result.err
