"""Corruptions against closed forms, PIL and colorsys; the readers against folders that the test writes."""

import colorsys
import io
import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.metrics import average_precision_score, roc_auc_score

from gradmix.eval.detectors import load
from gradmix.eval.features.extraction import Model
from gradmix.eval.protocols import corruptions, robustness
from gradmix.eval.protocols.corruptions import CORRUPTIONS, SEVERITIES, corrupt, plasma
from gradmix.eval.protocols.robustness import METHODS, summarise
from gradmix.eval.runs.folder import read_run
from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.images import to_square
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.runs.folder import read_config

DETERMINISTIC = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def photos(size):
    return torch.stack([to_square(Image.fromarray(image), size) for image in load_sample_images().images])


def grey(value, size=64, count=4):
    return torch.full((count, 3, size, size), value, dtype=torch.uint8)


def point(size=33):
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    images[:, :, size // 2, size // 2] = 255
    return images


def test_the_fifteen_of_the_paper():
    assert list(CORRUPTIONS) == [
        *("gaussian_noise", "shot_noise", "impulse_noise"),
        *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness"),
        *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    ]


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [16, 32, 96])
def test_damage_grows_with_severity(kind, size):
    images = photos(size)
    damage = [(corrupt(images, kind, s).double() - images).square().mean().item() for s in SEVERITIES]
    assert damage[0] > 1 and all(a < b for a, b in pairwise(damage)), damage


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_seed_decides_and_the_input_stays(kind):
    images = photos(24)
    before = images.clone()
    first, again, other = (corrupt(images, kind, 3, seed) for seed in (0, 0, 1))
    assert first.dtype == torch.uint8 and first.shape == images.shape and torch.equal(images, before)
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (kind in DETERMINISTIC)
    twins = corrupt(images[:1].repeat(2, 1, 1, 1), kind, 3)
    assert torch.equal(twins[0], twins[1]) == (kind in DETERMINISTIC)


@pytest.mark.parametrize(
    "kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate"]
)
def test_nothing_to_blur_in_a_flat_image(kind):
    assert (corrupt(grey(77, 32), kind, 5).int() - 77).abs().max() <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_of_a_point_is_a_disk(severity):
    size, fine = 33, 101
    radius = 0.5 + CORRUPTIONS["defocus_blur"][1][severity - 1] * size
    got = corrupt(point(size), "defocus_blur", severity)[0, 0].double().numpy() / 255
    offsets = (np.arange(fine) + 0.5) / fine - 0.5
    expected = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = row - size // 2 + offsets[:, None], column - size // 2 + offsets
            expected[row, column] = (x**2 + y**2 <= radius**2).mean()
    np.testing.assert_allclose(got, expected / (np.pi * radius**2), atol=0.006)


def test_motion_blur_of_a_point_is_a_line_within_45_degrees():
    size = 65
    length = CORRUPTIONS["motion_blur"][1][4] * size
    blurred = corrupt(point(size).repeat(8, 1, 1, 1), "motion_blur", 5)[:, 0].double().numpy()
    angles = []
    for image in blurred:
        rows, columns = np.nonzero(image)
        spread = np.cov(rows, columns, aweights=image[rows, columns], bias=True)
        variances, axes = np.linalg.eigh(spread)
        assert variances[1] == pytest.approx(length**2 / 12, rel=0.15)
        assert variances[0] < 0.5
        angles.append(np.degrees(np.arctan(axes[0, 1] / axes[1, 1])))
    assert np.abs(angles).max() < 47 and np.ptp(angles) > 15


def test_every_image_is_blurred_with_its_own_kernel():
    generator = torch.Generator().manual_seed(0)
    images, kernels = torch.rand(4, 3, 9, 9, generator=generator), torch.rand(4, 3, 3, generator=generator)
    for image, kernel, found in zip(images, kernels, corruptions.convolve(images, kernels), strict=True):
        alone = F.conv2d(F.pad(image[:, None], (1,) * 4, mode="replicate"), kernel[None, None])[:, 0]
        torch.testing.assert_close(found, alone)


def test_elastic_transform_moves_pixels_as_far_as_it_says():
    """An image that is its own coordinates tells how far; away from the edges, which are mirrored."""
    size, shift = 64, 0.03
    y, x = torch.meshgrid(*[torch.arange(size) / size] * 2, indexing="ij")
    images = torch.stack([x, y, x]).expand(200, 3, size, size)
    moved = corruptions.elastic_transform(images, shift, torch.Generator().manual_seed(0)) - images
    # At a corner of the grid there is a control point; 13 pixels from there, where two of six lie, are the next ones.
    places = [round(step * (size - 1) / 5) for step in (2, 3)]
    for channel in (0, 1):
        found = moved[:, channel][:, places][:, :, places].std()
        assert found == pytest.approx(shift, rel=0.1)


