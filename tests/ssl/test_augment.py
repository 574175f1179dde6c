from collections import Counter

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import AugmentConfig
from gradmix.ssl.data.images import MEAN, STD, denormalize, normalize

OFF = AugmentConfig(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter=0, greyscale=0)


def pixels(count=6, size=12, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_with_every_step_off_views_are_the_normalised_images():
    images = pixels()
    views = TwoViews(OFF, 12)(images, seed=0)
    by_hand = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(views, torch.cat([by_hand, by_hand]).float(), atol=1e-4, rtol=1e-4)


def test_a_flip_is_a_flip():
    images = pixels()
    views = TwoViews(AugmentConfig(**{**vars(OFF), "flip": 1.0}), 12)(images, seed=0)
    torch.testing.assert_close(views[:6], normalize(images.flip(3)), atol=1e-4, rtol=1e-4)


def test_views_are_a_function_of_the_seed_and_leave_the_global_rng_alone():
    augment, images = TwoViews(AugmentConfig(blur=0.5, rotate=10), 12), pixels()
    state = torch.get_rng_state()
    first = augment(images, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(augment(images, seed=5), first)
    assert not torch.equal(augment(images, seed=6), first)


def test_every_image_and_both_views_get_their_own_parameters():
    images = pixels(1).expand(8, -1, -1, -1).contiguous()
    views = TwoViews(AugmentConfig(), 12)(images, seed=1)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 16


def test_denormalize_undoes_normalize():
    images = pixels()
    torch.testing.assert_close(denormalize(normalize(images)), images.float() / 255)


@pytest.mark.parametrize(("crop", "ratio"), [((0.4, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (0.4, 0.5)), ((1, 1), (2, 3))])
def test_crops_are_as_high_and_as_wide_as_torchvisions(crop, ratio):
    """Also whole sides, and where none of ten crops fits. An image that is its own coordinates tells the crop."""
    count, size = 4000, 8
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.stack([x, y, x]).mul(30).byte().expand(count, -1, -1, -1)
    augment = TwoViews(AugmentConfig(**{**vars(OFF), "crop": crop, "ratio": ratio}), size, views=1)
    shown = (denormalize(augment(images, seed=0)) * 255 / 30).clamp(0, size - 1)
    wide = (shown[:, 0, 0, -1] - shown[:, 0, 0, 0] + 1).round().int().tolist()
    high = (shown[:, 1, -1, 0] - shown[:, 1, 0, 0] + 1).round().int().tolist()
    ours = Counter(zip(high, wide, strict=True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = Counter(RandomResizedCrop.get_params(images[0], crop, ratio)[2:] for _ in range(count))
    apart = sum(abs(ours[box] - theirs[box]) for box in ours | theirs) / 2 / count
    assert apart < 0.08, (ours, theirs)  # chance: about 0.03; kornia 0.8's own crops: 0.3 and more


def test_half_precision_leaves_the_views_alone():
    """On a GPU a step runs under autocast by default."""
    augment, images = TwoViews(AugmentConfig(blur=0.5, rotate=10), 12), pixels()
    expected = augment(images, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(images, seed=5), expected)
