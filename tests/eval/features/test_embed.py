"""gradmix-embed: features of a folder's images, by any network, into any format, stopped or not."""

import csv
import json
import os
import signal
import sys
import time
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import gradmix
from gradmix.eval.features.embeddings import embeddings
from gradmix.eval.features.formats import Row, read_embeddings, write_embeddings
from gradmix.ssl.networks.backbones import ResNet


@pytest.fixture
def photos(tmp_path):
    """Forty images of two classes, one that lies above them, names that CSV quotes, and a file that can't be read."""
    odd = {3: "a, comma", 4: 'a "quote"', 5: "two\nlines", 7: os.fsdecode(b"caf\xe9")}
    for i, image in enumerate(load_digits().images[:40]):
        folder = tmp_path / "photos" / ("=one" if i % 2 else "two/inside")
        folder.mkdir(parents=True, exist_ok=True)
        name = tmp_path / "photos/above.png" if i == 39 else folder / f"{i:02d}{odd.get(i, '')}.png"
        Image.fromarray((image * 15).astype(np.uint8)).save(name)
    (tmp_path / "photos/two/inside/20.png").write_text("<html>")
    return tmp_path / "photos"


def readable(photos):
    return [path for path in sorted(map(str, photos.rglob("*.png"))) if not path.endswith("/20.png")]


def expected(run, paths):
    """One image at a time, by the backbone that gradmix.load gives and the head's own weights."""
    model, head = gradmix.load(run), load_file(run / "head.safetensors")
    with torch.inference_mode():
        features = torch.cat([model(model.transform(path)[None]) for path in paths])
        hidden = F.relu(features @ head["layers.0.weight"].T + head["layers.0.bias"])
        projections = F.normalize(hidden @ head["layers.2.weight"].T + head["layers.2.bias"], dim=1)
    return features.numpy(), projections.numpy()


@pytest.mark.parametrize("name", ["new folder/a.npy", "a.safetensors", "a.parquet"])
def test_features_paths_and_labels_of_a_run(name, digits_run, photos, command, tmp_path):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    result = command("embed", f"run={digits_run}", "images=photos", f"out={name}", "batch_size=7")
    assert result.code == 2 and "1 of 40 files can't be read, left out; " in result.err, result.err
    assert f"{name}: 39 images, 32 features, and 128 projections" in result.out
    rows = list(csv.DictReader(open((tmp_path / name).with_suffix(".unreadable.csv"))))
    assert [row["path"] for row in rows] == ["photos/two/inside/20.png"] and "not a readable image" in rows[0]["error"]
    found, paths = read_embeddings(tmp_path / name), readable(photos)
    features, projections = expected(digits_run, paths)
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.projections, projections, rtol=1e-4, atol=1e-5)
    wanted = [os.path.relpath(path, tmp_path) for path in paths]
    if name.endswith(".parquet"):  # whose text is UTF-8
        wanted = [os.fsencode(path).decode("utf-8", "replace") for path in wanted]
    assert list(found.paths) == wanted
    labels = ["" if path.endswith("above.png") else path.split("/")[1] for path in wanted]
    assert found.classes == ["=one", "two"] and found.names.tolist() == labels
    assert not list(tmp_path.rglob("*.part*"))


