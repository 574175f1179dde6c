"""The mixers: what is kept is counted pixel by pixel, partners and boxes are right, and no input gives NaN."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradmix import MIXERS, CutMix, FMix, GradMix, Mixed, MixUp, ResizeMix
from gradmix.boxes import boxes_inside, kept_fraction, resize_into
from gradmix.draws import beta

SIZES = [(1, 1), (1, 7), (2, 3), (5, 5), (16, 16), (31, 33), (65, 97)]
MIXING = [name for name in MIXERS if name != "extra_view"]  # which mixes nothing in
BOXES = {
    "gradmix": GradMix,
    "gradmix_cut": partial(GradMix, paste="cut"),
    "background": partial(GradMix, paste="background"),
    "border": partial(GradMix, border=0.2),
    "noise_box": partial(GradMix, paste="noise"),
    "random_box": partial(GradMix, centre="random"),
    "cutmix": CutMix,
    "resizemix": ResizeMix,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(batch: int, size: tuple[int, int], dtype=torch.float32) -> torch.Tensor:
    """Images of ``2 * batch`` rows whose every pixel says which row it comes from: 1, 2, 3, ..."""
    ids = torch.arange(1, 2 * batch + 1, dtype=dtype)
    return ids[:, None, None, None].expand(-1, 3, *size).contiguous()


class Spots(nn.Module):
    """An encoder whose attribution map is known: the batch's own first channel, pixel by pixel."""

    def __init__(self):
        super().__init__()
        self.look = nn.Identity()

    def forward(self, maps):
        return self.look(maps.requires_grad_()).sum()


def mix(mixer, images, maps=None, **options) -> Mixed:
    """Call any mixer; GradMix sees ``maps`` [2B, h, w] (random ones unless given) as its attribution."""
    if not isinstance(mixer, GradMix) or mixer.centre == "random":
        return mixer(images, **options)
    if maps is None:
        maps = torch.rand(len(images), 4, 4, generator=seeded(len(images)))
    mixer.layers = ["look"]
    encoder = Spots()
    with mixer.watch(encoder):
        loss = encoder(maps[:, None].clone())
    return mixer(images, loss, **options)


def check(mixed: Mixed, images: torch.Tensor) -> None:
    """What holds for every mixer and every input."""
    rows = len(images)
    assert mixed.images.shape == images.shape and mixed.images.dtype == images.dtype
    for layout in (torch.contiguous_format, torch.channels_last):
        if images.is_contiguous(memory_format=layout):
            assert mixed.images.is_contiguous(memory_format=layout)
    assert torch.isfinite(mixed.images).all()
    assert mixed.kept.shape == (rows,) and mixed.kept.dtype == torch.float32
    assert (mixed.kept >= 0).all() and (mixed.kept <= 1).all()
    assert mixed.partner.shape == (rows,) and mixed.partner.dtype == torch.int64
    if mixed.boxes is not None:
        top, left, bottom, right = mixed.boxes.unbind(1)
        assert (0 <= top).all() and (top <= bottom).all() and (bottom <= images.shape[2]).all()
        assert (0 <= left).all() and (left <= right).all() and (right <= images.shape[3]).all()
    if mixed.attribution is not None:
        assert torch.isfinite(mixed.attribution).all()


