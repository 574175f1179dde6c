"""Numbers of a config that make no sense, refused before anything is read. Needs no torch, so it answers at once."""

from dataclasses import asdict
from typing import Any

from gradmix.ssl.config import flat

AT_LEAST_1 = (
    *("epochs", "batch_size", "knn_k", "data.image_size", "encoder.width", "encoder.head_dim"),
    *("mix.attribution_every", "explain_limit"),
    *("trainer.accumulate_grad_batches", "trainer.num_nodes"),
)
AT_LEAST_0 = (
    *("seed", "knn_every", "test_every", "quality_every", "pictures_every", "checkpoint_seconds", "max_skipped_steps"),
    *("data.memory_gib", "data.workers", "data.pseudo_unknown"),
    *("data.augment.rotate", "data.augment.brightness", "data.augment.contrast", "data.augment.saturation"),
    *("method.supervised", "method.selfsup", "method.targets", "mix.weight", "mix.start_epoch", "mix.end_epoch"),
    *("optimizer.base_lr", "optimizer.weight_decay", "optimizer.warmup_epochs", "optimizer.final_lr"),
    *("trainer.gradient_clip_val",),
)
ABOVE_0 = ("knn_temperature", "method.temperature", "method.temperature_end")
SHARES = (
    *("mix.probability", "method.smoothing", "data.holdout", "data.test_fraction"),
    *("data.augment.flip", "data.augment.jitter", "data.augment.greyscale", "data.augment.blur"),
)
PAIRS = {"data.augment.crop": 1.0, "data.augment.ratio": float("inf")}  # low and high, above 0 and at most this


def check_values(config: Any) -> None:
    """
    Args:
        config: of any of the commands; keys that it does not have are not looked at.

    Raises:
        ValueError: a number out of its range; the message has the key, the range and the value.
    """
    for key, value in flat(asdict(config)).items():
        expected = _expected(key, value)
        if expected is not None:
            raise ValueError(f"{key}: expected {expected}, got {value}")


def _expected(key: str, value: Any) -> str | None:
    """What the value should have been; None where it is."""
    if key in PAIRS and not (len(value) == 2 and 0 < value[0] <= value[1] <= PAIRS[key]):
        return f"[LOW,HIGH] with 0 < LOW <= HIGH <= {PAIRS[key]:g}"
    if not isinstance(value, int | float):  # null, or a list where another command has a number
        return None
    if key in (*AT_LEAST_1, *AT_LEAST_0, *ABOVE_0) and value == float("inf"):
        return "a finite number"
    if key == "seed" and value >= 2**32:
        return "less than 2 ** 32"
    if key == "speed.micro_batch" and not value >= 2:
        return "at least 2, for BatchNorm has nothing to compare one with"
    if key in AT_LEAST_1 and not value >= 1:
        return "at least 1"
    if key in AT_LEAST_0 and not value >= 0:
        return "at least 0"
    if key in ABOVE_0 and not value > 0:
        return "a number above 0"
    if key in SHARES and not 0 <= value <= 1:
        return "0 to 1"
    if key == "data.augment.hue" and not 0 <= value <= 0.5:
        return "0 to 0.5"
    return None
