import torch

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
