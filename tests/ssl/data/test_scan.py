"""200 image files, 20 of which can't be read."""

import json
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.images import ImageSet, decode
from gradmix.ssl.data.kept import kept_file
from gradmix.ssl.data.open_set import load_data
from gradmix.ssl.data.scan import Scan

SIZE = 24


def whole(path, colour=(200, 100, 50), size=(SIZE, SIZE), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def noise(path, size=64):
    """A file that does not compress, so that half of it is half of the image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png_header(side):
    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def write_bad(folder):
    """Twenty files that no one can use, in eleven ways."""
    jpeg, png, webp = noise(folder / "x.jpg"), noise(folder / "x.png"), noise(folder / "x.webp")
    for name in ("x.jpg", "x.png", "x.webp"):
        (folder / name).unlink()
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255  # in the compressed pixels
    contents = {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated late.jpg": jpeg[:-300],
        "truncated.png": png[: len(png) // 2],
        "truncated.webp": webp[: len(webp) // 2],
        "only a header.jpg": jpeg[:300],
        "only a header.png": png[:60],
        "empty.jpg": b"",
        "empty.png": b"",
        "empty.gif": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "page.png": b"<html></html>",
        "text.bmp": b"not found\n",
        "archive.png": b"PK\x03\x04" + bytes(200),
        "document.jpg": b"%PDF-1.4\n%binary\n",
        "script.tif": b"#!/bin/sh\ntouch executed\n",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(executed) (w) file closefile\n",
        "bomb.png": png_header(20_000),
        "larger bomb.png": png_header(50_000),
        "flipped.png": bytes(flipped),
        "zeros.jpg": bytes(5000),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


@pytest.fixture
def root(tmp_path):
    """Two classes of 90 whole images; the bad ones are with the cats."""
    for i in range(90):
        whole(tmp_path / "images/cat" / f"{i}.png", (255, i, 0))
        whole(tmp_path / "images/dog" / f"{i}.jpg", (0, i, 255))
    write_bad(tmp_path / "images/cat")
    return tmp_path / "images"


def folder(root, **options):
    return DataConfig(name="imagefolder", image_size=8, root=str(root), **options)


@pytest.mark.parametrize("memory_gib", [4.0, 0.0], ids=["in memory", "streamed"])
def test_every_bad_file_is_named_or_left_out(root, memory_gib):
    bad = {str(path) for path in write_bad(root / "cat")}
    with pytest.raises(ValueError, match="20 image files can't be read") as refused:
        load_data(folder(root, memory_gib=memory_gib, views="squares"), 0, look=True)
    assert all(path in str(refused.value) for path in bad) and "\n" not in str(refused.value)

    data = load_data(folder(root, memory_gib=memory_gib, on_bad_image="skip", views="squares"), 0, look=True)
    assert set(data.bad) == bad and all(path in reason for path, reason in data.bad.items())
    parts = (data.train, data.held_out, data.test)
    assert sum(map(len, parts)) == 180
    for part in parts:
        assert (part.images is None) == (memory_gib == 0)
        assert not bad & set(part.files)
        for i in range(len(part)):  # pixels, label and file still belong together
            image, label, _ = part[i]
            assert (image[0].float().mean() > image[2].float().mean()) == (label == 0) == ("/cat/" in part.files[i])


def test_the_result_is_that_of_a_folder_without_the_bad_files(tmp_path):
    for i in range(12):
        whole(tmp_path / "train" / "cat" / f"{i}.png", (i, 0, 0))
        whole(tmp_path / "train" / "dog" / f"{i}.png", (0, i, 0))
        whole(tmp_path / "test" / "cat" / f"{i}.png", (0, 0, i))
    squares = {"views": "squares"}  # which lie in memory
    clean = load_data(folder(tmp_path, **squares), 0)
    (tmp_path / "train/cat/0a.png").write_bytes(b"")
    (tmp_path / "test/cat/0a.png").write_bytes(b"")
    skipped = load_data(folder(tmp_path, on_bad_image="skip", **squares), 0)
    for name in ("train", "held_out", "test"):
        assert getattr(clean, name).files == getattr(skipped, name).files
        assert torch.equal(getattr(clean, name).images, getattr(skipped, name).images)
    for i in range(12):
        (tmp_path / "train/cat" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no training images of the known classes cat"):
        load_data(folder(tmp_path, on_bad_image="skip", **squares), 0)


def test_bad_unknown_images_are_named_too(tmp_path):
    digits = DataConfig(name="digits", image_size=8, split=0, unknown_root=str(tmp_path / "far"))
    whole(tmp_path / "far/a.png")
    (tmp_path / "far/b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 image files can't be read.*far/b\.png"):
        load_data(digits, 0)
    data = load_data(replace(digits, on_bad_image="skip"), 0)
    assert (data.test.labels < 0).sum() == 1 and list(data.bad) == [str(tmp_path / "far/b.png")]
    with pytest.raises(ValueError, match=r"data\.on_bad_image: expected error or skip, got 'ignore'"):
        load_data(replace(digits, on_bad_image="ignore"), 0)


def test_answers_are_kept_until_a_file_changes(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, cache = folder(root, memory_gib=0.0, on_bad_image="skip", scan=True), kept_file("scans", root)
    load_data(config, 0)
    looked_at = []
    monkeypatch.setattr("gradmix.ssl.data.scan.decode", lambda path, *to: looked_at.append(path) or decode(path, *to))
    assert len(load_data(config, 0).bad) == 20 and not looked_at
    whole(root / "cat/empty.png")
    (root / "dog/3.jpg").write_bytes(b"")
    bad = load_data(config, 0).bad
    assert sorted(looked_at) == [str(root / "cat/empty.png"), str(root / "dog/3.jpg")]
    assert len(bad) == 20 and str(root / "dog/3.jpg") in bad and str(root / "cat/empty.png") not in bad
    assert [path for path in root.rglob("*") if path.suffix == ".json"] == []
    cache.write_text(cache.read_text()[:-20])
    assert len(load_data(config, 0).bad) == 20 and len(looked_at) == 2 + 200
    assert json.loads(cache.read_text())["answers"]


def test_a_scan_that_is_interrupted_keeps_its_answers(root, tmp_path, monkeypatch):
    def interrupted(path, *to):
        if path.endswith("/cat/5.png"):
            raise KeyboardInterrupt
        return decode(path, *to)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("gradmix.ssl.data.scan.decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_data(folder(root, views="squares"), 0)
    assert len(json.loads(kept_file("scans", root).read_text())["answers"]) > 0


def test_unusual_images_are_read_right(tmp_path):
    colour = (200, 100, 50)
    paths = {
        "palette": whole(tmp_path / "palette.png", mode="P"),
        "palette gif": whole(tmp_path / "palette.gif", mode="P"),
        "alpha": whole(tmp_path / "alpha.png", mode="RGBA"),
        "webp": whole(tmp_path / "a.webp", lossless=True),
        "png named jpg": whole(tmp_path / "x.png").rename(tmp_path / "png inside.jpg"),
        "spaces and unicode": whole(tmp_path / "日本語 ordner é" / "bild nr. 1 – größe, [a]=100%.png"),
        "newline": whole(tmp_path / "two\nlines.png"),
    }
    for what, path in paths.items():
        middle = decode(path, 8)[:, 4, 4].int()
        assert (middle - torch.tensor(colour)).abs().max() <= 8, what
    cmyk = decode(whole(tmp_path / "cmyk.jpg", mode="CMYK", quality=95), 8)[:, 4, 4].int()
    assert (cmyk - torch.tensor(colour)).abs().max() <= 8
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for name in ("moving.gif", "moving.webp", "moving.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert decode(tmp_path / name, 8)[:, 4, 4].int().sub(torch.tensor([255, 0, 0])).abs().max() <= 4
    for name in ("deep.png", "deep.tif"):
        ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(ramp).save(tmp_path / name)
        assert (decode(tmp_path / name, 8)[0].int() - torch.from_numpy(ramp // 257).int()).abs().max() <= 1
    for orientation in range(1, 9):  # a red upper left corner, wherever the camera stored it
        upright = Image.new("RGB", (16, 16))
        upright.paste((255, 0, 0), (0, 0, 8, 8))
        undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition whose inverse EXIF asks for
        stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"turned {orientation}.png", exif=exif)
        red = decode(tmp_path / f"turned {orientation}.png", 16)[0]
        assert red[:8, :8].min() == 255 and red[8:].max() == 0 and red[:, 8:].max() == 0, orientation


def test_files_that_run_programs_are_no_images(tmp_path):
    path = tmp_path / "vector.eps"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match="not a readable image"):
        decode(path, 8)
    with pytest.raises(ValueError, match="no images in"):
        load_data(folder(tmp_path), 0)


def test_memory_stays_below_a_gibibyte(root, tmp_path):
    whole(root / "cat/large.jpg", size=(6000, 4000))
    whole(root / "cat/strip.png", size=(4_000_000, 2))
    whole(root / "dog/large.png", size=(6000, 4000))
    code = (
        "import re; from gradmix.ssl.config import DataConfig; from gradmix.ssl.data.open_set import load_data\n"
        f"config = DataConfig(name='imagefolder', image_size=8, root={str(root)!r}, on_bad_image='skip')\n"
        "data = load_data(config, 0, look=True)\n"
        # Not ru_maxrss, which a process inherits from the one that started it. Without the pages of libraries, which
        # the kernel maps as it likes (here 0.3 to 0.6 GiB for the same imports) and takes back at will.
        "memory = dict(re.findall(r'(VmHWM|RssFile):\\s*(\\d+)', open('/proc/self/status').read()))\n"
        "print(len(data.bad), int(memory['VmHWM']) - int(memory['RssFile']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bad, kibibytes = map(int, done.stdout.split())
    assert bad == 20 and kibibytes < 2**20


def test_a_file_that_vanishes_is_bad_and_not_remembered(tmp_path):
    scan = Scan(tmp_path / "scan.json")
    gone = ImageSet(torch.tensor([0]), 8, files=[str(tmp_path / "gone.png")])
    assert len(scan.read(gone, 0)) == 0 and "No such file" in scan.bad[str(tmp_path / "gone.png")]
    assert not scan.answers