def is_other_view_of_another_image(partner: torch.Tensor) -> bool:
    batch = len(partner) // 2
    row = torch.arange(2 * batch)
    return bool((partner // batch != row // batch).all() and (partner % batch != row % batch).all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*MIXING, "gradmix_cut", "background", "border"])
def test_kept_is_the_true_fraction_of_own_pixels(name, size):
    mixer = {**MIXERS, **BOXES}[name]()
    for seed, batch in enumerate([2, 3, 9]):
        images = numbered(batch, size)
        if name == "noise_box":  # the noise has the image's own mean and deviation
            images = images + torch.rand(images.shape, generator=seeded(seed))
        mixed = mix(mixer, images, generator=seeded(seed))
        check(mixed, images)
        if name == "noise_box" and size == (1, 1):
            continue  # one pixel is its own mean
        own = mixed.images == images
        assert torch.equal(own.all(1), own.any(1))  # all channels of a pixel come from one image
        if name == "mixup":
            partners = images[mixed.partner]
            share = ((mixed.images - partners) / (images - partners)).flatten(1)
            torch.testing.assert_close(share, mixed.kept[:, None].expand_as(share), rtol=0, atol=1e-5)
        else:
            counted = own[:, 0].double().mean((1, 2))
            torch.testing.assert_close(mixed.kept.double(), counted, rtol=0, atol=1e-6)
        if name == "noise_box":
            assert torch.equal(mixed.partner, torch.arange(2 * batch))
        else:
            assert is_other_view_of_another_image(mixed.partner)
            if name != "mixup":  # whatever is not the row's own is its partner's
                from_partner = (mixed.images - images[mixed.partner]).abs() < 1e-4
                assert (own | from_partner).all()


@pytest.mark.parametrize("name", BOXES)
def test_pixels_change_inside_the_box_only(name):
    images = torch.rand(14, 3, 21, 17, generator=seeded(0))
    mixed = mix(BOXES[name](), images, generator=seeded(1))
    for row, (top, left, bottom, right) in enumerate(mixed.boxes.tolist()):
        inside = torch.zeros(21, 17, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        changed = (mixed.images[row] != images[row]).all(0)
        assert torch.equal(changed, inside)
        if name in ("cutmix", "gradmix_cut"):
            assert torch.equal(mixed.images[row][:, inside], images[mixed.partner[row]][:, inside])


@pytest.mark.parametrize("size", SIZES[2:])
@pytest.mark.parametrize("name", ["gradmix", "random_box", "resizemix"])
def test_resize_is_interpolate_image_by_image(name, size):
    images = torch.rand(20, 3, *size, generator=seeded(0))
    mixed = mix(BOXES[name](), images, generator=seeded(2))
    for row, (top, left, bottom, right) in enumerate(mixed.boxes.tolist()):
        if bottom == top or right == left:
            continue
        whole = images[mixed.partner[row], None]
        pasted = F.interpolate(whole, (bottom - top, right - left), mode="bilinear", align_corners=False)
        torch.testing.assert_close(mixed.images[row, :, top:bottom, left:right], pasted[0], rtol=1e-5, atol=1e-5)


def test_resize_in_double_precision():
    images = torch.rand(2, 3, 12, 9, dtype=torch.float64, generator=seeded(0))
    boxes = torch.tensor([[1, 2, 8, 7], [0, 0, 12, 9]])
    resized = resize_into(images, boxes)
    expected = F.interpolate(images[:1], (7, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized[:1, :, 1:8, 2:7], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(resized[1], images[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(32, 32), (31, 45)])
def test_boxes_are_centred_on_the_peak_unless_moved_inside(size):
    height, width = size
    rows = 64
    y, x = torch.randint(0, height, (rows,), generator=seeded(0)), torch.randint(0, width, (rows,), generator=seeded(1))
    maps = torch.rand(rows, height, width, generator=seeded(2))
    maps[torch.arange(rows), y, x] = 2
    mixed = mix(GradMix(), numbered(rows // 2, size), maps, generator=seeded(3))
    moved = 0
    for row, (top, left, bottom, right) in enumerate(mixed.boxes.tolist()):
        for start, end, peak, length in ((top, bottom, y[row], height), (left, right, x[row], width)):
            side = end - start
            centred = int(peak) - side // 2
            assert start == min(max(centred, 0), length - side)
            assert start <= peak < end  # the peak is hidden
            moved += start != centred
    assert 10 < moved < rows  # both cases occurred
    torch.testing.assert_close(mixed.attribution.flatten(1).argmax(1), y * width + x)


def test_a_flat_map_gives_a_random_place():
    images = numbered(200, (32, 32))
    flat = mix(GradMix(keep=(0.9, 0.9)), images, torch.full((400, 4, 4), 0.3), generator=seeded(0))
    control = mix(GradMix(keep=(0.9, 0.9), centre="random"), images, generator=seeded(0))
    assert torch.equal(flat.boxes, control.boxes)
    tops, lefts = flat.boxes[:, 0].float(), flat.boxes[:, 1].float()
    for starts in (tops, lefts):
        assert starts.min() == 0 and starts.max() == 22 and starts.unique().numel() == 23
    assert torch.corrcoef(torch.stack([tops, lefts]))[0, 1].abs() < 0.15


@pytest.mark.parametrize("border", [0.0, 0.125, 0.3, 0.49])
@pytest.mark.parametrize("size", [(32, 32), (9, 14), (2, 3)])
def test_no_peak_is_looked_for_at_the_border(size, border):
    height, width = size
    maps = torch.rand(40, height, width, generator=seeded(0))
    mixed = mix(GradMix(keep=(0.9, 0.9), border=border), numbered(20, size), maps, generator=seeded(1))
    margins = [min(round(border * length), (length - 1) // 2) for length in size]
    for row, one in enumerate(mixed.attribution):
        allowed = {
            (y, x): float(one[y, x])
            for y in range(margins[0], height - margins[0])
            for x in range(margins[1], width - margins[1])
        }
        peak = max(allowed, key=allowed.get)
        for i, length in enumerate(size):
            start, end = int(mixed.boxes[row, i]), int(mixed.boxes[row, i + 2])
            assert start == min(max(peak[i] - (end - start) // 2, 0), length - (end - start))
    if border == 0:
        usual = mix(GradMix(keep=(0.9, 0.9)), numbered(20, size), maps, generator=seeded(1))
        assert torch.equal(usual.images, mixed.images)


def test_a_map_that_is_bright_at_the_border_only_gives_a_random_place():
    maps = torch.zeros(200, 32, 32)
    maps[:, 0] = 1
    tops = mix(GradMix(keep=(0.9, 0.9), border=0.1), numbered(100, (32, 32)), maps, generator=seeded(0)).boxes[:, 0]
    assert tops.unique().numel() > 15


def test_backgrounds_are_pasted_into_backgrounds():
    """Pixels say where they come from: every box is a piece of the partner, around a pixel among its lower half."""
    rows, side = 12, 10
    position = torch.arange(side * side, dtype=torch.float64).view(1, 1, side, side)
    images = position + 100 * torch.arange(rows, dtype=torch.float64).view(-1, 1, 1, 1)
    maps = torch.rand(rows, side, side, generator=seeded(0))
    mixed = mix(GradMix(paste="background", keep=(0.8, 0.9)), images, maps, generator=seeded(1))
    lower = [set(one.flatten().argsort()[:50].tolist()) for one in mixed.attribution]
    for row, (top, left, bottom, right) in enumerate(mixed.boxes.tolist()):
        partner = int(mixed.partner[row])
        piece = mixed.images[row, 0, top:bottom, left:right] - 100 * partner
        start = int(piece[0, 0])
        for y in range(bottom - top):
            for x in range(right - left):
                assert int(piece[y, x]) == start + y * side + x  # one piece, not resized

        def reaches(top, left, height, width, pixels):
            """Whether a box around one of the pixels, moved inside, lies there."""
            corners = {
                tuple(min(max(c - s // 2, 0), side - s) for c, s in ((p // side, height), (p % side, width)))
                for p in pixels
            }
            return (top, left) in corners

        assert reaches(top, left, bottom - top, right - left, lower[row])
        assert reaches(start // side, start % side, bottom - top, right - left, lower[partner])


def test_gradmix_and_its_controls_draw_the_same_boxes_sizes_and_partners():
    images = numbered(8, (32, 32))
    one = mix(GradMix(), images, generator=seeded(5))
    for other in (GradMix(centre="random"), GradMix(paste="cut"), GradMix(evidence="agreement")):
        mixed = mix(other, images, generator=seeded(5))
        assert torch.equal(mixed.kept, one.kept) and torch.equal(mixed.partner, one.partner)
    assert torch.equal(mix(MIXERS["noise_box"](), images, generator=seeded(5)).boxes, one.boxes)
    assert not torch.equal(mix(MIXERS["random_box"](), images, generator=seeded(5)).boxes, one.boxes)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("keep", [(0.5, 0.9), (0.0, 1.0), (0.7, 0.7)])
def test_keep_range_holds_up_to_rounding(alpha, keep):
    low, high = keep
    for side in (8, 33, 64):
        mixed = mix(GradMix(alpha=alpha, keep=keep, centre="random"), numbered(500, (side, side)), generator=seeded(0))
        # A side is rounded by half a pixel at most, so the box's area by one side and a quarter of a pixel.
        slack = 1.25 / side
        assert mixed.kept.min() >= low - slack and mixed.kept.max() <= high + slack


def test_keep_ratio_is_beta():
    mixed = mix(
        GradMix(alpha=2.0, keep=(0.0, 1.0), centre="random"), numbered(4000, (64, 64))[:, :1], generator=seeded(0)
    )
    assert mixed.kept.mean().item() == pytest.approx(0.5, abs=0.01)
    assert mixed.kept.var().item() == pytest.approx(1 / 20, abs=0.003)  # 1 / (4 (2 alpha + 1))


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.003, 0.03, 0.0999, 0.1, 0.5, 1.0, 20.0])
def test_draws_are_scipys_beta(alpha):
    drawn = beta(20_000, alpha, torch.device("cpu"), seeded(0)).double()
    assert ((drawn >= 0) & (drawn <= 1)).all()
    # At these places, because float32 can tell 1e-30 from 0 but not 1 - 1e-30 from 1, and small alphas live there.
    places = torch.tensor([1e-30, 1e-9, 1e-3, 0.1, 0.4, 0.4999, 0.5001, 0.6, 0.9, 0.999, 1 - 1e-6], dtype=torch.double)
    found = (drawn[:, None] <= places).double().mean(0)
    expected = torch.from_numpy(stats.beta(alpha, alpha).cdf(places.numpy()))
    assert (found - expected).abs().max() < 0.015  # Kolmogorov-Smirnov at a level of 1e-3 is 0.0138


@pytest.mark.parametrize("name", MIXING)
def test_every_image_draws_its_own_share(name):
    mixed = mix(MIXERS[name](), numbered(50, (64, 64)), generator=seeded(0))
    assert mixed.kept.unique().numel() > 20


def test_noise_has_the_mean_and_deviation_of_each_channel_of_its_image():
    level = torch.tensor([[0.2, 3.0, -1.0], [5.0, 0.0, 0.5]]).repeat(2, 1)[:, :, None, None]
    spread = torch.tensor([[1.0, 0.1, 0.5], [0.2, 2.0, 0.4]]).repeat(2, 1)[:, :, None, None]
    images = level + spread * torch.randn(4, 3, 128, 128, generator=seeded(0))
    noise = mix(GradMix(paste="noise", keep=(0.0, 0.0)), images, generator=seeded(1)).images
    for found, expected in zip(torch.std_mean(noise, (2, 3)), torch.std_mean(images, (2, 3)), strict=True):
        assert ((found - expected).abs() < 0.05 * spread[:, :, 0, 0]).all()  # six standard errors


def test_cutmix_takes_its_share_of_the_area_where_nothing_is_clipped():
    boxes = mix(CutMix(alpha=1e6), numbered(200, (64, 32)), generator=seeded(0)).boxes  # lam is 1/2
    heights, widths = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    assert (heights.max(), widths.max()) == (45, 22)  # sqrt(1/2) of 64 and 32, cut to whole pixels
    assert heights.min() < 30  # clipped


def test_resizemix_draws_sides_and_places_evenly():
    boxes = mix(ResizeMix(), numbered(2000, (50, 50))[:, :1], generator=seeded(0)).boxes
    counts = (boxes[:, 2] - boxes[:, 0]).bincount(minlength=41)
    assert counts[:5].sum() == 0 and len(counts) == 41  # 0.1 to 0.8 of 50
    assert (counts[6:40] - 4000 / 35).abs().max() < 55  # five standard deviations
    places = mix(ResizeMix((0.5, 0.5)), numbered(900, (4, 4)), generator=seeded(0)).boxes[:, :2]
    for one in places.T:
        assert (one.bincount(minlength=3) - 600).abs().max() < 100 and one.max() == 2  # box of 2 among 4: 0, 1, 2


def test_fmix_masks_are_blobs_the_larger_the_faster_the_spectrum_falls():
    shares = []
    for decay in (0.01, 1.5, 3.0):
        images = numbered(40, (32, 32))
        own = mix(FMix(alpha=1e6, decay=decay), images, generator=seeded(0)).images[:, 0] == images[:, 0]
        shares.append((own[:, 1:] != own[:, :-1]).double().mean().item())  # neighbours on two sides of an edge
    assert shares[0] == pytest.approx(0.5, abs=0.02)  # white noise
    assert 0.1 < shares[1] < 0.35 and shares[2] < 0.08


def test_boxes_and_fractions_as_pure_functions():
    centres = torch.tensor([[0, 0], [5, 5], [9, 9], [4, 2]])
    share = torch.tensor([0.5, 0.4, 1.0, 0.0])
    boxes = boxes_inside(centres, share, (10, 10))
    assert boxes.tolist() == [[0, 0, 5, 5], [3, 3, 7, 7], [0, 0, 10, 10], [4, 2, 4, 2]]
    torch.testing.assert_close(kept_fraction(boxes, (10, 10)), torch.tensor([0.75, 0.84, 0.0, 1.0]))


@pytest.mark.parametrize("name", [*MIXING, "gradmix_cut"])
def test_a_thousand_random_cases_have_a_defined_result(name):
    choose = random.Random(name)
    mixers = {
        "gradmix": lambda: GradMix(alpha=choose.choice([0.05, 1.0, 9.0]), keep=choose.choice([(0.5, 0.9), (0.0, 1.0)])),
        "mixup": lambda: MixUp(choose.choice([0.05, 1.0])),
        "fmix": lambda: FMix(choose.choice([0.05, 1.0]), choose.choice([1.0, 3.0])),
        "resizemix": lambda: ResizeMix(choose.choice([(0.1, 0.8), (0.0, 1.0)])),
    }
    for case in range(1000 // 8):
        mixer = mixers.get(name, {**MIXERS, **BOXES}[name])()
        batch, size = choose.randint(1, 19), (choose.randint(1, 24), choose.randint(1, 24))
        dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
        kind = choose.choice(["random", "constant", "zero", "large"])
        images = torch.rand(2 * batch, choose.choice([1, 3]), *size, generator=seeded(case))
        images = {"random": images, "constant": 0 * images + 0.7, "zero": 0 * images, "large": images * 1e4}[kind]
        images = images.to(dtype)
        if choose.random() < 0.5:
            images = images.to(memory_format=torch.channels_last)
        maps = torch.rand(2 * batch, 3, 5, generator=seeded(case)).to(dtype)
        maps = choose.choice([maps, 0 * maps, 0 * maps + 1, maps * 1e-6])
        before = images.clone()
        with torch.autocast("cpu", choose.choice([torch.bfloat16, torch.float16]), enabled=choose.random() < 0.5):
            mixed = mix(mixer, images, maps, generator=seeded(case))
        check(mixed, images)
        assert torch.equal(images, before)
        if kind == "constant" and name not in ("gradmix_cut", "cutmix", "fmix"):  # rounding of a blend at most
            torch.testing.assert_close(mixed.images, images, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixup_in_half_precision_says_the_share_it_used(dtype):
    images = torch.zeros(40, 1, 2, 2, dtype=dtype)
    images[:20] = 1  # every partner of a one is a zero
    mixed = MixUp()(images, generator=seeded(0))
    torch.testing.assert_close(mixed.images[:20, 0, 0, 0].float(), mixed.kept[:20], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MIXING)
def test_a_batch_of_one_comes_back(name):
    images = torch.rand(2, 3, 8, 8)
    mixed = mix(MIXERS[name](), images)
    check(mixed, images)
    assert torch.equal(mixed.images, images)
    assert mixed.kept.tolist() == [1, 1] and mixed.partner.tolist() == [0, 1]


@pytest.mark.parametrize("name", MIXING)
def test_randomness_is_the_generators_and_the_global_one_is_left_alone(name):
    images = torch.rand(16, 3, 12, 12, generator=seeded(0))

    def states():
        return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate()

    before = states()
    first, second, other = (mix(MIXERS[name](), images, generator=seeded(s)) for s in (7, 7, 8))
    assert torch.equal(first.images, second.images) and torch.equal(first.partner, second.partner)
    assert torch.equal(first.kept, second.kept)
    assert not torch.equal(first.images, other.images)
    # Without a generator: a private one, which follows torch.manual_seed and goes on from call to call.
    mixer = MIXERS[name]()
    private = [mix(mixer, images).images for _ in range(2)]
    again = mix(MIXERS[name](), images).images
    assert torch.equal(private[0], again) and not torch.equal(private[0], private[1])
    with torch.random.fork_rng():
        torch.manual_seed(torch.initial_seed() + 1)
        assert not torch.equal(private[0], mix(MIXERS[name](), images).images)
    assert states() == before


@pytest.mark.parametrize("partner", ["similar", "dissimilar"])
@pytest.mark.parametrize("batch", [2, 3, 12])
def test_partners_by_projection(partner, batch):
    z = F.normalize(torch.randn(2 * batch, 8, generator=seeded(batch)), dim=1)
    mixed = CutMix(partner=partner)(
        numbered(batch, (8, 8)), projections=z.clone().requires_grad_(), generator=seeded(0)
    )
    for row in range(2 * batch):
        best, found = None, None
        for other in range(2 * batch):
            if other % batch == row % batch or other // batch == row // batch:
                continue
            similarity = float(z[row] @ z[other]) * (1 if partner == "similar" else -1)
            if best is None or similarity > best:
                best, found = similarity, other
        assert mixed.partner[row] == found


def test_random_partners_are_uniform_over_the_others():
    counts = torch.zeros(8, 8)
    mixer = CutMix()
    for seed in range(600):
        partner = mixer(numbered(4, (2, 2)), generator=seeded(seed)).partner
        counts[torch.arange(8), partner] += 1
    allowed = torch.tensor([[r // 4 != p // 4 and r % 4 != p % 4 for p in range(8)] for r in range(8)])
    assert (counts[~allowed] == 0).all()
    assert (counts[allowed] - 200).abs().max() < 60  # 5 standard deviations


def test_an_extra_view_is_mixed_with_nothing():
    images = torch.rand(6, 3, 4, 4)
    mixed = MIXERS["extra_view"]()(images, generator=seeded(0))
    check(mixed, images)
    assert mixed.images is images
    assert mixed.kept.tolist() == [1] * 6 and mixed.partner.tolist() == list(range(6))


def test_wrong_arguments_are_named():
    images = numbered(3, (4, 4))
    for wrong in (images[0], images[:3], images[:0], images.long(), images[..., :0]):
        with pytest.raises(ValueError, match=r"images: expected float \[2B, C, H, W\], got"):
            CutMix()(wrong)
    for wrong in (None, torch.rand(5, 3), torch.rand(6)):
        with pytest.raises(ValueError, match=r"projections: partner='similar' needs \[6, D\] in the call, got"):
            CutMix(partner="similar")(images, projections=wrong)
    for mixer, message in [
        (partial(GradMix, alpha=0), "alpha: expected a finite number above 0, got 0"),
        (partial(MixUp, alpha=float("inf")), "alpha: expected a finite number above 0, got inf"),
        (partial(FMix, decay=-1), "decay: expected a finite number above 0, got -1"),
        (partial(GradMix, keep=(0.9, 0.5)), "keep: expected .low, high. with 0 <= low <= high <= 1, got .0.9, 0.5."),
        (partial(GradMix, keep=0.5), "keep: expected .low, high. with 0 <= low <= high <= 1, got 0.5"),
        (partial(ResizeMix, scale=(0.1, 2)), "scale: expected .low, high. with 0 <= low <= high <= 1, got"),
        (partial(GradMix, paste="blur"), "paste: expected one of resize, cut, noise, background, got 'blur'"),
        (partial(GradMix, evidence="all"), "evidence: expected one of loss, agreement, got 'all'"),
        (partial(GradMix, centre="middle"), "centre: expected one of peak, random, got 'middle'"),
        (
            partial(GradMix, paste="background", centre="random"),
            "paste: 'background' asks the map .* needs centre='peak'",
        ),
        (partial(GradMix, border=0.5), "border: expected 0 to below 0.5, got 0.5"),
        (partial(CutMix, partner="best"), "partner: expected one of random, similar, dissimilar, got 'best'"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixer()


class NoSynchronisation(TorchDispatchMode):
    """Fails on the operations that, on a GPU, make the host wait: reading a value, counting a mask's pixels, or
    bringing a number of the host's to the device as a tensor (torch.where with a number, torch.tensor)."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "item", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        assert name not in self.WAITS, f"{function} waits for the device"
        if name == "where":
            assert all(t.ndim > 0 for t in tensors), f"{function} copies a number from the host"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype == torch.int64 for i in args[1]), f"{function} counts a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*MIXING, "gradmix_cut", "background", "border", "similar"])
def test_nothing_waits_for_the_device(name):
    mixer = GradMix(partner="similar") if name == "similar" else {**MIXERS, **BOXES}[name]()
    images, generator = torch.rand(8, 3, 16, 16), seeded(0)
    mixer.layers = ["look"]
    encoder, maps = Spots(), torch.rand(8, 2, 4, 4)
    if isinstance(mixer, GradMix):
        with mixer.watch(encoder):
            loss = encoder(maps)
    with NoSynchronisation():
        mixer(images, loss if isinstance(mixer, GradMix) else None, generator, torch.rand(8, 4))


def test_the_synchronisation_check_works():
    x = torch.rand(3)
    for wait in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: torch.where(x > 0, x, 0.0),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: bool((x > 0).all()),
    ):
        with pytest.raises(AssertionError), NoSynchronisation():
            wait()
