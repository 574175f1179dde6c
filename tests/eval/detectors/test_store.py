"""Detectors on disk: what is saved is what is loaded, in any process; damage is refused."""

import json
import os
import pickle
import subprocess
import sys
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import make_blobs

from gradmix.eval.detectors import DETECTORS, ClassKNN, DeepKNN, MeanShift, NNGuide, load, store
from gradmix.eval.features import arrays
from gradmix.ssl.runs.files import hash_json


def blobs(train, test):
    """Training features, their labels with gaps, and test features, from four clusters."""
    features, labels = make_blobs(train + test, 12, centers=4, cluster_std=3, random_state=0)
    features, labels = features.astype(np.float32), np.array([2, 3, 7, 40])[labels]
    return features[:train], labels[:train], features[train:]


TRAIN, LABELS, TEST = blobs(200, 60)


@cache
def fitted_once(name):
    return DETECTORS[name]().fit(TRAIN, LABELS)


@pytest.mark.parametrize("name", DETECTORS)
def test_save_and_load(name, tmp_path):
    detector = fitted_once(name)
    detector.save(tmp_path)
    for loaded in (load(tmp_path), type(detector).load(tmp_path)):
        assert loaded == detector and loaded.threshold is None and type(loaded) is type(detector)
        np.testing.assert_array_equal(loaded.score(TEST), detector.score(TEST))
    mapped = load(tmp_path, mmap=True)
    assert isinstance(mapped.classes_, np.memmap)
    np.testing.assert_allclose(mapped.score(TEST), detector.score(TEST), rtol=1e-6)
    assert load_file(tmp_path / "detector.safetensors")["classes_"].tolist() == sorted(set(LABELS.tolist()))


def test_loaded_in_another_process_they_give_the_same_bits(tmp_path):
    detectors = {name: deepcopy(fitted_once(name)).calibrate(TEST) for name in DETECTORS}
    for name, detector in detectors.items():
        detector.save(tmp_path / name)
    np.save(tmp_path / "queries.npy", TEST)
    program = (
        "import sys, numpy as np; from gradmix.eval.detectors import load\n"
        "folder, *names = sys.argv[1:]; queries = np.load(folder + '/queries.npy')\n"
        "for name in names:\n"
        "    scores, labels = load(folder + '/' + name).assess(queries)\n"
        "    np.savez(folder + '/' + name + '.npz', scores=scores, labels=labels)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path), *detectors], check=True)
    for name, detector in detectors.items():
        result = np.load(tmp_path / f"{name}.npz")
        np.testing.assert_array_equal(result["scores"], detector.score(TEST), err_msg=name)
        np.testing.assert_array_equal(result["labels"], detector.predict(TEST), err_msg=name)


@pytest.fixture
def saved(tmp_path):
    DeepKNN().fit(TRAIN, LABELS).calibrate(TEST).save(tmp_path / "saved")
    return tmp_path / "saved"


def test_nothing_saved_is_a_pickle(saved):
    for path in saved.iterdir():
        with pytest.raises(Exception):  # noqa: B017 - whatever pickle makes of it, it isn't an object
            pickle.loads(path.read_bytes())
    assert sorted(path.name for path in saved.iterdir()) == ["detector.json", "detector.safetensors"]


def test_damage_is_refused(saved):
    manifest = saved / "detector.json"
    original = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**original, "threshold": 9.0}))
    with pytest.raises(ValueError, match=r"detector\.json: damaged, its content doesn't match its hash"):
        load(saved)
    manifest.write_text(json.dumps(original))
    load(saved)
    tensors = bytearray((saved / "detector.safetensors").read_bytes())
    tensors[-1] ^= 1
    (saved / "detector.safetensors").write_bytes(tensors)
    with pytest.raises(ValueError, match=r"detector\.safetensors: damaged, .* doesn't match the manifest's hash"):
        load(saved)
    (saved / "detector.safetensors").unlink()
    with pytest.raises(ValueError, match=r"detector\.safetensors: missing"):
        load(saved)
    manifest.write_text("[]")
    with pytest.raises(ValueError, match="expected named fields"):
        load(saved)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="no saved detector here"):
        load(saved)


