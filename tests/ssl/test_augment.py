import colorsys
from collections import Counter

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import rgb_to_grayscale

from gradmix.ssl.augment import TwoViews
from gradmix.ssl.config import AugmentConfig
from gradmix.ssl.data.images import IMAGENET, denormalize, normalize

OFF = AugmentConfig(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter=0, greyscale=0)


def pixels(count=6, size=12, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_with_every_step_off_views_are_the_normalised_images():
    images = pixels()
    views = TwoViews(OFF, 12)(images, seed=0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    by_hand = (images.double() / 255 - mean) / std
    torch.testing.assert_close(views, torch.cat([by_hand, by_hand]).float(), atol=1e-4, rtol=1e-4)


def test_of_views_that_are_cut_already_the_first_two_are_taken_without_a_crop():
    """A step that mixes in an extra view finds the others behind them."""
    cuts = pixels(12).view(3, 4, 3, 12, 12)
    views = TwoViews(AugmentConfig(**{**vars(OFF), "crop": (0.2, 0.3)}), 12)(cuts, seed=0)
    torch.testing.assert_close(views, normalize(torch.cat([cuts[:, 0], cuts[:, 1]])))


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


@pytest.mark.parametrize(
    ("crop", "ratio"),
    [((0.4, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (0.4, 0.5)), ((1, 1), (2, 3)), ((0.2, 0.4), (0.4, 0.6))],
)
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


def test_half_of_the_images_are_flipped_each_by_itself():
    images = pixels(400, size=4)
    views = TwoViews(AugmentConfig(**{**vars(OFF), "flip": 0.5}), 4)(images, seed=0)
    flipped = (denormalize(views) - images.flip(3).repeat(2, 1, 1, 1) / 255).abs().amax((1, 2, 3)) < 1e-3
    first, second = flipped.view(2, 400).double()
    assert abs(first.mean() - 0.5) < 0.12 and abs(second.mean() - 0.5) < 0.12
    assert abs((first == second).double().mean() - 0.5) < 0.12  # the two views of an image don't know of each other


def hue_of(image):
    return colorsys.rgb_to_hsv(*image[:, 0, 0].tolist())[0]


@pytest.mark.parametrize(
    ("part", "measure", "low", "high"),
    [
        ("brightness", lambda old, new: new.mean() / old.mean(), 0.6, 1.4),
        ("contrast", lambda old, new: new[1].std() / old[1].std(), 0.6, 1.4),
        ("saturation", lambda old, new: (new[0] - new[1]).mean() / (old[0] - old[1]).mean(), 0.6, 1.4),
        ("hue", lambda old, new: 1 + (hue_of(new) - hue_of(old) + 0.5) % 1 - 0.5, 0.6, 1.4),
    ],
)
def test_colours_are_jittered_as_far_and_as_often_as_asked(part, measure, low, high):
    generator = torch.Generator().manual_seed(0)
    base = torch.tensor([90, 130, 110]).view(1, 3, 1, 1)
    images = (base + torch.randint(-20, 20, (300, 1, 4, 4), generator=generator)).byte()  # nothing comes near 0 or 255
    changes = {"jitter": 0.8, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, part: 0.4}
    views = denormalize(TwoViews(AugmentConfig(**{**vars(OFF), **changes}), 4, views=1)(images, seed=0))
    factors = torch.tensor([measure(old, new) for old, new in zip(images / 255, views, strict=True)])
    touched = (factors - 1).abs() > 1e-4
    assert abs(touched.double().mean() - 0.8) < 0.1
    assert low - 1e-3 <= factors.min() < low + 0.05 and high - 0.05 < factors.max() <= high + 1e-3


def test_as_many_images_as_asked_become_grey():
    images = pixels(300, size=4)
    views = denormalize(TwoViews(AugmentConfig(**{**vars(OFF), "greyscale": 0.2}), 4, views=1)(images, seed=0))
    grey = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-4
    assert abs(grey.double().mean() - 0.2) < 0.08
    expected = rgb_to_grayscale(images[grey].float() / 255, num_output_channels=3)
    torch.testing.assert_close(views[grey], expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(views[~grey], images[~grey] / 255, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "kernel"), [(12, 3), (32, 3), (50, 5), (96, 9)])
def test_a_blur_reaches_a_tenth_of_the_image_as_often_as_asked(size, kernel):
    """One white pixel tells the kernel: a Gaussian, with a deviation of its own for every image."""
    images = torch.zeros(40, 3, size, size, dtype=torch.uint8)
    middle, reach = size // 2, kernel // 2
    images[..., middle, middle] = 255
    views = denormalize(TwoViews(AugmentConfig(**{**vars(OFF), "blur": 0.5}), size, views=1)(images, seed=0))
    blurred = views[:, 0, middle, middle] < 0.999  # a deviation of 0.1 leaves the pixel as it is
    assert 8 < blurred.sum() < 32
    around = views[blurred, 0, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
    outside = views[blurred, 0].sum((1, 2)) - around.sum((1, 2))
    assert outside.abs().max() < 1e-3 and (around.sum((1, 2)) - 1).abs().max() < 1e-3
    profile = around[:, reach] / around[:, reach].sum(1, keepdim=True)
    widest = profile[profile[:, reach].argmin()].double()
    steps = torch.arange(-reach, reach + 1)
    deviation = (0.5 / (widest[reach] / widest[reach + 1]).log()).sqrt()
    assert 1.5 < deviation <= 2.01
    expected = torch.exp(-(steps**2) / (2 * deviation**2))
    torch.testing.assert_close(widest, expected / expected.sum(), atol=1e-3, rtol=0)
