"""benchmarks/inside.py: its counting, against loops over pixels and pairs."""

import numpy as np
import pytest
import torch
from torch import nn

from gradmix import layercam
from gradmix.attribution import record
from gradmix.ssl.losses import NTXentLoss

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_evidence_in_boxes():
    from inside_training import at_border, evidence_in, peaks

    maps = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 1, 1], [2, 3, 6, 5], [4, 0, 8, 8], [7, 7, 8, 8]])
    for row, (one, (top, left, bottom, right)) in enumerate(zip(maps, boxes.tolist(), strict=True)):
        inside = sum(one[y, x] for y in range(top, bottom) for x in range(left, right))
        assert evidence_in(maps, boxes)[row].item() == pytest.approx((inside / one.sum()).item(), rel=1e-5)
        y, x = max(((y, x) for y in range(8) for x in range(8)), key=lambda p: one[p].item())
        assert peaks(maps)[row].tolist() == [y, x]
        assert at_border(peaks(maps), (8, 8))[row].item() == (not (0 < y < 7 and 0 < x < 7))


def test_their_boxes_pixel_by_pixel():
    from theirs import clipped_at_all, floored

    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(0, 32, (50, 2), generator=generator)
    share = 0.3 + 0.4 * torch.rand(50, generator=generator)
    boxes, whole = floored(centres, share, (32, 32))
    clipped = clipped_at_all(centres, share, (32, 32))
    assert 0 < clipped.sum() < 50
    for row in range(50):
        side = int(share[row].item() * 32)
        start = [c - side // 2 for c in centres[row].tolist()]
        pixels = {(start[0] + i, start[1] + j) for i in range(side) for j in range(side)}
        seen = {(y, x) for y, x in pixels if 0 <= y < 32 and 0 <= x < 32}
        top, left, bottom, right = boxes[row].tolist()
        assert {(y, x) for y in range(top, bottom) for x in range(left, right)} == seen
        assert whole[row] == len(pixels)
        assert clipped[row].item() == (len(seen) < len(pixels))


def test_scaled_per_image_the_maps_are_layercams():
    from theirs import maps_by_both_rules

    from gradmix.ssl.networks.backbones import ResNet

    torch.manual_seed(0)
    network, views = ResNet("resnet18", 4, "small"), torch.randn(8, 3, 16, 16)
    ours, theirs = maps_by_both_rules(network, nn.Identity(), views)
    seen: list = []
    with record(network, ["layer2", "layer3", "layer4"], seen):
        z = nn.functional.normalize(network(views), dim=1)
    torch.testing.assert_close(ours, layercam(NTXentLoss(0.1)(z), seen, (16, 16)), rtol=1e-3, atol=1e-4)
    assert (ours.amax((1, 2)) - theirs.amax((1, 2))).abs().max() > 0.01


def test_error_of_the_auroc_is_that_of_new_samples():
    from inside import auroc_error

    from gradmix.eval.metrics import auroc

    draw = np.random.default_rng(0)
    samples = [(draw.normal(size=200), draw.normal(0.7, 1.5, 100)) for _ in range(400)]
    spread = np.std([auroc(*sample) for sample in samples])
    assert np.mean([auroc_error(*sample) for sample in samples[:50]]) == pytest.approx(spread, rel=0.15)


def test_images_that_only_one_gets_wrong():
    from inside import only_one

    truth, sure = np.array(list("aabbb")), np.array([0.9, 0.5, 0.4, 0.2, 0.1])
    found = only_one((np.array(list("aabaa")), sure), (np.array(list("abbba")), sure), truth)
    assert [found[key] for key in ("both right", "both wrong", "only the first wrong", "only the second wrong")] == [
        *(2, 1, 1, 1)
    ]
    assert found["by class, only the first and only the second wrong"] == {"a": [0, 1], "b": [1, 0]}
    assert found["margin of the one that is right"] == pytest.approx(0.35)
