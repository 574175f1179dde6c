"""The whole image as a square: cropped, padded or squashed, alike in training's sets and in a saved backbone."""

import numpy as np
import pytest
import torch
from PIL import Image

from gradmix.ssl.config import FITS, DataConfig
from gradmix.ssl.data.images import ImageSet, decode, to_square
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.data.views import Crops
from gradmix.ssl.networks.backbones import Backbone, ResNet, backbone_metadata, load_backbone
from gradmix.ssl.runs.files import write_tensors


@pytest.fixture
def wide():
    """Three 20 x 20 fields side by side: red, green, blue."""
    pixels = np.zeros((20, 60, 3), np.uint8)
    for field in range(3):
        pixels[:, 20 * field : 20 * field + 20, field] = 255
    return Image.fromarray(pixels)


def test_fits_by_hand(wide):
    green = torch.tensor([0, 255, 0])
    crop, pad, squash = (to_square(wide, 12, fit).int() for fit in FITS)
    assert crop.shape == pad.shape == squash.shape == (3, 12, 12)
    assert (crop[:, :, 2:10] == green.view(3, 1, 1)).all()
    assert pad[:, :4].max() == 0 and pad[:, 8:].max() == 0  # 12 x 4, in the middle of black
    for square in (pad, squash):
        assert [square[:, 6, x].argmax().item() for x in (1, 6, 10)] == [0, 1, 2]
    assert squash[:, 0].sum() > 0 and squash[:, 11].sum() > 0
    tall = to_square(wide.transpose(Image.Transpose.ROTATE_90), 12, "pad")
    assert tall[:, :, :4].max() == 0 and tall[:, :, 8:].max() == 0


@pytest.mark.parametrize("size", [(1, 999), (999, 1), (7, 7)])
def test_every_shape_has_every_fit(size):
    for fit in FITS:
        assert to_square(Image.new("RGB", size, (9, 9, 9)), 8, fit).shape == (3, 8, 8)


@pytest.mark.parametrize("fit", FITS)
def test_a_backbone_keeps_the_fit_of_its_training(tmp_path, wide, fit):
    for name in ("a", "b"):
        for i in range(4):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            wide.save(tmp_path / "images" / name / f"{i}.png")
    config = DataConfig("imagefolder", str(tmp_path / "images"), image_size=12, fit=fit)
    expected = to_square(wide, 12, fit)
    for data in (load_data(config, 0), load_data(config, 0, pixels=False)):
        for images in data.sets().values():
            assert torch.equal(images[0][0], expected)
    encoder = ResNet("resnet18", 4, "small")
    write_tensors(tmp_path / "backbone.safetensors", encoder.state_dict(), backbone_metadata(encoder, 12, fit))
    backbone = load_backbone(tmp_path)
    path = str(tmp_path / "images/a/0.png")
    assert torch.equal(backbone.transform(path), expected) and torch.equal(backbone.transform(wide), expected)


def test_weights_from_before_there_was_a_choice_crop(wide):
    assert torch.equal(Backbone(ResNet("resnet18", 4, "small"), 12).transform(wide), to_square(wide, 12, "crop"))


def test_no_other_fit(tmp_path):
    with pytest.raises(ValueError, match=r"data\.fit: expected one of crop, pad, squash, got 'stretch'"):
        load_data(DataConfig("digits", fit="stretch"), 0)


def test_a_set_on_which_nobody_looked_may_be_lenient(tmp_path):
    images = ImageSet(torch.tensor([0]), 8, files=[str(tmp_path / "gone.png")], lenient=True)
    assert images[0][0].max() == 0
    with pytest.raises(ValueError, match="No such file"):
        decode(images.files[0], 8)


RAMP = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)


@pytest.mark.parametrize("pixels", [RAMP, (RAMP * 65535).astype(np.uint16), (RAMP * 255).astype(np.uint8)])
@pytest.mark.parametrize("ending", ["tif", "png"])
def test_every_depth_has_the_same_greys(tmp_path, pixels, ending):
    if pixels.dtype == np.float32 and ending == "png":
        pytest.skip("PNG has no fractions")
    path = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(path)
    expected = (RAMP * 255).round()
    views = Crops(2, (1.0, 1.0), (1.0, 1.0)).of(str(path), 32, np.random.default_rng(0))
    for image in (decode(path, 32), *views):
        assert np.abs(image.numpy() - expected).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "why"),
    [
        (np.where(RAMP > 0.5, np.float32("nan"), RAMP), "pixels from nan to nan; floats go from 0 to 1"),
        (RAMP * 255, "pixels from 0 to 255; floats go from 0 to 1"),
        (RAMP - 1, "pixels from -1 to 0; floats go from 0 to 1"),
        ((RAMP * 255).astype(np.int32), "integers of 32 bits or with a sign"),
        ((RAMP * 255).astype(np.int16), "integers of 32 bits or with a sign"),
    ],
)
def test_pixels_without_a_known_white_are_refused_by_name(tmp_path, pixels, why):
    path = tmp_path / "a.tif"
    Image.fromarray(pixels).save(path)
    for read in (
        lambda: decode(path, 32),
        lambda: Crops(2, (1, 1), (1, 1)).of(str(path), 32, np.random.default_rng(0)),
    ):
        with pytest.raises(ValueError, match=r"a\.tif: not a readable image") as error:
            read()
        assert why in str(error.value)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "1-bit transparency"])
def test_what_is_transparent_lies_on_white(tmp_path, kind):
    """A black square on a ground whose hidden colour is black."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6, 3] = 255
    image = Image.fromarray(pixels)
    path = tmp_path / "a.png"
    if kind == "1-bit transparency":  # one colour of an RGB image stands for nothing
        pixels[pixels[..., 3] == 0, :3] = (1, 2, 3)
        Image.fromarray(pixels[..., :3].copy()).save(path, transparency=(1, 2, 3))
    elif kind == "P":
        image.quantize(4).save(path)
    else:
        image.convert(kind).save(path)
    expected = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    expected[:, 2:6, 2:6] = 0
    assert torch.equal(decode(str(path), 8), expected)
