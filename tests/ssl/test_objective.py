"""Which losses a method has, and their temperature."""

import math
from dataclasses import replace

import pytest

from gradmix.ssl.config import MethodConfig
from gradmix.ssl.objective import losses_of, temperature_at
from gradmix.ssl.targets import OrthogonalTargetLoss


@pytest.mark.parametrize(
    ("method", "mixes", "expected"),
    [
        (MethodConfig("simclr", selfsup=1.0), False, ["selfsup"]),
        (MethodConfig("joint", supervised=1.0, selfsup=0.5), True, ["supervised", "selfsup"]),
        (MethodConfig("supcon", supervised=1.0, attribution="supervised"), True, ["supervised"]),
        (MethodConfig("supcon", supervised=1.0), True, ["supervised", "selfsup"]),  # NT-Xent only says where to look
        (MethodConfig("supcon", supervised=1.0), False, ["supervised"]),
        (MethodConfig("all", supervised=1.0, selfsup=1.0, targets=1.0), True, ["supervised", "selfsup", "targets"]),
    ],
)
def test_a_step_computes_the_losses_that_weigh_something_and_the_one_that_guides(method, mixes, expected):
    target_loss = OrthogonalTargetLoss(3, 4) if method.targets else None
    assert list(losses_of(method, mixes, target_loss)) == expected


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 1.0])
def test_the_temperature_follows_half_a_cosine(done):
    method = MethodConfig("simclr", temperature=0.05, temperature_end=0.25)
    assert temperature_at(method, done) == pytest.approx(0.15 - 0.1 * math.cos(math.pi * done))
    assert temperature_at(replace(method, temperature_end=None), done) == 0.05