def rewrite(folder, **changes):
    """Change the manifest and make its hash right again, as another program would."""
    manifest = json.loads((folder / "detector.json").read_text())
    manifest.update(changes)
    del manifest["sha256"]
    manifest["sha256"] = hash_json(manifest)
    (folder / "detector.json").write_text(json.dumps(manifest))


def test_unknown_kind_format_and_wrong_class(saved):
    with pytest.raises(ValueError, match="holds a deep_knn detector, not class_knn"):
        ClassKNN.load(saved)
    rewrite(saved, detector="os.system")
    with pytest.raises(ValueError, match=r"no 'os\.system'; choose from deep_knn, class_knn"):
        load(saved)
    rewrite(saved, format=2)
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        load(saved)


def test_random_damage_is_never_silent(saved, damage, tmp_path):
    """Truncations and bit flips anywhere: an error, or exactly the same scores."""
    assert_damage_is_never_silent(damage, saved, tmp_path / "damaged", times=200)


def assert_damage_is_never_silent(damage, saved, damaged, times):
    generator = np.random.default_rng(0)
    expected, threshold = load(saved).score(TEST), load(saved).threshold
    refused = 0
    for _ in range(times):
        damage(saved, damaged, generator)
        try:
            loaded = load(damaged)
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(loaded.score(TEST), expected)
            assert loaded.threshold == threshold
    assert refused > 0.95 * times


def test_an_interrupted_save_leaves_no_wrong_detector(saved, monkeypatch):
    """The new arrays are there, the new manifest isn't: refused, not mixed."""
    replace = os.replace

    def stop_at_the_manifest(source, target):
        if target.name == "detector.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        DeepKNN().fit(TRAIN + 1, LABELS).save(saved)
    with pytest.raises(ValueError, match="damaged"):
        load(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["detector.json", "detector.safetensors"]


@pytest.mark.parametrize("name", ["a", "ab", "abc", "abcdefg"])
def test_arrays_of_odd_sizes_are_readable_and_aligned(name, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "BLOCK", 10)  # written in several pieces
    given = {
        name: np.arange(21, dtype=np.float32).reshape(7, 3),
        "labels": np.arange(5),
        "wide": np.linspace(0, 1, 18).reshape(3, 3, 2),
    }
    store.write(tmp_path, {"detector": "test", "parameters": {}, "width": 1, "threshold": None}, given)
    by_the_library = load_file(tmp_path / "detector.safetensors")
    for mmap in (False, True):
        _, read = store.read(tmp_path, mmap)
        assert read.keys() == by_the_library.keys() == given.keys()
        for key, array in read.items():
            assert array.flags.aligned and array.dtype == given[key].dtype
            np.testing.assert_array_equal(array, given[key])
            np.testing.assert_array_equal(by_the_library[key], given[key])


@pytest.mark.parametrize("kind", [DeepKNN, MeanShift, NNGuide])
def test_approximate_search_is_saved_with_the_detector(kind, damage, tmp_path):
    train, labels, test = blobs(3000, 300)
    exact, approximate = kind().fit(train, labels), kind(index="IVF16,Flat").fit(train, labels)
    np.testing.assert_allclose(approximate.score(test).mean(), exact.score(test).mean(), rtol=0.01)
    approximate.bank_.index.nprobe = 2  # of FAISS itself it would be 1
    assert exact.bank_.index is None
    assert (approximate.score(test) != exact.score(test)).any()  # else it shows nothing
    approximate.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "detector.json",
        "detector.safetensors",
    ]
    loaded = load(tmp_path)
    assert loaded == approximate and loaded.bank_.index.nprobe == 2
    np.testing.assert_array_equal(loaded.score(test), approximate.score(test))
    exact.save(tmp_path)
    assert load(tmp_path).bank_.index is None
    approximate.save(tmp_path)
    assert_damage_is_never_silent(damage, tmp_path, tmp_path.with_name("damaged"), times=20)


def test_what_cannot_be_said_in_json_costs_no_saved_detector(tmp_path):
    DeepKNN(k=np.int64(4)).fit(TRAIN, LABELS).save(tmp_path)  # numpy's numbers can
    before = load(tmp_path).score(TEST)
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.write(tmp_path, {"k": {4}}, {"a": TRAIN})
    assert load(tmp_path).k == 4
    np.testing.assert_array_equal(load(tmp_path).score(TEST), before)
