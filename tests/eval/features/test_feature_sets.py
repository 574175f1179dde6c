"""gradmix-eval features=: what somebody else embedded, evaluated, reported and scored without an image."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import normalize

import gradmix
from gradmix.eval import detectors
from gradmix.eval.features.feature_sets import sets_of
from gradmix.ssl.config import Config

KNOWN = list("abcd")
QUICK = ("detectors=[deep_knn,mahalanobis]", "data.holdout=0.1")


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """Real digits as features: four known classes, of which 20 rows each test, and others that are unknown."""
    monkeypatch.chdir(tmp_path)
    data = load_digits()
    rows = {digit: np.flatnonzero(data.target == digit)[:80] for digit in range(6)}
    features = {digit: data.data[own].astype(np.float32) for digit, own in rows.items()}
    return {
        "train_features": np.concatenate([features[d][:60] for d in range(4)]),
        "train_labels": np.repeat(KNOWN, 60),
        "test_features": np.concatenate([features[d][60:] for d in range(5)]),
        "test_labels": np.repeat([*KNOWN, "e"], 20),
        "unknown_features": features[5],
    }


def auroc(fit, known, unknown, k=5):
    """Of DeepKNN, by scikit-learn."""
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (fit, known, unknown)]
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(unit[0])
    scores = [search.kneighbors(part)[0][:, -1] for part in unit[1:]]
    return roc_auc_score(np.repeat([0, 1], [len(known), len(unknown)]), np.concatenate(scores))


def expected(arrays):
    is_known = arrays["test_labels"] != "e"
    unknown = np.concatenate([arrays["test_features"][~is_known], arrays["unknown_features"]])
    return auroc(arrays["train_features"], arrays["test_features"][is_known], unknown)


def test_arrays_are_evaluated_as_scikit_learn_does(arrays, tmp_path):
    """In five lines, with a report, a threshold and a detector that scores."""
    run = gradmix.evaluate_features(*arrays.values(), out=tmp_path / "out", detectors=["deep_knn", "mahalanobis"])
    assert run["osr/deep_knn/auroc"] == pytest.approx(expected(arrays), abs=1e-6)
    assert run["linear/top1"] > 0.9 and run["knn/top1"] > 0.9 and 0.5 < run["osr/mahalanobis/auroc"] <= 1
    skipped = run["skipped"]
    assert skipped["raw pixels"] == skipped["quality/alignment"] == "there are features, and no images"
    assert "threshold" in skipped and "quality/alignment" not in run.numbers and "osr/pixels/auroc" not in run.numbers
    page = run.report.read_text()
    assert "There are features, and no images." in page and "AUROC" in page
    assert run.numbers == json.loads((tmp_path / "out/metrics.json").read_text())


def test_files_are_the_same_as_arrays(arrays, command, tmp_path):
    np.savez("all.npz", **arrays)
    given = {"npz": ["features=all.npz"]}
    for kind in ("npy", "safetensors"):
        given[kind] = [f"features=train.{kind}", f"test_features=test.{kind}", f"unknown_features=unknown.{kind}"]
        for name in ("train", "test", "unknown"):
            write(tmp_path / f"{name}.{kind}", arrays[f"{name}_features"], arrays.get(f"{name}_labels"))
    called = gradmix.evaluate_features(
        *arrays.values(), data={"holdout": 0.1}, out=tmp_path / "called", detectors=["deep_knn", "mahalanobis"]
    )
    for kind, words in given.items():
        result = command("eval", *words, *QUICK, f"out={kind}")
        assert result.code == 0 and f"{kind}: report.html, metrics.json, and the detector" in result.out, result.err
        numbers = json.loads((tmp_path / kind / "metrics.json").read_text())
        for name in ("knn/top1", "osr/deep_knn/auroc", "osr/deep_knn/false_alarms", "osr/mahalanobis/oscr"):
            assert numbers[name] == called[name], name
        train, held_out = (
            load_file(tmp_path / kind / f"features/{name}.safetensors") for name in ("train", "held_out")
        )
        assert len(train["features"]) == 216 and len(held_out["labels"]) == 24
    # again into the same folder; of other features it is refused, and so is the run without its features
    assert command("eval", *given["npy"], *QUICK, "out=npy").code == 0
    np.savez("other.npz", **arrays)
    for kind in given:
        refused = command("eval", "features=other.npz", "data.known=[a,b]", *QUICK, f"out={kind}")
        assert refused.code == 2 and f"out: {kind} belongs to another config" in refused.err
        again = command("eval", f"run={kind}")
        assert again.code == 2 and f"run: {kind} was made of features=, with no network to evaluate" in again.err


def write(path, features, labels):
    """As another tool would."""
    if path.suffix == ".npy":
        np.save(path, features)
        if labels is not None:
            rows = [("path", "label"), *((f"{row}.jpg", label) for row, label in enumerate(labels))]
            csv.writer(open(path.with_suffix(".csv"), "w", newline="")).writerows(rows)
        return
    code = "import sys, json, numpy as np; from safetensors.numpy import save_file; a = dict(np.load(sys.argv[1])); "
    code += "names = sorted(set(a['labels'].tolist())) if 'labels' in a else []; "
    code += "a |= {'labels': np.array([names.index(x) for x in a['labels']])} if names else {}; "
    code += "save_file(a, sys.argv[2], {'classes': json.dumps(names)})"
    np.savez(path.with_suffix(".npz"), features=features, **({} if labels is None else {"labels": labels}))
    subprocess.run([sys.executable, "-c", code, path.with_suffix(".npz"), path], check=True)


def test_one_file_is_divided_as_a_folder_is(arrays, command, tmp_path):
    np.save("all.npy", np.concatenate([arrays["train_features"], arrays["unknown_features"]]))
    labels = [*arrays["train_labels"], *[""] * 80]
    csv.writer(open("all.csv", "w", newline="")).writerows([("path", "label"), *(("x", label) for label in labels)])
    result = command("eval", "features=all.npy", "data.known=[a,b,c]", "out=out", *QUICK)
    assert result.code == 0, result.err
    test, train = (load_file(tmp_path / f"out/features/{name}.safetensors") for name in ("test", "train"))
    assert np.bincount(test["labels"] + 1).tolist() == [15 + 80, 15, 15, 15]  # a quarter of each, and all without one
    assert np.bincount(train["labels"]).tolist() == [41, 41, 41] or len(train["labels"]) == 120
    saved = test["features"][test["labels"] < 0]
    numbers = json.loads((tmp_path / "out/metrics.json").read_text())
    assert numbers["osr/deep_knn/auroc"] == pytest.approx(
        auroc(train["features"], test["features"][test["labels"] >= 0], saved), abs=1e-6
    )


def test_settings_are_chosen_without_the_real_unknowns(arrays, tmp_path):
    """With pseudo_unknown the last known class is unknown; what is really unknown changes nothing."""
    run = gradmix.evaluate_features(
        *arrays.values(), out=tmp_path / "out", detectors=["deep_knn"], data={"pseudo_unknown": 1}
    )
    fits, tests = (arrays[f"{name}_labels"] for name in ("train", "test"))
    played = auroc(
        arrays["train_features"][fits != "d"],
        arrays["test_features"][np.isin(tests, ["a", "b", "c"])],
        arrays["test_features"][tests == "d"],
    )
    assert run["osr/deep_knn/auroc"] == pytest.approx(played, abs=1e-6)
    assert abs(played - expected(arrays)) > 1e-3
    test = load_file(tmp_path / "out/features/test.safetensors")
    assert np.bincount(test["labels"] + 1).tolist() == [20, 20, 20, 20]


def test_without_labels_a_detector_is_fitted(arrays, tmp_path):
    run = gradmix.evaluate_features(
        arrays["train_features"], settings={"data.holdout": 0.2}, out=tmp_path / "out", detectors=["deep_knn"]
    )
    assert run["skipped"]["knn, linear, osr"] == "the images have no classes"
    assert detectors.load(run.detector).threshold > 0


def test_held_out_rows_need_no_labels(arrays, command, tmp_path):
    """The threshold is that of the same rows with labels, also by class: that is the one they look most like."""
    own = {name: part for name, part in arrays.items() if name.startswith(("train", "unknown"))}
    own |= {"held_out_features": arrays["test_features"][:80], "test_features": arrays["test_features"][::4]}
    asked = {"test_labels": arrays["test_labels"][::4], "detectors": ["deep_knn"], "accept": 0.9, "per_class": True}
    with_labels = gradmix.evaluate_features(**own, **asked, held_out_labels=np.repeat(KNOWN, 20), out=tmp_path / "with")
    run = gradmix.evaluate_features(**own, **asked, out=tmp_path / "out")
    assert "threshold" not in run["skipped"] and "false alarm" in run.report.read_text().lower()
    thresholds = [detectors.load(one.detector).calibration_.thresholds(np.arange(4), 4) for one in (with_labels, run)]
    assert len(set(thresholds[0])) > 1 and thresholds[0].tolist() == thresholds[1].tolist()
    assert (load_file(tmp_path / "out/features/held_out.safetensors")["labels"] == -1).all()
    removed = command("detector", "remove", "out/detector", "class=a", "out=less")
    assert removed.code == 2 and "class: held-out images that have none may be of 'a'" in removed.err, removed.err
    with pytest.raises(ValueError, match="pseudo_unknown: needs held_out_labels"):
        gradmix.evaluate_features(**own, **asked, data={"pseudo_unknown": 1}, out=tmp_path / "pseudo")


def test_why_there_is_no_threshold(arrays, tmp_path):
    own = {name: arrays[name] for name in ("train_features", "train_labels")}
    asked = {"held_out_features": arrays["unknown_features"], "detectors": ["deep_knn"], "data": {"holdout": 0.1}}
    run = gradmix.evaluate_features(**own, **asked, held_out_labels=["e"] * 80, out=tmp_path / "e")
    assert run["skipped"]["threshold"] == "no known images are held out to calibrate on (data.holdout=0.1)"
    run = gradmix.evaluate_features(**own, **asked, accept=1.0, out=tmp_path / "all")
    promise = run["skipped"]["the promise of the threshold"]
    assert promise == "accept=1 can't be promised; the threshold is their largest score"


def test_a_few_training_rows_are_enough(arrays, tmp_path):
    """Names of classes as pandas has them, and k is what there is: all neighbours vote, as scikit-learn says."""
    few = np.flatnonzero(np.arange(240) % 60 < 4)
    labels, test = arrays["train_labels"][few], arrays["test_labels"] != "e"
    own = {"train_features": arrays["train_features"][few], "train_labels": labels.astype(object)}
    own |= {"test_features": arrays["test_features"][test], "test_labels": arrays["test_labels"][test].astype(object)}
    run = gradmix.evaluate_features(**own, knn_k=[5], out=tmp_path / "out", detectors=["deep_knn"])
    unit = [normalize(own[f"{name}_features"]) for name in ("train", "test")]
    temperature = Config().knn_temperature
    for name, k in (("knn", 16), (f"knn/k=5,t={temperature:g}", 5)):
        vote = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / temperature), algorithm="brute")
        right = vote.fit(unit[0], labels).predict(unit[1]) == arrays["test_labels"][test]
        assert run[f"{name}/top1"] == pytest.approx(right.mean(), abs=0.013), name  # one of 80 may be a tie
    with pytest.raises(ValueError, match="knn_k: expected 1 to 16, the size of the training set, got 17"):
        gradmix.evaluate_features(**own, knn_k=[17], out=tmp_path / "out", detectors=["deep_knn"])


def test_sets_are_as_wide_as_each_other():
    rows = {f"{name}_features": np.ones((4, 3)) for name in ("train", "test", "unknown")}
    for theirs in (8, 1):
        wide = {"test_projections": np.ones((4, 6)), "unknown_projections": np.ones((4, theirs))}
        with pytest.raises(ValueError, match=f"unknown_projections: {theirs} wide, test_projections are 6"):
            sets_of(rows | wide)
    with pytest.raises(ValueError, match="train_labels: expected integers, got object"):
        sets_of(rows | {"train_labels": np.array(["a", None, "b", "c"], dtype=object)})


def test_embeddings_are_scored(arrays, command, tmp_path):
    run = gradmix.evaluate_features(*arrays.values(), data={"holdout": 0.1}, out=tmp_path / "out")
    told = command("detector", "info", run.detector)
    assert told.code == 0 and "network     none, fitted to " in told.out, told.err
    np.save("new.npy", arrays["unknown_features"])
    for batch_size in (7, 256):
        result = command("score", "detector=out/detector", "features=new.npy", f"batch_size={batch_size}")
        assert result.code == 0 and "scores.csv: 80 images, " in result.out, result.err
        rows = list(csv.DictReader(open("scores.csv")))
        expected = detectors.load(run.detector).judge(arrays["unknown_features"])
        np.testing.assert_allclose([float(row["score"]) for row in rows], expected.score, rtol=1e-5)
        assert [row["prediction"] == "unknown" for row in rows] == (expected.score > expected.threshold).tolist()
        assert rows[3]["path"] == "row 3" and rows[3]["nearest"].startswith("training image ")
    Image.new("RGB", (8, 8)).save("a.png")
    for arguments, message in (
        (("images=a.png",), "images: out/detector was fitted to features and has no network; features=FILE scores"),
        ((), "images: missing; give images=PATH, or features=FILE"),
        (("features=gone.npy",), "features: gone.npy: no such file"),
        (("features=new.npy", "out=new.npy"), "out: new.npy is one of the files that are read"),
        (("features=new.npy", "explain=sheets"), "explain: "),
    ):
        result = command("score", "detector=out/detector", *arguments)
        assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1, result.err
    np.save("new.npy", np.ones((3, 5)))
    result = command("score", "detector=out/detector", "features=new.npy")
    assert result.code == 2 and "expected [N, 64], got shape (3, 5)" in result.err


def test_what_gradmix_embed_writes_comes_back(digits_run, command, tmp_path):
    """With projections: the authors' detector has what it looks at."""
    data = load_digits()
    for digit in range(3):
        for i, image in enumerate(data.images[data.target == digit][:30]):
            path = tmp_path / f"photos/{digit}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype(np.uint8)).save(path)
    assert command("embed", f"run={digits_run}", "images=photos", "out=f.safetensors").code == 0
    result = command("eval", "features=f.safetensors", "data.known=['0','1']", "data.holdout=0.1", "out=out")
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "out/metrics.json").read_text())
    assert {"osr/deep_knn/auroc", "osr/class_knn/auroc", "osr/mahalanobis/auroc"} <= set(numbers)
    result = command("score", "detector=out/detector", "features=f.safetensors")
    rows = list(csv.DictReader(open("scores.csv")))
    assert rows[0]["path"] == "photos/0/0.png" and rows[0]["nearest"].startswith("photos/0/")
    result = command("score", "detector=out/detectors/class_knn", "features=f.safetensors")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("features=all.npz",), "out: missing; features= needs it, out=DIR"),
        (("features=all.npz", "out=out", "run=x"), "features: beside run= or checkpoint=; give one of them"),
        (("features=all.npz", "out=out", "data=digits"), "data: features= has no images and no network; leave it out"),
        (("features=all.npz", "out=out", "export=[onnx]"), "export: features= has no images and no network"),
        (("features=all.npz", "out=out", "data.unknown_root=x"), "data.unknown_root: features= has no images and no"),
        (("features=all.npz", "out=out", "data.unknown_roots={a: x}"), "data.unknown_roots: features= has no images"),
        (("features=all.npz", "out=out", "unknown_roots={a: x}"), "unknown_roots: features= has no images and no"),
        (("features=all.npz", "out=out", "data.pseudo_unknown=3"), "data.pseudo_unknown: expected 0 to 2 of 4 known"),
        (("features=plain.npz", "out=out", "data.pseudo_unknown=1"), "data.pseudo_unknown: the features have no class"),
        (("features=gone.npz", "out=out"), "features: gone.npz: no such file"),
        (("features=bad.npz", "out=out"), "features: bad.npz: bad_features: no such array; expected train_features, "),
        (("features=short.npz", "out=out"), "features: short.npz: train_features: missing"),
        (("features=wide.npz", "out=out"), "features: wide.npz: test_features: 3 wide, train_features are 64"),
        (("features=torn.npz", "out=out"), "features: torn.npz: can't be read ("),
        (("features=all.npz", "test_features=a.npy", "out=out"), "test_features: belongs into all.npz itself"),
        (("features=all.npz", "data.known=[a,z]", "out=out"), "data.known: 'z' is no class of data=features"),
        (("features=all.npz", "data.known=[a]", "out=out"), "features: one known class only (a)"),
        (("features=all.npz", "data.known=[a,e]", "out=out"), "features: no training rows of the known class e"),
        (("features=all.npz", "knn_k=[9999]", "out=out"), "knn_k: expected 1 to 240"),
        (("test_features=all.npz", "run=x"), "test_features, unknown_features: belong to features=FILE"),
    ],
)
def test_bad_input_is_one_line(arguments, message, arrays, command, tmp_path):
    np.savez("all.npz", **arrays)
    np.savez("plain.npz", train_features=arrays["train_features"])
    np.savez("bad.npz", **arrays, bad_features=np.ones((1, 64)))
    np.savez("short.npz", test_features=np.ones((3, 64)))
    np.savez("wide.npz", **(arrays | {"test_features": np.ones((100, 3))}))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "all.npz").read_bytes()[:999])
    result = command("eval", *arguments)
    assert result.code == 2 and f"gradmix-eval: {message}" in result.err, result.err
    assert len(result.err.splitlines()) == 1 and not (tmp_path / "out").exists()