def test_others_read_the_files(digits_run, photos, command, tmp_path):
    for kind in ("npy", "safetensors"):
        command("embed", f"run={digits_run}", "images=photos", f"out=a.{kind}")
    features = np.load(tmp_path / "a.npy")
    assert features.dtype == np.float32 and np.array_equal(features, load_file(tmp_path / "a.safetensors")["features"])
    assert np.load(tmp_path / "a.projections.npy").shape == (39, 128)
    with open(tmp_path / "a.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 39 and {row["label"] for row in rows} == {"'=one", "two", ""}  # no formula for a spreadsheet
    arrow = pytest.importorskip("pyarrow.parquet")
    command("embed", f"run={digits_run}", "images=photos", "out=a.parquet")
    table = arrow.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["path", "label", "features", "projections"]
    assert np.array_equal(np.array(table.column("features").to_pylist(), np.float32), features)


def test_a_checkpoint_and_a_detectors_folder(digits_run, photos, command, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResNet("resnet18", 8, "small").eval()
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, tmp_path / "a.pth")
    arguments = ("checkpoint=a.pth", "encoder=resnet18", "images=photos/*/*.png", "image_size=16")
    result = command("embed", *arguments)
    assert result.code == 0 and "features.npy: 19 images, 64 features\n" in result.out, result.err
    found = read_embeddings(tmp_path / "features.npy")
    assert found.projections is None and found.classes == ["=one"]  # of a pattern, the folder that a file is in
    run = gradmix.embed(digits_run / "detector", "photos/=one")
    assert run.features.shape == (19, 32) and run.projections is None and run.classes == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_it_goes_on_to_the_same_bytes(number, digits_run, photos, command, started, tmp_path):
    arguments = (f"run={digits_run}", "images=photos", "batch_size=1")
    assert command("embed", *arguments, "out=whole.npy").code == 2  # for the unreadable one
    stopped = started(os.devnull, "embed", *arguments)
    while not any(rows.stat().st_size > 1000 for rows in tmp_path.glob("features.npy.*.part.rows")):
        time.sleep(0.001)
    os.kill(stopped.pid, number)
    stopped.join(20)
    assert stopped.exitcode == (-9 if number == signal.SIGKILL else 143)
    (rows,), (part,) = tmp_path.glob("*.part.rows"), tmp_path.glob("*.part")
    with open(rows, "ab") as file:
        file.write(b'["photos/torn')
    with open(part, "ab") as file:
        file.write(b"torn")
    result = command("embed", *arguments)
    assert result.code == 2 and "of 40 images are embedded already" in result.out
    for suffix in (".npy", ".csv", ".projections.npy", ".unreadable.csv"):
        assert (tmp_path / f"features{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes(), suffix
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("room", [0, 3000])
def test_a_full_disk_loses_no_batch(room, files_up_to, digits_run, photos, command, tmp_path):
    arguments = (f"run={digits_run}", "images=photos", "batch_size=3")
    with files_up_to(room):
        full = command("embed", *arguments)
    assert full.code == 2 and "gradmix-embed: features.npy: can't be written (File too large)\n" in full.err
    again = command("embed", *arguments)
    assert ("embedded already" in again.out) == bool(room)
    command("embed", *arguments, "out=whole.npy")
    assert (tmp_path / "features.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_another_network_begins_anew(digits_run, photos, command, tmp_path):
    (tmp_path / "features.npy.01234567.part").write_bytes(b"of others")
    result = command("embed", f"run={digits_run}", "images=photos/=one")
    assert result.code == 0 and "features.npy.01234567.part: left alone; it is of another network" in result.out
    assert (tmp_path / "features.npy.01234567.part").read_bytes() == b"of others"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run={run}", "out=a.txt"), "out: a.txt: expected a name that ends in .npy, .safetensors, .parquet"),
        (("run={run}", "out=photos/a.npy"), "out: photos/a.npy lies in photos, which is read; write it elsewhere"),
        (("run={run}", "out=mine.npy"), "out: mine.npy is there already and was not written by gradmix-embed"),
        (("run={run}", "out=table.npy"), "out: table.csv is there already and was not written by gradmix-embed"),
        (("run={run}", "out=folder.npy"), "out: folder.npy is a folder"),
        (("out=a.npy",), "run: missing; give run=DIR, or checkpoint=FILE with encoder=NAME"),
        (("run={run}", "checkpoint=a.pth"), "run: missing; give run=DIR, or checkpoint=FILE with encoder=NAME"),
        (("checkpoint=a.pth",), "encoder: missing; checkpoint= needs it, encoder=NAME"),
        (("run={run}", "image_size=32"), "image_size: belongs to checkpoint=FILE; run= has a network with its own"),
        (("run={run}", "fit=pad"), "fit: belongs to checkpoint=FILE"),
        (("run={run}", "encoder=resnet18"), "encoder: belongs to checkpoint=FILE"),
        (("run=photos",), "run: photos is no finished run's folder and no detector's, backbone.safetensors is missing"),
        (("run={run}", "images=photos/two/inside/20.png"), "images: none of 1 files can be read (photos/two/inside/20"),
    ],
)
def test_bad_input_is_one_line(arguments, message, digits_run, photos, command, tmp_path):
    np.save(tmp_path / "mine.npy", np.ones(3))
    (tmp_path / "table.csv").write_text("my,table\n")
    (tmp_path / "folder.npy").mkdir()
    images = () if any(word.startswith("images=") for word in arguments) else ("images=photos",)
    result = command("embed", *(word.format(run=digits_run) for word in arguments), *images)
    assert result.code == 2 and f"gradmix-embed: {message}" in result.err and len(result.err.splitlines()) == 1
    assert np.array_equal(np.load(tmp_path / "mine.npy"), np.ones(3))
    assert (tmp_path / "table.csv").read_text() == "my,table\n" and not list(tmp_path.glob("*.part*"))


def test_without_pyarrow(digits_run, photos, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    result = command("embed", f"run={digits_run}", "images=photos", "out=a.parquet")
    assert result.err == "gradmix-embed: out: .parquet needs one more package, pip install pyarrow\n"


def test_the_call_is_the_command(digits_run, photos, command, tmp_path):
    command("embed", f"run={digits_run}", "images=photos/=one", "out=a.npy")
    here, written = (gradmix.embed(digits_run, photos / "=one", **keys) for keys in ({}, {"out": tmp_path / "b.npy"}))
    theirs = np.load(tmp_path / "a.npy")
    assert np.array_equal(here.features, theirs) and np.array_equal(written.features, theirs)
    assert isinstance(written.features, np.memmap)
    arrays = [np.asarray(Image.open(path)) for path in sorted((photos / "=one").iterdir())]
    listed = gradmix.embed(digits_run, arrays)
    assert np.array_equal(listed.features, theirs) and listed.paths[3] == "image 3" and listed.classes == []
    with pytest.raises(ValueError, match=r"images: .*20\.png: not a readable image"):
        gradmix.embed(digits_run, photos)


def test_arrays_of_anyone():
    features = torch.arange(12.0).reshape(4, 3)
    by_name = embeddings(features, ["b", "a", "", "b"])
    assert (by_name.classes, by_name.labels.tolist()) == (["a", "b"], [1, 0, -1, 1])
    by_number = embeddings(features.numpy().astype(np.float16), torch.tensor([10, 9, -1, 10]))
    assert by_number.classes == ["9", "10"] and by_number.names.tolist() == ["10", "9", "", "10"]  # in their own order
    assert embeddings(features).labels.tolist() == [-1] * 4
    for bad, message in (
        ({"labels": [1, 2]}, r"labels: expected one for each of 4 features"),
        ({"labels": ["a"]}, r"labels: expected one for each of 4 features"),
        ({"labels": [0.5] * 4}, "labels: expected integers"),
        ({"projections": features[:2]}, "projections: 2 rows, features has 4"),
        ({"paths": ["a"]}, "paths: 1, features has 4 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            embeddings(features, **bad)
    with pytest.raises(ValueError, match="test_features: 1 non-finite value, first in row 1"):
        embeddings(np.array([[1.0], [np.nan]]), name="test_features")


@pytest.mark.parametrize("damage", ["cut", "pickle", "rows", "header", "classes", "none"])
def test_a_damaged_file_is_one_line(damage, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 2), np.float32))
    (tmp_path / "a.csv").write_text("path,label\na,x\nb,x\nc,y\nd,y\n")
    assert read_embeddings(tmp_path / "a.npy").classes == ["x", "y"]
    path, message = tmp_path / "a.npy", "a.npy: "
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "pickle":
        np.save(path, np.array([{}], dtype=object))
    elif damage == "rows":
        (tmp_path / "a.csv").write_text("path,label\na,x\n")
        message = "a.npy: 4 rows, .*a.csv has 1; they don't belong together"
    elif damage == "header":
        (tmp_path / "a.csv").write_text("file,kind\na,x\n")
        message = "a.csv: expected the columns path, label, got file, kind"
    elif damage == "classes":
        path, message = tmp_path / "a.safetensors", "labels: 0 to 3, of 1 classes"
        save_file({"features": torch.ones(4, 2), "labels": torch.arange(4)}, path, {"classes": json.dumps(["a"])})
    else:
        path, message = tmp_path / "b.npy", "features: .*b.npy: no such file"
    with pytest.raises(ValueError, match=message):
        read_embeddings(path)


def parquet(path, columns):
    arrow = pytest.importorskip("pyarrow")
    import_module("pyarrow.parquet").write_table(arrow.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["features", "projections"])
@pytest.mark.parametrize(
    "rows", [[[1, 2, 3], [4], [5, 6], [7, 8]], [1, 2, 3, 4], [{"a": 1}] * 4, [[1], None, [2], [3]]]
)
def test_a_parquet_column_without_as_many_numbers_in_each_row_is_refused(name, rows, tmp_path):
    path = parquet(tmp_path / "a.parquet", {"features": [[1, 2]] * 4, name: rows})
    with pytest.raises(ValueError, match=f"a.parquet: {name}: expected a list of as many numbers in each row"):
        read_embeddings(path)


@pytest.mark.parametrize("labels", [["x", None, "y"], [3, None, 1], [None] * 3, ["x", "", "y"]])
def test_a_null_in_parquet_is_no_path_and_no_label(labels, tmp_path):
    columns = {"features": [[1, 2], [3, 4], [5, 6]], "path": ["a", None, "b"], "label": labels}
    found = read_embeddings(parquet(tmp_path / "a.parquet", columns))
    assert list(found.paths) == ["a", "", "b"] and found.features.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert found.names.tolist() == ["" if label is None else str(label) for label in labels]


def test_safetensors_holds_any_number_of_class_names(tmp_path):
    """More than a header may hold; and the names that stand in the header of a file from elsewhere are read."""
    names = [f"class {number:06d} of a long name" for number in range(90_000)]
    matrix = np.arange(90_001, dtype=np.float32)[:, None]
    write_embeddings(tmp_path / "a.safetensors", matrix, (1, 0), lambda: (Row("x", name) for name in [*names, ""]))
    found = read_embeddings(tmp_path / "a.safetensors")
    assert found.classes == names and found.names.tolist() == [*names, ""]
    odd = ["caf\udce9", "\u00e9"]  # a folder's name that is no UTF-8
    write_embeddings(tmp_path / "a.safetensors", matrix[:2], (1, 0), lambda: (Row("x", name) for name in odd))
    assert read_embeddings(tmp_path / "a.safetensors").names.tolist() == odd
    write_embeddings(tmp_path / "a.safetensors", matrix[:2], (1, 0), lambda: iter([Row("x", ""), Row("y", "")]))
    assert read_embeddings(tmp_path / "a.safetensors").classes == []
    arrays = {"features": torch.ones(2, 3), "labels": torch.tensor([1, -1])}
    save_file(arrays, tmp_path / "a.safetensors", {"classes": json.dumps(["a", "b"])})
    assert read_embeddings(tmp_path / "a.safetensors").names.tolist() == ["b", ""]
