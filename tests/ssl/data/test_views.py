"""Views cut from the original pixels: torchvision's distribution and pixels, and what may not change them."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from gradmix.ssl.data.images import ImageSet, decode
from gradmix.ssl.data.loader import TrainLoader
from gradmix.ssl.data.views import Crops, cut, random_box

CROPS = Crops(2, (0.2, 1.0), (0.75, 4 / 3))


def photograph(path, width=90, height=60, seed=0, **options):
    """Smooth, as photographs are, and unlike any other seed's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return str(path)


@pytest.fixture
def photographs(tmp_path):
    files = [photograph(tmp_path / f"{i:02}.jpg", 90 + i, 60 + i, i, quality=95) for i in range(12)]
    return ImageSet(torch.arange(12) % 3, 16, files=files, photographs=True)


def batches(data, **options):
    return list(TrainLoader(data, 4, seed=3, epochs=2, **{"crops": CROPS, "workers": 0, **options}))


@pytest.mark.parametrize("shape", [(500, 375), (100, 400), (2000, 100)], ids=["photograph", "tall", "strip"])
@pytest.mark.parametrize("area", [(0.2, 1.0), (0.08, 1.0)])
def test_boxes_are_distributed_as_torchvisions(shape, area):
    width, height = shape
    rng, count = np.random.default_rng(0), 4000
    ours = np.array([random_box(rng, width, height, area, (0.75, 4 / 3)) for _ in range(count)], float)
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    drawn = [RandomResizedCrop.get_params(image, area, (0.75, 4 / 3)) for _ in range(count)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in drawn], float)
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= width).all()
    assert (ours[:, 1] + ours[:, 3] <= height).all()

    def marginals(boxes):
        left, top, w, h = boxes.T
        return {"area": w * h, "aspect": w / h, "x": left + w / 2, "y": top + h / 2, "left": left, "top": top}

    for name, values in marginals(ours).items():
        assert ks_2samp(values, marginals(theirs)[name]).pvalue > 1e-3, name