def test_noise_has_the_strength_that_the_table_says():
    images = grey(128, 128)
    for severity in SEVERITIES:
        deviation = CORRUPTIONS["gaussian_noise"][1][severity - 1]
        noise = corrupt(images, "gaussian_noise", severity).double() / 255 - 128 / 255
        assert noise.std() == pytest.approx(deviation, rel=0.02)
        photons = CORRUPTIONS["shot_noise"][1][severity - 1]
        noise = corrupt(images, "shot_noise", severity).double() / 255 - 128 / 255
        assert noise.var() == pytest.approx(128 / 255 / photons, rel=0.05)
        share = CORRUPTIONS["impulse_noise"][1][severity - 1]
        values = corrupt(images, "impulse_noise", severity)
        for extreme in (0, 255):
            assert (values == extreme).double().mean() == pytest.approx(share / 2, rel=0.1)
        assert set(values.unique().tolist()) == {0, 128, 255}


def test_brightness_raises_the_value_in_hsv():
    image = photos(8)
    got = corrupt(image, "brightness", 4)
    for before, after in zip(
        image.permute(0, 2, 3, 1).reshape(-1, 3), got.permute(0, 2, 3, 1).reshape(-1, 3), strict=True
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255).tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
        assert np.abs(np.array(expected) * 255 - after.numpy()).max() <= 0.51


