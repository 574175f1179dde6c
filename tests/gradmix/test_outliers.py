"""Outliers: which pixels are disrupted and how, pixel by pixel; all others stay."""

import pytest
import torch

from gradmix.outliers import disrupt

ROWS, SIDES = 6, (5, 7)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def case(dtype=torch.float64):
    """Images whose pixels all differ, their channels by a constant; and maps."""
    position = torch.arange(SIDES[0] * SIDES[1], dtype=dtype).view(1, 1, *SIDES)
    images = (
        position + 100 * torch.arange(1, 4, dtype=dtype).view(1, 3, 1, 1) + 1000 * torch.arange(ROWS).view(-1, 1, 1, 1)
    )
    return images.to(dtype), torch.rand(ROWS, *SIDES, generator=seeded(0))


def most_attributed(one, count):
    order = sorted(((float(one[y, x]), y, x) for y in range(SIDES[0]) for x in range(SIDES[1])), reverse=True)
    return [(y, x) for _, y, x in order[:count]]


@pytest.mark.parametrize("how", ["shuffle", "shift", "add"])
@pytest.mark.parametrize("pixels", [0.01, 0.3, 1.0])
def test_only_the_most_attributed_pixels_change_and_as_asked(how, pixels):
    images, maps = case()
    before = images.clone()
    found = disrupt(images, maps, seeded(1), how, pixels, amount=0.5)
    assert torch.equal(images, before)
    count = max(1, round(pixels * 35))
    for row in range(ROWS):
        chosen = most_attributed(maps[row], count)
        for y in range(SIDES[0]):
            for x in range(SIDES[1]):
                if (y, x) not in chosen:
                    assert torch.equal(found[row, :, y, x], images[row, :, y, x])
        if how == "shuffle":
            was, now = (sorted(float(image[row, 0, y, x]) for y, x in chosen) for image in (images, found))
            assert was == now
            assert torch.equal(found[row, 1] - found[row, 0], images[row, 1] - images[row, 0])  # channels stay together
        elif how == "shift":
            ways = set()
            for y, x in chosen:
                position = int(found[row, 0, y, x]) - 100 - 1000 * row
                ways.add(((position // 7 - y) % 5, (position % 7 - x) % 7))
            assert len(ways) == 1 and ways != {(0, 0)}
        else:
            for channel in range(3):
                deviation = images[row, channel].std(correction=0)
                for y, x in chosen:
                    expected = images[row, channel, y, x] + 0.5 * deviation * maps[row, y, x]
                    torch.testing.assert_close(found[row, channel, y, x], expected, rtol=1e-5, atol=0)


def test_shuffling_moves_nearly_everything_and_every_image_by_itself():
    images, maps = case()
    found = disrupt(images, maps, seeded(1), "shuffle", 1.0)
    assert (found != images).double().mean() > 0.9
    assert not torch.equal(found[0] - 0, found[1] - 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_layout_and_randomness_are_the_callers(dtype):
    images, maps = torch.rand(4, 3, 8, 8).to(dtype), torch.rand(4, 8, 8)
    state = torch.get_rng_state()
    for layout in (torch.contiguous_format, torch.channels_last):
        for how in ("shuffle", "shift", "add"):
            found = [disrupt(images.to(memory_format=layout), maps, seeded(3), how) for _ in range(2)]
            assert torch.equal(*found) and found[0].dtype == dtype
            assert found[0].is_contiguous(memory_format=layout)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"how": "blur"}, "how: expected one of shuffle, shift, add, got 'blur'"),
        ({"pixels": 0.0}, "pixels: expected a share above 0, at most 1, got 0.0"),
        ({"attribution": torch.rand(2, 5, 7)}, r"attribution: expected \(6, 5, 7\), got \(2, 5, 7\)"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    images, maps = case()
    with pytest.raises(ValueError, match=message):
        disrupt(**({"images": images, "attribution": maps, "generator": seeded(0)} | changes))
