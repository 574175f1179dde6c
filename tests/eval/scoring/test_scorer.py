"""A detector's folder: every file checked, and pictures of the nearest training images."""

import csv
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gradmix.eval.detectors import DeepKNN
from gradmix.eval.scoring.score_file import write_scores
from gradmix.eval.scoring.scorer import Scorer, save_scorer
from gradmix.eval.scoring.sheets import CAPTION, GAP, MARGIN, SIDE, _font, _short, write_sheets
from gradmix.ssl.config import DataConfig
from gradmix.ssl.data.images import ImageSet, decode
from gradmix.ssl.data.open_set import OpenSetData, load_data


@pytest.fixture
def detector(digits_run, tmp_path):
    return shutil.copytree(digits_run / "detector", tmp_path / "detector")


@pytest.fixture(scope="module")
def train():
    return load_data(DataConfig(name="digits", image_size=16, split=0), 0).train


def files_of(images, folder):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return sorted(str(path) for path in folder.iterdir())


def test_every_file_of_the_folder_is_checked(detector):
    Scorer(detector)
    names = sorted(path.name for path in detector.iterdir() if path.is_file())
    assert names == [
        *("backbone.safetensors", "detector.json", "detector.safetensors", "scorer.json", "thumbnails.safetensors"),
    ]
    for name in names:
        path = detector / name
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name}: damaged"):
                Scorer(detector)
        path.unlink()
        with pytest.raises(ValueError, match=name):
            Scorer(detector)
        path.write_bytes(content)
    Scorer(detector)


