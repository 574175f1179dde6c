"""Which losses a method has, and their temperature."""

import math
from dataclasses import replace

import pytest

from gradmix.ssl.config import Config, DistillConfig, MethodConfig, MixConfig, OutlierConfig
from gradmix.ssl.objective import check_losses, losses_of, temperature_at
from gradmix.ssl.targets import OrthogonalTargetLoss

CUTMIX, ATTRIBUTION = MixConfig("cutmix"), OutlierConfig("attribution")


def asked(method, mix=None, **changes):
    return Config(method=method, mix=mix or MixConfig("none"), **changes)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (asked(MethodConfig("simclr", selfsup=1.0)), ["selfsup"]),
        (asked(MethodConfig("joint", supervised=1.0, selfsup=0.5), CUTMIX), ["supervised", "selfsup"]),
        (asked(MethodConfig("supcon", supervised=1.0, attribution="supervised"), CUTMIX), ["supervised"]),
        # NT-Xent only says where to look
        (asked(MethodConfig("supcon", supervised=1.0), CUTMIX), ["supervised", "selfsup"]),
        (asked(MethodConfig("supcon", supervised=1.0), outliers=ATTRIBUTION), ["supervised", "selfsup"]),
        (asked(MethodConfig("supcon", supervised=1.0)), ["supervised"]),
        (asked(MethodConfig("all", 1.0, 1.0, 1.0), CUTMIX), ["supervised", "selfsup", "targets"]),
        (asked(MethodConfig("simclr", selfsup=1.0), distill=DistillConfig("ema")), ["selfsup", "distill"]),
    ],
)
def test_a_step_computes_the_losses_that_weigh_something_and_the_one_that_guides(config, expected):
    target_loss = OrthogonalTargetLoss(3, 4) if config.method.targets else None
    assert list(losses_of(config, target_loss, None)) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (asked(MethodConfig("nothing")), "method: supervised, .*, prototypes are all 0, nothing would be learned"),
        (asked(MethodConfig("supcon", 1.0), CUTMIX), "mixed_loss: supcon has only supervised, got 'selfsup'"),
        (
            asked(MethodConfig("simclr", selfsup=1.0, attribution="targets"), CUTMIX),
            "method.attribution: simclr has selfsup, got 'targets'",
        ),
        (
            asked(MethodConfig("supcon", 1.0, attribution="targets"), outliers=ATTRIBUTION),
            "method.attribution: supcon has selfsup, supervised, joint, got 'targets'",
        ),
    ],
)
def test_losses_that_a_method_does_not_have_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_losses(config)


def test_without_mixing_and_outliers_it_does_not_matter_which_loss_they_would_ask():
    check_losses(asked(MethodConfig("sphor", targets=1.0, attribution="prototypes")))


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 1.0])
def test_the_temperature_follows_half_a_cosine(done):
    method = MethodConfig("simclr", temperature=0.05, temperature_end=0.25)
    assert temperature_at(method, done) == pytest.approx(0.15 - 0.1 * math.cos(math.pi * done))
    assert temperature_at(replace(method, temperature_end=None), done) == 0.05
