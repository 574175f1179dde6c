"""benchmarks/heatmaps.py: its patches, bank and counting, against slow loops and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

pytestmark = pytest.mark.usefixtures("benchmarks")


def test_bank_by_greedy_k_centre():
    from heatmaps import k_centre

    points = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    taken = [0]
    while len(taken) < 20:
        gaps = [min(np.linalg.norm(p.astype(np.float64) - points[t]) for t in taken) for p in points]
        taken.append(int(np.argmax(gaps)))
    assert k_centre(points, 20).tolist() == taken
    assert sorted(k_centre(points[[0, 0, 1]], 3)) == [0, 1, 2]  # also where a row is there twice


def test_network_patches_are_both_stages_on_one_grid():
    from heatmaps import STAGES, of_network

    from gradmix.attribution import record
    from gradmix.ssl.data.images import normalize
    from gradmix.ssl.networks.backbones import ResNet

    encoder = ResNet("resnet18", 4, "small").eval()
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    with torch.no_grad(), record(encoder, STAGES, seen):
        encoder(normalize(images))
    patches = of_network(encoder)(images)
    assert patches.shape == (2, 8 + 16, 8, 8)
    for y in (0, 3, 7):
        for x in (0, 4, 7):
            around = seen[0][:, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
            torch.testing.assert_close(patches[:, :8, y, x], around.mean((2, 3)))
    corner = seen[1][:, :, :2, :2].mean((2, 3))  # enlarged twofold, the corner keeps its value
    torch.testing.assert_close(patches[:, 8:, 0, 0], corner)


def test_pixel_patches_are_three_cells_wide():
    from heatmaps import of_pixels

    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patches = of_pixels(images, 8)  # a cell is 2 x 2 pixels
    assert patches.shape == (2, 3 * 36, 8, 8)
    for y, x in ((1, 1), (3, 5), (6, 6)):
        expected = images[:, :, 2 * y - 2 : 2 * y + 4, 2 * x - 2 : 2 * x + 4].flatten(1) / 255
        torch.testing.assert_close(patches[:, :, y, x], expected)


def test_map_is_the_distance_to_the_nearest():
    from heatmaps import heat

    patches = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    bank = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    maps = heat(patches, bank, 32)  # at this size the smoothing is over 3 x 3 pixels
    far = np.array([[[min(np.linalg.norm(p - b) for b in bank) for p in row] for row in one] for one in at(patches)])
    sigma = 4 / 224 * 32
    weights = np.exp(-0.5 * (np.arange(-1, 2) / sigma) ** 2)
    weights /= weights.sum()
    for y, x in ((1, 1), (10, 20), (30, 30)):
        expected = np.einsum("nyx,y,x->n", far[:, y - 1 : y + 2, x - 1 : x + 2], weights, weights)
        np.testing.assert_allclose(maps[:, y, x].numpy(), expected, rtol=1e-4)


def at(patches: torch.Tensor) -> np.ndarray:
    return patches.permute(0, 2, 3, 1).double().numpy()


def test_rectangles_hold_the_middle_of_another_image():
    from heatmaps import rectangles

    known = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    place = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(3, 3, -1, -1)
    hosts, pasted, inside = rectangles(known, {"unknown": place, "known": known}, 40)
    assert hosts.bincount(minlength=7).min() >= 40 // 7
    for i, host in enumerate(hosts.tolist()):
        ys, xs = inside[i].any(1).nonzero()[:, 0], inside[i].any(0).nonzero()[:, 0]
        height, width = len(ys), len(xs)
        assert 4 <= height <= 8 and 4 <= width <= 8 and inside[i].sum() == height * width
        assert all((images[i][:, ~inside[i]] == host).all() for images in pasted.values())
        assert (pasted["known"][i][:, inside[i]] != host).all()
        y, x = (16 - height) // 2, (16 - width) // 2
        part = pasted["unknown"][i][:, ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        assert torch.equal(part, place[0, :, y : y + height, x : x + width])


def test_counting():
    from heatmaps import mean_error, measure

    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(9, (6, 5, 5), generator=generator).float()  # with ties
    maps[:, 2, 3] = 10
    inside = torch.rand(6, 5, 5, generator=generator) < 0.3
    measured = measure(maps, inside)
    for i in range(6):
        assert measured["auroc"][i] == pytest.approx(roc_auc_score(inside[i].flatten(), maps[i].flatten()))
        assert measured["hit"][i] == inside[i, 2, 3]
    mean, error = mean_error(np.array([1.0, 3.0, 5.0, 9.0]), torch.tensor([4, 4, 0, 2]))
    assert (mean, error) == (pytest.approx(np.mean([2, 5, 9])), pytest.approx(np.std([2, 5, 9], ddof=1) / 3**0.5))