def test_contrast_pixelate_and_jpeg_against_their_definitions():
    images = photos(32)
    got = corrupt(images, "contrast", 2).double()
    mean = images.double().mean(dim=(2, 3), keepdim=True)
    assert (got - (mean + 0.5 * (images - mean))).abs().max() < 0.51
    blocks = images.double().view(2, 3, 16, 2, 16, 2).mean((3, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (corrupt(images, "pixelate", 2).double() - blocks).abs().max() < 1.01
    for severity, few in ((1, 19), (3, 13), (5, 8)):  # blocks of unequal size: a pixel is where its middle is
        block = ((torch.arange(32) + 0.5) * few / 32).long()
        member = torch.nn.functional.one_hot(block, few).double()
        means = torch.einsum("ncyx,yi,xj->ncij", images.double(), member, member)
        means /= torch.outer(member.sum(0), member.sum(0))
        expected = means[:, :, block][..., block]
        assert (corrupt(images, "pixelate", severity).double() - expected).abs().max() < 1.01  # rounded twice
    file = io.BytesIO()
    Image.fromarray(images[1].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=30)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(corrupt(images, "jpeg_compression", 3)[1], expected)


def test_weather_whitens_the_dark_and_fog_keeps_the_range():
    for kind in ("snow", "frost"):
        assert corrupt(grey(0), kind, 5).double().mean() > corrupt(grey(0), kind, 1).double().mean() > 0
    images = photos(64)
    assert (corrupt(images, "fog", 5).amax((1, 2, 3)) <= images.amax((1, 2, 3))).all()
    rough, smooth = (plasma(images.float(), decay, torch.Generator().manual_seed(0)) for decay in (1.2, 3.0))
    assert rough.diff(dim=3).abs().mean() > 2 * smooth.diff(dim=3).abs().mean()
    assert rough.min() == 0 and rough.max() == 1


def test_bad_arguments_are_named():
    for arguments, message in (
        ((grey(0), "rain", 1), "kind: expected one of gaussian_noise"),
        ((grey(0), "fog", 6), "severity: expected 1 to 5, got 6"),
        ((grey(0).float(), "fog", 1), "images: expected .* uint8"),
        ((grey(0)[0], "fog", 1), "images: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            corrupt(*arguments)


def test_mean_corruption_error_by_hand():
    clean = np.array([90, 80, 50, 100])
    counts = {("fog", s): np.array([50, 80, 60, 100]) for s in SEVERITIES}
    counts |= {("snow", s): np.array([100 - 10 * s, 100, 100, 100]) for s in SEVERITIES}
    result = summarise(clean, counts)
    assert result["corruptions/clean/linear"] == pytest.approx(0.8)
    assert result["corruptions/snow/2/knn"] == pytest.approx(0.8)
    assert result["corruptions/snow/knn"] == pytest.approx(0.7)
    assert result["corruptions/mean_error/knn"] == pytest.approx((0.5 + 0.3) / 2)
    # fog: 2.5 wrong of the reference's 2.0; snow: 1.5 of none, which counts as one image of a hundred
    assert result["corruptions/mce/knn"] == pytest.approx((2.5 / 2.0 + 1.5 / 0.01) / 2)
    assert result["corruptions/mce/linear"] == pytest.approx((1.0 / 2.0 + 0) / 2)


@pytest.fixture(scope="module")
def everything():
    """All digits of the run's test set, as CIFAR-10-C numbers them: by the data set's own classes."""
    data = load_data(DataConfig(name="digits", image_size=16, split=None), 0)
    return data.test.images, data.test.labels


def scores(run, name="metrics_corruptions.json"):
    return json.loads((run / name).read_text())


def test_cifar10_c_layout(digits_run, command, tmp_path, everything):
    images, labels = everything
    arrays = images.permute(0, 2, 3, 1).numpy()
    black = np.zeros_like(arrays)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels.numpy(), 5))
    np.save(folder / "gaussian_noise.npy", np.tile(arrays, (5, 1, 1, 1)))
    np.save(folder / "fog.npy", np.concatenate([arrays, arrays, black, black, black]))
    np.save(folder / "speckle_noise.npy", black)  # one of the four extra kinds
    result = command("eval", f"run={digits_run}", f"corruptions={folder}", "out=out")
    assert result.code == 0, result.err
    assert "2 of 15 kinds" in result.out
    got, clean = scores(tmp_path / "out"), scores(digits_run, "metrics.json")
    names = {"knn": "knn/top1", "linear": "linear/top1", "knn_pixels": "knn_pixels/top1"}
    for method in METHODS:
        expected = clean[names[method]]
        assert got[f"corruptions/clean/{method}"] == pytest.approx(expected)
        assert got[f"corruptions/gaussian_noise/{method}"] == pytest.approx(expected)
        assert got[f"corruptions/fog/2/{method}"] == pytest.approx(expected)
        # black images all get one class, right for a sixth of the images or so
        assert 0.1 < got[f"corruptions/fog/3/{method}"] < 0.25
        mean = np.mean([got[f"corruptions/fog/{s}/{method}"] for s in SEVERITIES])
        assert got[f"corruptions/fog/{method}"] == pytest.approx(mean)
    assert "corruptions/speckle_noise/knn" not in got

    run = shutil.copytree(digits_run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("memory_gib: 4.0", "memory_gib: 0"))
    assert config != (run / "config.yaml").read_text()
    assert command("eval", f"run={run}", f"corruptions={folder}", "out=small").code == 0
    assert (tmp_path / "small/features/train_pixels.safetensors").is_file()  # not in memory, and the same numbers
    small = scores(tmp_path / "small")
    for numbers in (small, got):
        del numbers["git/revision"], numbers["evaluation"]["command"]  # somebody may have committed in between
    assert small == got

    np.save(folder / "fog.npy", arrays)
    result = command("eval", f"run={digits_run}", f"corruptions={folder}", "out=out")
    assert result.code == 2 and "fog.npy: expected uint8 [" in result.err
    (folder / "fog.npy").write_bytes(b"no array")
    result = command("eval", f"run={digits_run}", f"corruptions={folder}", "out=out")
    assert result.code == 2 and "fog.npy: not a readable .npy file" in result.err


def test_tinyimagenet_c_layout(digits_run, command, tmp_path, everything):
    images, labels = everything
    folder = tmp_path / "Tiny-ImageNet-C"
    for severity in SEVERITIES:
        for i in range(120):
            path = folder / "snow" / str(severity) / str(labels[i].item()) / f"test_{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = images[i] if severity < 5 else torch.zeros_like(images[i])
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    result = command("eval", f"run={digits_run}", f"corruptions={folder}", "out=out")
    assert result.code == 0, result.err
    got = scores(tmp_path / "out")
    assert got["corruptions/snow/1/knn_pixels"] > 0.9
    assert got["corruptions/snow/1/linear"] == got["corruptions/snow/4/linear"]
    assert 0.05 < got["corruptions/snow/5/linear"] < 0.4

    (tmp_path / "empty").mkdir()
    for where, message in (
        ("nowhere", "nowhere is not a folder"),
        (tmp_path / "empty", "is in no layout known here"),
    ):
        result = command("eval", f"run={digits_run}", f"corruptions={where}", "out=out")
        assert result.code == 2 and message in result.err and len(result.err.strip().splitlines()) == 1
    (tmp_path / "others" / "fog" / "1" / "7").mkdir(parents=True)
    result = command("eval", f"run={digits_run}", "corruptions=others", "out=out")
    assert result.code == 2 and "holds no images to read of the known classes" in result.err


def test_corrupted_files_that_can_not_be_read(digits_run, command, tmp_path, everything):
    images, labels = everything
    known = [int(name) for name in load_data(read_config(digits_run).data, 0).classes]
    places = [(severity, i) for severity in (2, 3) for i in range(60) if labels[i] in known]
    for severity, i in places:
        path = tmp_path / "C" / "snow" / str(severity) / str(labels[i].item()) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(path)
    bad = list((tmp_path / "C/snow/3").rglob("*.png"))  # all of one severity
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    asked = (f"run={digits_run}", "corruptions=C", "detectors=[deep_knn]", "out=out")
    result = command("eval", *asked)
    assert result.code == 2 and f"{len(bad)} image files can't be read" in result.err and bad[0].name in result.err
    assert not (tmp_path / "out/metrics_corruptions.json").exists()

    asked = (*asked, "data.on_bad_image=skip")
    result = command("eval", *asked)
    assert result.code == 0, result.err
    assert f"image files that can't be read, left out: {len(bad)}" in result.out
    # a kind without severity 1 is none that is missing
    assert "  snow  " in result.out and "1 of 15 kinds; missing" in result.out and ", snow," not in result.out
    got = scores(tmp_path / "out")
    assert got["data/bad_images"] == len(bad) and "corruptions/snow/3/knn" not in got
    # the whole ones are the test images as they are
    assert got["corruptions/snow/knn"] == got["corruptions/snow/2/knn"] > 0.5
    shutil.rmtree(tmp_path / "C/snow/2")
    result = command("eval", *asked)
    assert result.code == 2 and "holds no images to read of the known classes" in result.err


def test_corruptions_made_here(digits_run, command, tmp_path):
    result = command("eval", f"run={digits_run}", "corruptions=make", "out=out")
    assert result.code == 0, result.err
    assert "mCE" in result.out and "of 15 kinds" not in result.out
    got = scores(tmp_path / "out")
    for kind in CORRUPTIONS:
        assert f"  {kind} " in result.out
        assert got[f"corruptions/{kind}/1/knn_pixels"] > got[f"corruptions/{kind}/5/knn_pixels"] - 0.02
    assert got["corruptions/clean/knn_pixels"] > 1 - got["corruptions/mean_error/knn_pixels"]
    ratios = [got[f"corruptions/{kind}/ce/knn"] for kind in CORRUPTIONS]
    assert got["corruptions/mce/knn"] == pytest.approx(np.mean(ratios))
    assert not (digits_run / "metrics_corruptions.json").exists()


def test_a_folder_that_makes_no_sense_is_refused_before_anything_is_computed(
    digits_run, command, tmp_path, monkeypatch
):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.zeros(5, dtype=np.int64))
    monkeypatch.setattr(robustness, "subject_of", lambda *_: pytest.fail("features were asked for"))
    result = command("eval", f"run={digits_run}", f"corruptions={folder}", "out=out")
    assert result.code == 2 and "has labels.npy, but no gaussian_noise.npy" in result.err
    np.save(folder / "fog.npy", np.zeros((5, 8, 8, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.zeros((5, 1), dtype=np.int64))
    result = command("eval", f"run={digits_run}", f"corruptions={folder}", "out=out")
    assert result.code == 2 and "expected five severities of labels" in result.err


def test_other_unknown_images_leave_the_run_s_features_alone(digits_run, command, tmp_path, everything):
    images, labels = everything
    (tmp_path / "fog").mkdir()
    np.save(tmp_path / "fog/labels.npy", np.tile(labels.numpy(), 5))
    np.save(tmp_path / "fog/fog.npy", np.tile(images.permute(0, 2, 3, 1).numpy(), (5, 1, 1, 1)))
    (tmp_path / "far").mkdir()
    for i in range(30):
        Image.fromarray(np.full((16, 16, 3), 8 * i, dtype=np.uint8)).save(tmp_path / f"far/{i}.png")
    run = shutil.copytree(digits_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    quick = (f"run={run}", "corruptions=fog", "detectors=[deep_knn]", "device=cpu")
    plain = command("eval", *quick)
    assert plain.code == 0, plain.err
    plain = scores(run)
    result = command("eval", *quick, "unknown_root=far")
    assert result.code == 0, result.err
    far = scores(run)
    assert "data/unknown_root" not in plain and far["data/unknown_root"] == "far"
    assert far["osr/deep_knn/full_spectrum/auroc"] != plain["osr/deep_knn/full_spectrum/auroc"]
    assert far["corruptions/clean/knn"] == plain["corruptions/clean/knn"]
    left = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert left.pop(run / "metrics_corruptions.json") and left == before  # no file more, and the same bytes
    assert read_run(run).why_no_images == ""


def test_full_spectrum_of_known_images_alone(digits_run, tmp_path, everything):
    """A corruption that changes nothing: the numbers of the images as they are, and no others."""
    images, labels = everything
    np.save(tmp_path / "labels.npy", np.tile(labels.numpy(), 5))
    np.save(tmp_path / "fog.npy", np.tile(images.permute(0, 2, 3, 1).numpy(), (5, 1, 1, 1)))
    config = read_config(digits_run)
    data = load_data(config.data, config.seed)
    data = replace(data, test=data.test.select((data.test.labels >= 0).nonzero()[:, 0]))
    (tmp_path / "out").mkdir()
    got = robustness.evaluate_corruptions(digits_run, config, data, str(tmp_path), out=tmp_path / "out")
    assert got["skipped"] == {"how well unknown images are found": "the test set has no unknown classes"}
    plain, found = scores(digits_run, "metrics.json"), {k: v for k, v in got.items() if k.startswith("osr/")}
    assert len(found) == 8 and "osr/deep_knn/full_spectrum/false_alarms" in found
    for key, value in found.items():
        assert value == pytest.approx(plain[key.replace("/full_spectrum", "")], abs=1e-3), key


def test_full_spectrum_against_sklearn(digits_run, command, tmp_path, everything):
    """Known images are mixed with what they look like upside down; unknown ones are as they were."""
    images, labels = everything
    folder, upside_down = tmp_path / "turned", images.flip(2)
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels.numpy(), 5))
    np.save(folder / "fog.npy", np.tile(upside_down.permute(0, 2, 3, 1).numpy(), (5, 1, 1, 1)))
    asked = "detectors=[deep_knn,energy,deep_knn@projections]"
    result = command("eval", f"run={digits_run}", f"corruptions={folder}", asked, "out=out")
    assert result.code == 0, result.err
    got = scores(tmp_path / "out")
    assert command("eval", f"run={digits_run}", asked, "out=plain").code == 0
    plain = scores(tmp_path / "plain", "metrics.json")

    config = read_config(digits_run)
    data, model = load_data(config.data, config.seed), Model(digits_run)
    known = data.test.labels >= 0
    assert torch.equal(data.test.images[known], images[torch.isin(labels, torch.tensor(data.known))])
    with torch.inference_mode():
        features = model.backbone(torch.cat([data.test.images, data.test.images[known].flip(2)]))
        seen = {"deep_knn": features, "deep_knn_projections": torch.nn.functional.normalize(model.head(features))}
    folders = {"deep_knn": "detector", "deep_knn_projections": "detectors/deep_knn_projections"}
    for key, folder in folders.items():
        verdict = load(tmp_path / "plain" / folder).judge(seen[key])
        clean, turned = np.split(verdict.score, [len(known)])
        score = np.concatenate([clean[known], *[turned] * 5, clean[~known]])
        unknown = np.arange(len(score)) >= 6 * int(known.sum())
        assert got[f"osr/{key}/full_spectrum/auroc"] == pytest.approx(roc_auc_score(unknown, score), abs=2e-5)
        assert got[f"osr/{key}/full_spectrum/aupr"] == pytest.approx(average_precision_score(unknown, score), abs=1e-4)
        least = np.sort(score[unknown])[::-1][math.ceil(0.95 * unknown.sum()) - 1]
        assert got[f"osr/{key}/full_spectrum/fpr95"] == pytest.approx((score[~unknown] >= least).mean(), abs=1e-3)
        alarms = (verdict.score > verdict.threshold).astype(float)
        expected = (alarms[: len(known)][known].sum() + 5 * alarms[len(known) :].sum()) / (~unknown).sum()
        assert got[f"osr/{key}/full_spectrum/false_alarms"] == pytest.approx(expected, abs=1e-3)
    for key in ("deep_knn", "energy", "deep_knn_projections", "pixels"):
        assert got[f"osr/{key}/full_spectrum/auroc"] < plain[f"osr/{key}/auroc"] - 0.02
        assert ", full_spectrum" in result.out