def test_a_view_is_torchvisions_crop_of_the_whole_photograph(tmp_path):
    path = photograph(tmp_path / "a.jpg", quality=90)
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    views = CROPS.of(path, 32, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    for view in views:
        left, top, width, height = random_box(rng, 90, 60, CROPS.area, CROPS.ratio)
        theirs = transforms.resized_crop(pixels, top, left, height, width, [32, 32], antialias=True)
        assert (view.int() - theirs.int()).abs().max() <= 1
    assert not torch.equal(*views)


def test_a_view_shows_what_the_middle_square_does_not(tmp_path):
    """A stripe at the left edge of a wide photograph is in no square of its middle, and in many a view."""
    image = Image.new("RGB", (200, 100))
    image.paste((255, 0, 0), (0, 0, 40, 100))
    image.save(tmp_path / "wide.png")
    views = CROPS.of(str(tmp_path / "wide.png"), 16, np.random.default_rng(0))
    many = torch.cat([CROPS.of(str(tmp_path / "wide.png"), 16, np.random.default_rng(i)) for i in range(40)])
    assert decode(tmp_path / "wide.png", 16).max() == 0 and views.shape == (2, 3, 16, 16)
    assert (many[:, 0].amax((1, 2)) > 200).float().mean() > 0.1


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("reduced", [False, True])
def test_views_are_upright(tmp_path, turned, reduced):
    """Red at the top, whichever way the camera was held."""
    size = (256, 192) if reduced else (64, 48)
    upright = Image.new("RGB", size)
    upright.paste((255, 0, 0), (0, 0, size[0], size[1] // 2))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if turned == 1 else upright.transpose(Image.Transpose(undo[turned]))
    exif = Image.Exif()
    exif[0x0112] = turned
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    whole = Crops(1, (1.0, 1.0), (4 / 3, 4 / 3))
    view = whole.of(str(tmp_path / "a.jpg"), 16, np.random.default_rng(0))[0].int()
    assert view[0, :7].min() > 200 and view[0, 9:].max() < 60 and view[1:].max() < 60


def test_a_reduced_jpeg_gives_the_same_view_to_the_eye(tmp_path):
    path = photograph(tmp_path / "large.jpg", 1200, 800, quality=90)
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    for seed in range(5):
        views, rng = CROPS.of(path, 64, np.random.default_rng(seed)), np.random.default_rng(seed)
        for view in views:
            box = random_box(rng, 1200, 800, CROPS.area, CROPS.ratio)
            error = (view.float() - cut(pixels, box, 64).float()).square().mean()
            assert 10 * torch.log10(255**2 / error) > 45


def test_several_pictures_in_one_jpeg_are_read_as_fast(tmp_path):
    """MPO, as phones write it."""
    first, second = (Image.open(photograph(tmp_path / f"{n}.jpg", 1200, 800, n, quality=90)) for n in range(2))
    first.save(tmp_path / "both.jpg", "MPO", save_all=True, append_images=[second], quality=90)
    first.save(tmp_path / "one.jpg", quality=90)
    both, one = (CROPS.of(str(tmp_path / name), 64, np.random.default_rng(0)) for name in ("both.jpg", "one.jpg"))
    assert Image.open(tmp_path / "both.jpg").format in ("MPO", "JPEG")  # as older Pillows say
    assert torch.equal(both, one)


@pytest.mark.parametrize("kind", ["L", "RGB", "CMYK", "RGBA", "P", "I;16"])
def test_every_kind_of_image_has_views(tmp_path, kind):
    name = tmp_path / ("a.jpg" if kind in ("L", "RGB", "CMYK") else "a.png")
    grey = Image.new("L", (40, 30), 200)
    image = Image.fromarray(np.full((30, 40), 200 * 257, np.uint16)) if kind == "I;16" else grey.convert(kind)
    image.save(name)
    views = CROPS.of(str(name), 8, np.random.default_rng(0)).int()
    assert views.shape == (2, 3, 8, 8) and (views - 200).abs().max() <= 3


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_views_are_the_same_with_any_number_of_workers_and_after_a_stop(photographs, start):
    expected = batches(photographs)[start:]
    for workers in (0, 1, 3):
        for got, want in zip(batches(photographs, start=start, workers=workers), expected, strict=True):
            assert torch.equal(got.images, want.images) and got.images.shape == (4, 2, 3, 16, 16)
            assert torch.equal(got.index, want.index) and got[3:] == want[3:]
    shares = [batches(photographs, rank=rank, world_size=2) for rank in range(2)]
    for both, whole in zip(zip(*shares, strict=True), batches(photographs), strict=True):
        assert torch.equal(torch.cat([share.images for share in both]), whole.images)


def test_views_differ_between_seeds_epochs_images_and_views(photographs):
    one = photographs.select(torch.zeros(12, dtype=torch.long))  # twelve times the same photograph
    views = torch.cat([batch.images.flatten(0, 1) for batch in batches(one)])
    assert len({view.numpy().tobytes() for view in views}) == len(views) == 48


def hostile(path):
    """Every way in which a file can be bad when its turn comes."""
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(good, "JPEG")
    yield "gone", path.unlink
    for name, content in {
        "empty": b"",
        "half": good.getvalue()[: len(good.getvalue()) // 2],
        "header": good.getvalue()[:300],
        "page": b"<!DOCTYPE html>",
        "program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }.items():
        yield name, lambda content=content: path.write_bytes(content)
    if hasattr(os, "mkfifo"):
        yield "pipe", lambda: (path.unlink(missing_ok=True), os.mkfifo(path))
    yield "folder", lambda: (path.unlink(missing_ok=True), path.mkdir())


def test_a_file_that_went_bad_after_it_was_listed(photographs, tmp_path, capsys):
    """Row 4 has label 1, so that row 7, the next of its label, stands in for it, wherever row 4 comes."""
    whole = batches(photographs)
    for name, spoil in hostile(tmp_path / "04.jpg"):
        spoil()
        with pytest.raises(ValueError, match=r"1 image files can't be read.*04\.jpg"):
            batches(photographs)
        with pytest.raises(ValueError, match=r"1 image files can't be read.*04\.jpg") as refused:
            batches(photographs, workers=2)
        assert "\n" not in str(refused.value), name
        capsys.readouterr()
        skipped = batches(photographs, on_bad_image="skip")
        assert capsys.readouterr().err.count("04.jpg") == 1
        assert [b.index.tolist() for b in skipped] == [b.index.tolist() for b in whole]
        for got, want in zip(skipped, whole, strict=True):
            for row, view, before in zip(got.index.tolist(), got.images, want.images, strict=True):
                rng = np.random.default_rng([3, got.epoch, got.step, row, 0xC809])
                instead = CROPS.of(photographs.files[7], 16, rng) if row == 4 else before
                assert torch.equal(view, instead)
        for got, want in zip(batches(photographs, on_bad_image="skip", start=3, workers=2), skipped[3:], strict=True):
            assert torch.equal(got.images, want.images)
        told = batches(photographs, on_bad_image="tell")
        assert [len(batch.bad) for batch in told] == [int(4 in batch.index) for batch in told]


def test_nothing_stands_in_for_a_class_that_is_gone(photographs, tmp_path):
    for i in (1, 4, 7, 10):
        (tmp_path / f"{i:02}.jpg").unlink()
    for workers in (0, 2):
        with pytest.raises(ValueError, match="none of the 4 training images of a class can be read") as refused:
            batches(photographs, on_bad_image="skip", workers=workers)
        assert "\n" not in str(refused.value)


def test_squares_of_images_that_are_not_larger_stream_as_before(tmp_path):
    files = [photograph(tmp_path / f"{i}.png", 16, 16, i) for i in range(8)]
    data = ImageSet(torch.arange(8), 16, files=files)
    for batch in batches(data):
        assert torch.equal(batch.images, torch.stack([decode(files[i], 16) for i in batch.index]))


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_views_of_a_turned_tiff_are_cut_from_all_of_it(tmp_path, turned, compression):
    """Pillow turns these by itself, at another moment than JPEGs; the view of everything is the whole."""
    upright = Image.new("RGB", (60, 30))
    upright.paste((255, 0, 0), (0, 0, 60, 15))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if turned == 1 else upright.transpose(Image.Transpose(undo[turned]))
    exif = Image.Exif()
    exif[0x0112] = turned
    stored.save(tmp_path / "a.tif", exif=exif.tobytes(), compression=compression)
    view = Crops(1, (1.0, 1.0), (2.0, 2.0)).of(str(tmp_path / "a.tif"), 16, np.random.default_rng(0))[0]
    assert torch.equal(view, cut(torch.from_numpy(np.array(upright)).permute(2, 0, 1), (0, 0, 60, 30), 16))