def test_any_detector_ships(digits_run, command, tmp_path):
    """With a head, and on projections too: from the files, the scores and decisions of the evaluation."""
    run = shutil.copytree(digits_run, tmp_path / "run")
    assert sorted(path.name for path in (run / "detectors").iterdir()) == ["class_knn", "mahalanobis"]
    names = ["deep_knn@projections", "class_knn", "mahalanobis", "vim", "nnguide", "gaussian_mixture", "mean_shift"]
    asked = (f"run={run}", f"detectors=[{','.join(names)}]", "primary=vim", "accept=0.9")
    result = command("eval", *asked)
    assert result.code == 0, result.err
    test = load_data(DataConfig(name="digits", image_size=16, split=0), 0).test
    paths = files_of(test.images, tmp_path / "photos")
    measured, numbers = load_file(run / "features/scores.safetensors"), json.loads((run / "metrics.json").read_text())
    keys = [name.replace("@", "_") for name in names]
    folders = {path.name: path for path in (run / "detectors").iterdir()} | {"vim": run / "detector"}
    assert sorted(folders) == sorted([*keys, "deep_knn"])  # deep_knn: what the report explains with
    for key in keys:
        scorer = Scorer(folders[key])
        assert scorer.detector.calibration_.accept == 0.9 and scorer.knn is None
        scores = list(scorer.score(paths))
        ours, theirs = torch.tensor([s.score for s in scores]), measured[f"{key}/score"]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        flagged = torch.tensor([s.prediction == "unknown" for s in scores])
        alarms = flagged[test.labels >= 0].double().mean().item()
        assert alarms == pytest.approx(numbers[f"osr/{key}/false_alarms"], abs=0.006)
        assert {s.nearest for s in scores} == {""}
    assert "Surest mistakes" in (run / "report.html").read_text()
    photos = f"images={tmp_path / 'photos'}"
    explained = command("score", f"detector={run}/detector", photos, "explain=sheets")
    assert explained.code == 2 and "explain: vim knows no training images to show; deep_knn" in explained.err
    assert not (tmp_path / "scores.csv").exists()
    assert command("score", f"detector={run}/detectors/deep_knn", photos, "explain=sheets").code == 0
    result = command("score", f"detector={run}/detectors/vim", photos)
    assert result.code == 2 and f"did you mean {run}/detector or {run}/detectors/class_knn or" in result.err
    assert Scorer(run).folder == run / "detector"
    (run / "detectors/deep_knn_projections/head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"head\.safetensors: missing"):
        Scorer(run / "detectors/deep_knn_projections")
    for primary, message in (("vimm", "primary: no 'vimm'; did you mean vim"), ("vim@x", "expected @features or")):
        result = command("eval", asked[0], f"primary={primary}")
        assert result.code == 2 and message in result.err, result.err


def test_only_what_is_above_the_threshold_is_unknown_and_has_a_margin_above_0(detector, digits_run):
    features = load_file(digits_run / "features/test.safetensors")["features"][:20].numpy()
    scorer = Scorer(detector)
    expected = scorer.detector.score(features).astype(float)
    scorer.detector.calibration_, scorer.detector.threshold = None, expected[7]
    scores = list(scorer.score_features(features, [f"{row}" for row in range(20)], batch_size=6))
    assert [score.path for score in scores] == [f"{row}" for row in range(20)]
    assert [score.margin for score in scores] == (expected - expected[7]).tolist()
    assert [score.prediction == "unknown" for score in scores] == (expected > expected[7]).tolist()


def test_class_names_that_were_changed_are_refused(detector):
    about = json.loads((detector / "scorer.json").read_text())
    about["classes"][0] = "seven"
    (detector / "scorer.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"scorer\.json: damaged, its content does not match its hash"):
        Scorer(detector)


def test_a_training_image_is_its_own_nearest(detector, train, tmp_path):
    scorer = Scorer(detector)
    rows = [0, 17, 301]
    paths = files_of(train.images[rows], tmp_path / "photos")
    distances, nearest = scorer.neighbours(torch.stack([scorer.backbone.transform(path) for path in paths]), 5)
    assert distances[:, 0].max() < 1e-3 and (distances.diff(dim=1) >= -1e-6).all()
    for row, near, score in zip(rows, nearest[:, 0].tolist(), scorer.score(paths), strict=True):
        assert torch.equal(scorer.training_image(near), train.images[row])  # scikit-learn's digits have twins
        assert scorer.training_class(near) == ["2", "4", "5", "9", "8", "3"][train.labels[row]]
        assert score.nearest.startswith("training image ")
    assert [s.score for s in scorer.score(paths)] == pytest.approx(distances[:, 4].tolist(), abs=1e-3)


def test_stages_overlap_and_change_no_bit(detector, train, tmp_path):
    """Against one batch after another by hand; unreadable files anywhere, and only a few batches in memory."""
    paths = files_of(train.images[:50], tmp_path / "photos")
    for row in (0, 7, 8, 9, 10, 11, 49):  # one batch of four is unreadable as a whole
        (tmp_path / "photos" / f"{row:03d}.png").write_text("no image")
    scorer, expected = Scorer(detector), []
    for first in range(0, 50, 4):
        images = [train.images[i] for i in range(first, min(first + 4, 50)) if i not in (0, 7, 8, 9, 10, 11, 49)]
        if images:
            with torch.inference_mode():
                expected += scorer.detector.score(scorer.backbone(torch.stack(images))).tolist()
    begun, decode_one = [], scorer._decode
    scorer._decode = lambda path: (begun.append(path), decode_one(path))[1]
    scores = []
    for number, score in enumerate(scorer.score(paths, batch_size=4)):
        scores.append(score)
        assert len(begun) <= number + 1 + 6 * 4
    assert [s.path for s in scores] == paths == sorted(begun)
    assert [s.path[-7:-4] for s in scores if s.error] == ["000", "007", "008", "009", "010", "011", "049"]
    assert [s.score for s in scores if not s.error] == expected
    early = scorer.score(paths, batch_size=4)
    next(early)
    begun.clear()
    early.close()
    assert len(begun) <= 6 * 4  # what is not begun is left undone


def test_where_the_network_runs(detector, command, train, tmp_path, digits_run):
    paths = files_of(train.images[:8], tmp_path / "photos")
    arguments = (f"detector={detector}", f"images={tmp_path / 'photos'}")
    assert command("score", *arguments, "device=cpu", "out=cpu.csv").code == 0
    assert command("score", *arguments, "out=auto.csv").code == 0
    with open(tmp_path / "cpu.csv") as first, open(tmp_path / "auto.csv") as second:
        ours, theirs = ([float(row["score"]) for row in csv.DictReader(file)] for file in (first, second))
    assert ours == pytest.approx(theirs, abs=1e-3)
    if torch.cuda.is_available():
        scorer = Scorer(detector, "cuda")
        assert next(scorer.backbone.parameters()).is_cuda
        assert [s.score for s in scorer.score(paths)] == pytest.approx(ours, abs=1e-3)
    else:
        for name, others in (("score", arguments), ("eval", (f"run={digits_run}", "out=elsewhere"))):
            result = command(name, *others, "device=cuda")
            assert result.code == 2 and "device: torch finds no cuda on this machine (there is cpu" in result.err
    result = command("score", *arguments, "device=gpu")
    assert result.code == 2 and "device" in result.err and "auto" in result.err


def test_names_that_are_no_utf_8_come_out_as_they_are(detector, train, tmp_path):
    name = os.fsencode(files_of(train.images[:1], tmp_path / "photos")[0]).replace(b"000", b"caf\xe9")
    os.rename(tmp_path / "photos/000.png", name)
    scorer, paths = Scorer(detector), [os.fsdecode(name)]
    assert write_scores(scorer, paths, tmp_path / "scores.csv") == (1, 0, 0)
    assert (tmp_path / "scores.csv").read_bytes().splitlines()[1].startswith(name + b",")
    assert write_scores(scorer, paths, tmp_path / "scores.jsonl") == (1, 0, 0)
    assert json.loads((tmp_path / "scores.jsonl").read_text())["path"] == paths[0]
    assert write_sheets(scorer, paths, tmp_path / "sheets", 200) == (1, 1)


def test_sheets_show_each_image_and_its_neighbours(detector, train, tmp_path):
    paths = files_of(train.images[:11], tmp_path / "photos")
    (tmp_path / "photos" / "000.png").write_text("no image")
    scorer = Scorer(detector)
    assert write_sheets(scorer, paths, tmp_path / "sheets", 200) == (10, 2)
    pages = sorted((tmp_path / "sheets").iterdir())
    assert [page.name for page in pages] == ["sheet-001.png", "sheet-002.png"]
    page = np.asarray(Image.open(pages[0]))
    image = np.asarray(Image.fromarray(train.images[1].permute(1, 2, 0).numpy()).resize((SIDE, SIDE), 0))
    top = MARGIN + 18
    np.testing.assert_array_equal(page[top : top + SIDE, MARGIN : MARGIN + SIDE], image)
    left = MARGIN + SIDE + 2 * GAP  # its nearest training image is itself
    np.testing.assert_array_equal(page[top : top + SIDE, left : left + SIDE], image)
    assert page.shape[0] == 2 * MARGIN + 18 + 8 * (SIDE + GAP + CAPTION)  # eight per sheet
    (tmp_path / "sheets/sheet-of-mine.png").write_text("kept")
    assert write_sheets(scorer, paths, tmp_path / "sheets", limit=3) == (3, 1)
    left = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert left == ["sheet-001.png", "sheet-of-mine.png"]  # none of the longer scoring


@pytest.mark.parametrize(
    "name", ["ä", "Käfer grün, alt.JPEG", "W" * 40 + ".jpg", "two\nlines.png", "i" * 21, "caf\udce9"]
)
def test_names_on_sheets_are_as_wide_as_a_tile_and_have_no_boxes(name):
    font, short = _font(10), _short(name, _font(10))
    assert font.getlength(short) <= SIDE and short.rpartition("…")[2][-4:] == name[-4:]
    assert ("…" in short) == (font.getlength(name.replace("\n", " ")) > SIDE)
    box = bytes(font.getmask("\uffff"))
    assert box and not any(bytes(font.getmask(letter)) == box for letter in short if letter < "\ud800")


def test_letters_in_two_characters_are_put_together():
    assert _short("a\u0308", _font(10)) == "ä"


def test_training_images_are_found_from_any_folder(digits_run, train, tmp_path, monkeypatch, capsys):
    """Trained on ``photos`` and a shard in one folder, scored in another."""
    files_of(train.images[:6], tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    relative = sorted(str(path) for path in Path("photos").iterdir())
    with tarfile.open("a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:  # the header takes 512 bytes
        tar.add(relative[5])
    relative[5] = f"a.tar#512+{os.path.getsize(relative[5])}#{relative[5]}"
    features = load_file(digits_run / "features" / "train.safetensors")["features"][:6]
    data = OpenSetData(ImageSet(torch.zeros(6, dtype=torch.long), 16, files=relative), None, None, ["x"], [], [0])
    save_scorer(tmp_path / "a", DeepKNN(k=1).fit(features, torch.zeros(6, dtype=torch.long)), digits_run, data)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    scorer = Scorer(tmp_path / "a")
    assert torch.equal(scorer.training_image(4), decode(tmp_path / "photos/004.png", 16))
    assert torch.equal(scorer.training_image(5), decode(tmp_path / "photos/005.png", 16))
    assert next(scorer.score([tmp_path / "photos/000.png"])).nearest == str(tmp_path / "photos/000.png")
    kept = files_of(train.images[:1], tmp_path / "kept")
    write_sheets(scorer, kept, tmp_path / "sheets", 200)
    assert capsys.readouterr().err == ""
    shutil.rmtree(tmp_path / "photos")
    (tmp_path / "a.tar").unlink()
    write_sheets(scorer, kept, tmp_path / "sheets", 200)
    told = capsys.readouterr().err
    assert told == f"explain: none of the training images were found (looked for {tmp_path / 'photos/000.png'})\n"


def test_thumbnails_of_large_images_and_paths_of_files(digits_run, train, tmp_path):
    features = load_file(digits_run / "features" / "train.safetensors")["features"][:6]
    detector = DeepKNN().fit(features, torch.tensor([0, 0, 0, 1, 1, 1]))
    large = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)

    def data(*images):
        return OpenSetData(ImageSet(torch.arange(6), *images), None, None, ["x", "y"], [], [0, 1])

    save_scorer(tmp_path / "a", detector, digits_run, data(64, large))
    small = Scorer(tmp_path / "a").training_image(4)
    expected = large[4].double().view(3, 32, 2, 32, 2).mean((2, 4))
    assert small.shape == (3, 32, 32) and (small.double() - expected).abs().max() <= 0.5 + 1e-6

    files = files_of(train.images[:6], tmp_path / "photos")
    save_scorer(tmp_path / "a", detector, digits_run, data(16, large, files))
    assert not (tmp_path / "a" / "thumbnails.safetensors").exists()
    scorer = Scorer(tmp_path / "a")
    assert torch.equal(scorer.training_image(4), decode(files[4], 16)) and scorer.training_name(4) == files[4]
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(ValueError, match="not a readable image"):
        scorer.training_image(4)
    kept = files_of(train.images[:2], tmp_path / "kept")
    assert write_sheets(scorer, kept, tmp_path / "sheets", 200) == (2, 1)  # drawn without the pictures that are gone
