"""A tiny digits run for the tests that train."""

import pytest

from gradmix.ssl.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EncoderConfig,
    MethodConfig,
    MixConfig,
    OptimizerConfig,
)
from gradmix.ssl.data.open_set import load_data


@pytest.fixture(scope="session")
def config():
    return tiny


@pytest.fixture(scope="session")
def data():
    return load_data(tiny("unused").data, 0)


def tiny(run_dir, method="joint", mix="gradmix", **changes):
    weights = {"simclr": (0.0, 1.0), "supcon": (1.0, 0.0), "joint": (1.0, 1.0), "sphor": (0.0, 0.0, 1.0)}[method]
    inner = {"supcon": "supervised", "sphor": "targets"}.get(method, "selfsup")
    return Config(
        run_dir=str(run_dir),
        epochs=changes.pop("epochs", 2),
        batch_size=128,
        data=DataConfig(name="digits", image_size=8, split=0, augment=AugmentConfig(flip=0)),
        method=MethodConfig(method, *weights, mixed_loss=inner, attribution=inner),
        mix=MixConfig(mix, **changes.pop("mixing", {})),
        encoder=EncoderConfig("resnet18", width=4),
        optimizer=changes.pop("optimizer", OptimizerConfig("adam")),
        trainer={"accelerator": "cpu"},
        **changes,
    )
