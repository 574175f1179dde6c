"""Features on disk: made once, read again, made anew when weights, images or labels change."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gradmix.eval.classifiers.knn import KNNClassifier
from gradmix.eval.classifiers.linear import LinearProbe
from gradmix.eval.features.cache import cached_arrays, frozen, weights_key
from gradmix.eval.features.extraction import Model, extract, extract_together, raw_pixels, raw_pixels_bytes
from gradmix.eval.features.mapped import write_arrays
from gradmix.ssl.data.images import ImageSet, normalize
from gradmix.ssl.networks.backbones import Backbone, ResNet, backbone_metadata
from gradmix.ssl.runs.files import write_tensors


@pytest.fixture
def model(tmp_path):
    encoder = ResNet("resnet18", 4, "small")
    write_tensors(tmp_path / "backbone.safetensors", encoder.state_dict(), backbone_metadata(encoder, 8))
    head = {"layers.0.weight": (32, 32), "layers.0.bias": (32,), "layers.2.weight": (16, 32), "layers.2.bias": (16,)}
    save_file({name: torch.randn(shape) for name, shape in head.items()}, tmp_path / "head.safetensors")
    return Model(tmp_path)


def images(n=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=generator).to(torch.uint8)
    return ImageSet(torch.arange(n) % 5, 8, pixels)


def test_features_are_the_networks(model, tmp_path):
    found = model.features(images(), tmp_path / "train.safetensors")
    with torch.inference_mode():
        expected = model.backbone.encoder(normalize(images().images))
        projected = torch.nn.functional.normalize(model.head(expected), dim=1)
    torch.testing.assert_close(found["features"], expected)
    torch.testing.assert_close(found["projections"], projected)
    stored = load_file(tmp_path / "train.safetensors")  # any reader of safetensors can
    assert stored.keys() == found.keys() and all(torch.equal(stored[name], found[name]) for name in stored)


@pytest.mark.parametrize("change", [{"layers.0.weight": (32, 31)}, {"layers.2.weight": None}, {"more": (3,)}])
def test_a_head_of_another_network_is_one_line(model, tmp_path, change):
    head = load_file(tmp_path / "head.safetensors")
    for name, shape in change.items():
        head.pop(name, None)
        head |= {} if shape is None else {name: torch.zeros(shape)}
    save_file(head, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors: not the projection head of its backbone") as refused:
        Model(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_second_time_is_a_read(model, tmp_path, monkeypatch):
    path, other = tmp_path / "train.safetensors", tmp_path / "out/train.safetensors"
    first = {name: value.clone() for name, value in model.features(images(), path).items()}
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(model.backbone, "forward", lambda batch: pytest.fail("the network ran again"))
    for again in (model.features(images(), path), model.features(images(), other, [path])):
        assert all(torch.equal(again[name], first[name]) for name in first)
    assert path.stat().st_mtime_ns == written and other.is_file()
    again["features"][:] = 0  # a private copy: the file stays
    assert torch.equal(model.features(images(), path)["features"], first["features"])


@pytest.mark.parametrize("change", ["weights", "statistics", "head", "pixels", "labels", "damage", "another file"])
def test_any_change_makes_them_anew(model, tmp_path, change):
    path, data = tmp_path / "train.safetensors", images()
    model.features(data, path)
    match change:
        case "weights":
            model.backbone.encoder.layer4[1].bn2.weight.data[0] += 1
        case "statistics":
            model.backbone.encoder.bn1.running_mean[0] += 1
        case "head":
            model.head[2].bias.data += 1
        case "pixels":
            data.images[7, 0, 0, 0] += 1
        case "labels":
            data.labels[7] += 1
        case "damage":
            path.write_bytes(path.read_bytes()[:200])
        case "another file":
            save_file({"features": torch.ones(3)}, path)
    ran, forward = [], model.backbone.forward
    model.backbone.forward = lambda batch: ran.append(len(batch)) or forward(batch)
    model.features(data, path)
    assert sum(ran) == 300


def test_files_are_known_by_name_size_and_time(model, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    data = ImageSet(torch.zeros(3).long(), 8, files=[str(tmp_path / f"{i}.png") for i in range(3)])
    before = model.features(data, tmp_path / "f.safetensors")["features"].clone()
    Image.new("RGB", (8, 8), (255, 255, 255)).save(tmp_path / "1.png")
    after = model.features(data, tmp_path / "f.safetensors")["features"]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_features_beyond_the_limit_are_mapped_and_evaluated_alike(model, tmp_path):
    data = images()
    whole = model.features(data, tmp_path / "a.safetensors")["features"]
    mapped = model.features(data, tmp_path / "a.safetensors", limit=100)["features"]
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, whole.numpy())
    for fit in (KNNClassifier(5), LinearProbe(lr=1, weight_decay=1e-2)):
        ours, theirs = (fit.fit(part, data.labels).predict_proba(whole) for part in (mapped, whole))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path, shapes = tmp_path / "a.safetensors", {"x": ("F32", (2,))}
    write_arrays(path, shapes, lambda arrays: arrays["x"].fill(1), {"key": "key"})

    def power_cut(arrays):
        arrays["x"].fill(2)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_arrays(path, shapes, power_cut, {"key": "new"})
    assert cached_arrays(path, "key")["x"].tolist() == [1, 1] and cached_arrays(path, "new") is None


def test_room_is_there_before_anything_is_written(tmp_path):
    def fill(arrays):
        (temporary,) = tmp_path.iterdir()
        assert temporary.stat().st_blocks * 512 >= 4 * 10**6

    write_arrays(tmp_path / "x", {"features": ("F32", (1000, 1000))}, fill)


def test_frozen_notices_every_bit():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    with frozen(network):
        network.eval()(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="BatchNorm"), frozen(network):
        network.train()(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError), frozen(network):
        network[0].bias.data[1] = -network[0].bias.data[1]
    network[0].bias.data[0] = 0.0
    zero = weights_key(network)
    network[0].bias.data[0] = -0.0
    assert weights_key(network) != zero  # equal numbers, other bits


def test_frozen_gives_every_part_its_mode_back():
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3).eval(), torch.nn.BatchNorm2d(3))
    assert network.training
    with frozen(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == [True, False, True]


COUNTS = {"train": 700, "held_out": 1, "test": 512}  # uneven turns, fewer images than processes, whole batches


def one_process(rank: int, folder: Path) -> None:
    seen = [0]
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.__setitem__(0, seen[0] + len(inputs[0]) * isinstance(module, Backbone))
    )
    extract_together(folder, {name: images(n) for name, n in COUNTS.items()}, "cpu")
    torch.save(seen, folder / f"{rank}.pt")


def test_processes_extract_a_share_each(model, in_processes, tmp_path):
    in_processes(one_process, 3)
    alone = Model(tmp_path)
    for name, n in COUNTS.items():
        expected = alone.features(images(n), tmp_path / "alone" / f"{name}.safetensors")
        found = load_file(tmp_path / f"features/{name}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        key = safe_open(tmp_path / f"features/{name}.safetensors", "pt").metadata()["key"]
        assert cached_arrays(tmp_path / "alone" / f"{name}.safetensors", key) is not None  # evaluate finds them by it
    # batches of 256: 700 are 3, the single image 1, 512 are 2
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)] == [[256 + 1 + 256], [256 + 256], [700 - 512]]


@pytest.mark.parametrize("size", [8, 64])
def test_raw_pixels_are_mapped_where_they_exceed_the_limit(size, tmp_path):
    pixels = torch.randint(0, 256, (1100, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    some, path = ImageSet(torch.zeros(1100).long(), size, pixels), tmp_path / "pixels.safetensors"
    expected, size = raw_pixels(some), raw_pixels_bytes(some)
    assert expected.nbytes == size
    assert torch.equal(raw_pixels(some, path, size), expected) and not path.exists()
    mapped = raw_pixels(some, path, size - 1)
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, expected)
    made = path.stat().st_mtime_ns
    assert np.array_equal(raw_pixels(some, path, size - 1), expected) and path.stat().st_mtime_ns == made
    other = ImageSet(some.labels, some.size, some.images.flip(0))
    assert np.array_equal(raw_pixels(other, path, 0), expected.flip(0))


def test_features_that_are_not_finite_blame_no_training_that_never_was():
    images = ImageSet(torch.zeros(2, dtype=torch.long), 8, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(FloatingPointError, match="its weights are; a training that came to this has diverged"):
        extract(lambda batch: batch.flatten(1) / 0, images, torch.device("cpu"))
