"""report.html: the numbers of metrics.json, in a page that a real browser opens without a network."""

import json
import re
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from markupsafe import escape
from PIL import Image
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.metrics import auc, average_precision_score
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from gradmix.eval.detectors import DeepKNN
from gradmix.eval.report import curves, write_report
from gradmix.eval.report.charts import Line, line_chart, thin
from gradmix.eval.report.feature_map import plane
from gradmix.eval.report.mistakes import mistakes
from gradmix.eval.report.numbers import numbers
from gradmix.eval.report.report import _mixing as mixing_rows
from gradmix.eval.report.report import what_was_run
from gradmix.eval.runs.folder import command as command_of
from gradmix.eval.runs.folder import differences, read_run
from gradmix.ssl.pictures import PADDING, tile_side


@pytest.fixture(scope="module")
def report(digits_run):
    return write_report(digits_run)


def test_it_opens_in_a_browser_on_wide_and_narrow_screens_and_in_the_dark(browser, report):
    assert report.stat().st_size < 8e6
    papers = set()
    for width, dark in ((1200, False), (390, False), (390, True)):
        page = browser(report, width, dark)
        run = page.driver.execute_script
        assert run("return document.documentElement.scrollWidth") == width
        assert run("return [...document.images].length") >= 10
        assert (
            run("return [...document.images].filter(i => !i.naturalWidth || !i.offsetWidth || !i.offsetHeight)") == []
        )
        assert run("return document.querySelectorAll('svg.chart').length") >= 8
        assert run("return [...document.querySelectorAll('svg')].filter(s => s.clientHeight < 10).length") == 0
        ids = run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids))
        papers.add(run("return getComputedStyle(document.body).backgroundColor"))
        assert page.complaints() == []
    assert papers == {"rgb(255, 255, 255)", "rgb(20, 23, 27)"}


@pytest.mark.parametrize("width", [1200, 390])
def test_pointing_at_the_map_shows_that_point_s_image(browser, report, digits_run, width):
    page = browser(report, width)
    run = page.driver.execute_script
    assert run("return document.querySelector('.tip').hidden")
    place = run(
        "const mark = [...document.querySelectorAll('.map path')].at(-1); mark.scrollIntoView({block: 'center'});"
        "const r = mark.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
    )
    move = {"type": "mouseMoved", "x": place[0], "y": place[1]}
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", move)
    shown = run(
        "const thumb = document.querySelector('.thumb'), style = getComputedStyle(thumb);"
        "const on = [...document.querySelectorAll('.map path')].findIndex(m => m.classList.contains('on'));"
        "return [thumb.offsetWidth, thumb.offsetHeight, style.backgroundImage.slice(0, 24), on,"
        "        document.querySelector('.tip p').textContent,"
        "        JSON.parse(document.getElementById('map-data').textContent).captions[on]]"
    )
    assert shown[0] > 50 and shown[1] > 50
    assert shown[2] == 'url("data:image/webp;bas'
    assert shown[3] >= 0 and shown[4] == shown[5]
    same = run(
        "const labels = JSON.parse(document.getElementById('map-data').textContent).labels;"
        "return [...document.querySelectorAll('.map path')].map((m, i) => [labels[i], getComputedStyle(m).opacity])"
    )
    assert {(label == same[shown[3]][0], opacity) for label, opacity in same} == {(True, "1"), (False, "0.15")}
    assert re.fullmatch(r"test image \d+: \w+, taken for \w+, score [\d.]+", shown[4])
    row = int(shown[4].split()[2].rstrip(":"))
    classes = json.loads((digits_run / "detector/scorer.json").read_text())["classes"]
    label = load_file(digits_run / "features/test.safetensors")["labels"][row]
    assert f": {classes[label] if label >= 0 else 'unknown'}," in shown[4]
    assert run("return document.documentElement.scrollWidth") == width
    run("document.querySelector('.mapbox').focus()")
    page.driver.switch_to.active_element.send_keys("\ue012")  # arrow left
    assert run("return document.querySelector('.tip p').textContent") != shown[4]
    assert page.complaints() == []


def test_its_numbers_are_those_of_metrics_json(report, digits_run):
    numbers = json.loads((digits_run / "metrics.json").read_text())
    cells = re.findall(r'data-key="([^"]+)" data-value="([^"]+)">([\d.]+)', report.read_text())
    assert len(cells) > 30
    for key, value, shown in cells:
        assert float(value) == numbers[key]
        assert shown == f"{100 * numbers[key]:.2f}"
    single = {key for key, value in numbers.items() if not isinstance(value, dict)}
    assert {key for key in single if key.startswith(("knn", "linear", "majority"))} <= {key for key, _, _ in cells}
    for key in single:  # and every other one is in the list of all
        assert key in report.read_text()


def test_recalls_stand_class_by_class_lowest_first(browser, report, digits_run):
    numbers = json.loads((digits_run / "metrics.json").read_text())
    labels = load_file(digits_run / "features/test.safetensors")["labels"]
    classes = json.loads((digits_run / "detector/scorer.json").read_text())["classes"]
    rows = browser(report).driver.execute_script(
        "const box = [...document.querySelectorAll('details')].find(d => d.textContent.includes('Recall by class'));"
        "return [...box.querySelectorAll('tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert rows[0] == ["class", "test images", "kNN", "linear probe"]
    assert [float(row[2]) for row in rows[1:]] == sorted(float(row[2]) for row in rows[1:])
    for name, count, *shown in rows[1:]:
        assert int(count) == (labels == classes.index(name)).sum()
        assert shown == [f"{100 * numbers[f'{who}/recall'][name]:.2f}" for who in ("knn", "linear")]


def test_the_area_under_each_curve_is_the_number_beside_it(digits_run):
    run = read_run(digits_run, images=False)
    known = run.features["test"]["labels"] >= 0
    assert {"deep_knn", "pixels"} <= set(run.scores)
    for name, (score, correct) in run.scores.items():
        sides = score[known], score[~known], correct[known]
        assert auc(*curves.roc(*sides)) == pytest.approx(run.numbers[f"osr/{name}/auroc"], abs=1e-4)
        assert auc(*curves.oscr(*sides)) == pytest.approx(run.numbers[f"osr/{name}/oscr"], abs=2e-3)
        assert average_precision_score(~known, score) == pytest.approx(run.numbers[f"osr/{name}/aupr"], abs=1e-4)


def test_the_command_in_it_makes_the_same_run(digits_run, command):
    run = read_run(digits_run, images=False)
    changed = differences(run.config)
    assert {key: value for key, _, value in changed} == {
        "epochs": 2,
        "encoder.width": 4,
        "knn_every": 1,
        "pictures_every": 1,
        "run_dir": "run",
        "trainer.accelerator": "cpu",
    }
    shutil.copytree(digits_run, "run")
    assert "finished already" in command("pretrain", *command_of(run.config, changed).split()[1:]).out


def test_the_command_that_was_typed(report):
    typed = re.search(r"typed</h3><pre>(.*?)</pre>", report.read_text())[1]
    words = "epochs=2 encoder.width=4 knn_every=1 pictures_every=1 trainer.accelerator=cpu run_dir=run"
    assert typed == f"gradmix-pretrain {words}"


def test_sixty_classes_stay_readable(digits_run, tmp_path, browser):
    """Made-up labels: the page must not have a legend of 60 marks or a table of 61 columns."""
    run, rng = shutil.copytree(digits_run, tmp_path / "run"), np.random.default_rng(0)
    parts = {name: load_file(run / f"features/{name}.safetensors") for name in ("train", "held_out", "test")}
    for name, part in parts.items():
        part["labels"] = rng.integers(-1 if name == "test" else 0, 60, len(part["labels"]))
        save_file(part, run / f"features/{name}.safetensors")
    fitted = DeepKNN().fit(parts["train"]["features"], parts["train"]["labels"])
    fitted.calibrate(parts["held_out"]["features"]).save(run / "detector")
    names = [f"a class with a long name {label}" for label in range(60)]
    (run / "detector/scorer.json").write_text(json.dumps({"classes": names}))
    page = browser(write_report(run), 390)
    js = page.driver.execute_script
    assert js("return document.documentElement.scrollWidth") == 390
    assert js("return document.querySelectorAll('.legend li').length") == 0
    assert js("return [...document.querySelectorAll('table')].every(t => t.rows[0].cells.length < 10)")
    assert "a class with a long name 24 and 35 more" in js("return document.querySelector('#run').textContent")
    matrix = "const image = document.querySelector('img.matrix'), size = [image.naturalWidth, image.naturalHeight];"
    assert js(matrix + "return [...size, image.width <= 358, image.width == image.height]") == [61, 61, True, True]
    # The darkest cell of a row is the class that most of its images are taken for.
    predicted, labels = fitted.predict(parts["test"]["features"]), parts["test"]["labels"]
    counts = np.bincount(predicted[labels == 7] % 61, minlength=61)
    row = js(
        matrix + "const canvas = new OffscreenCanvas(...size).getContext('2d'); canvas.drawImage(image, 0, 0);"
        "return [...canvas.getImageData(0, 7, 61, 1).data].filter((_, i) => i % 4 == 0)"
    )
    assert np.argmin(row) == np.argmax(counts) and (np.array(row) < 255).tolist() == (counts > 0).tolist()
    assert page.complaints() == []


def test_a_run_where_everything_is_missing_says_so(digits_run, tmp_path, browser):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(digits_run / "config.yaml", bare)
    skipped = {"how well unknown images are found": "the test set has no unknown classes"}
    (bare / "metrics.json").write_text(json.dumps({"skipped": skipped, "data/bad_images": 2, "data/test_copies": 3}))
    report = write_report(bare)
    text = report.read_text()
    for sentence in (
        "Not measured: how well unknown images are found, for the test set has no unknown classes.",
        "unreadable files, left out: 2; exact copies of training images in the test set: 3",
        "There are no TensorBoard events in this folder.",
        "There are no saved features in this folder.",
        "There are no classes to confuse.",
        "TensorBoard holds no pictures of mixing.",
    ):
        assert sentence in text
    page = browser(report, 390)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
    assert page.complaints() == []


def test_what_the_evaluation_was_told_is_shown_not_what_the_run_was(digits_run, command, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    assert command("eval", f"run={run}", "accept=0.5").code == 0
    text = (run / "report.html").read_text()
    row = '<th><code>accept</code></th><td class="value">0.95</td><td class="value">0.5</td>'
    assert row in text
    assert "accept=0.5" in text and "accept: 0.95" in (run / "config.yaml").read_text()

    (tmp_path / "far").mkdir()
    for i in range(20):
        Image.new("L", (16, 16), 10 * i).save(tmp_path / f"far/{i}.png")
    told = ("detector_options.deep_knn.k=9", "detectors=[deep_knn,vim]", "unknown_root=far")
    assert command("eval", f"run={run}", *told).code == 0
    shown = what_was_run(read_run(run)).body
    typed = f"gradmix-eval run={run} detector_options.deep_knn.k=9 'detectors=[deep_knn,vim]' unknown_root=far"
    assert escape(typed) in shown
    again = shown.partition("A command that makes this run again")[2].partition("</pre>")[0]
    for word in ("data.unknown_root=far", "detectors=[deep_knn,vim]", "detector_options.deep_knn.k=9"):
        assert word in again
        assert f"<code>{word.partition('=')[0]}</code>" in shown
    assert "<dt>Unknown images</dt><dd>far</dd>" in shown
    assert read_run(run).why_no_images == ""  # they are found where the evaluation found them


@pytest.mark.parametrize("columns", [4, 8])
@pytest.mark.parametrize("rows", [3, 4, 6])
@pytest.mark.parametrize("size", [8, 96])
def test_rows_of_the_picture_of_mixing_have_their_names(digits_run, columns, rows, size):
    side = tile_side(size)
    grid = make_grid(torch.zeros(rows * columns, 3, side, side), nrow=columns, padding=PADDING)
    file = BytesIO()
    to_pil_image(grid).save(file, "PNG")
    run = read_run(digits_run, images=False)
    run.config.data.image_size = size
    names = mixing_rows(run, 3, file.getvalue())["rows"]
    assert len(names) == rows and names[-1] == {3: "outlier", 4: "mixed", 6: "outlier"}[rows]


def test_images_that_moved_are_named(digits_run, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "moved")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("split: 0", "split: 1"))
    assert "images found now are not those of the saved features" in read_run(run).why_no_images
    (run / "config.yaml").write_text(
        config.replace("name: digits", "name: imagefolder").replace("root: null", "root: /gone")
    )
    text = write_report(run).read_text()
    assert "The images are not where they were (data.root: /gone is not a folder)." in text
    assert 'class="map"' in text and "<img" in text  # mixing pictures are still there


def test_a_flat_folder_without_classes(command, tmp_path):
    (tmp_path / "flat").mkdir()
    for i, image in enumerate(load_digits().images[:60]):
        Image.fromarray((image * 15.9).astype(np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    small = ("epochs=1", "batch_size=16", "encoder.width=4", "knn_k=2", "mix=none", "trainer.accelerator=cpu")
    data = ("data=imagefolder", "data.image_size=8", "data.root=flat", "method=simclr")
    assert command("pretrain", *small, *data, "run_dir=run").code == 0
    text = write_report(tmp_path / "run").read_text()
    assert "the images have no classes" in text
    assert "mix=none: nothing was mixed." in text
    assert "image, flat/0.png, score" in text or "image, flat/1.png, score" in text


@pytest.mark.parametrize(
    ("values", "unit", "last"), [([80, 100], "%", 100), ([99, 100], "%", 100), ([80, 110], "", 110)]
)
def test_an_axis_of_shares_ends_at_100(values, unit, last):
    chart = line_chart("Accuracy", [Line([0, 1], values)], "", unit)
    assert max(float(number) for number in re.findall(r">([\d.]+)</text>", chart)) == last


def test_mistakes_say_what_an_image_was_taken_for(digits_run):
    """By the vote of the nearest training images, and the threshold."""
    run = read_run(digits_run)
    labels = load_file(digits_run / "features/test.safetensors")["labels"]
    shown = re.findall(r"(\w+), taken for (\w+)\W.*?score [\d.]+, test image (\d+)", mistakes(run).body, re.DOTALL)
    assert len(shown) > 12
    for what, taken, row in shown:
        assert what == run.name_of(labels[int(row)]) != taken == run.name_of(run.verdict.label[int(row)])


def test_the_histogram_names_the_detector_it_shows(digits_run, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    assert "Scores of the reference detector" in write_report(run).read_text()
    scores = load_file(run / "features/scores.safetensors")
    save_file({k: v for k, v in scores.items() if "deep_knn" not in k}, run / "features/scores.safetensors")
    text = write_report(run).read_text()
    assert "class_knn score<" in text and "<p>Scores of class_knn; the less" in text
    assert "deep_knn score<" not in text and "Scores of the reference detector" not in text
    save_file({key: scores[key] for key in ("labels", "images")}, run / "features/scores.safetensors")
    assert "No detector was measured." in curves.open_set(read_run(run)).body


def test_the_numbers_say_which_detector_is_shaded_and_which_one_scores(digits_run):
    run = read_run(digits_run)
    assert "The shaded column is the reference detector" in (text := numbers(run).body)
    assert "holds <code>deep_knn</code>." in text
    run.config.primary = "mahalanobis"
    run.numbers = {key: value for key, value in run.numbers.items() if not key.startswith("osr/deep_knn/")}
    assert 'class="primary"' not in (text := numbers(run).body) and "shaded" not in text
    assert "holds <code>mahalanobis</code>; the confusion and the surest mistakes below are those of" in text


def test_the_histogram_has_no_threshold_where_each_class_has_its_own(digits_run):
    run, said = read_run(digits_run), "Images to the right of the threshold are called unknown"
    assert said in curves.open_set(run).body and ">threshold<" in curves.open_set(run).body
    run.detector.accept(0.7, per_class=True)
    assert said not in curves.open_set(run).body and ">threshold<" not in curves.open_set(run).body


def test_names_of_classes_and_files_are_escaped(command, tmp_path, browser):
    names = ["<script>alert(1)</script>"[:8] + " & cat", 'dog\'s "best" </script', "bird"]
    digits = load_digits()
    for label, name in enumerate(names):
        folder = tmp_path / "photos" / name.replace("/", "_")
        folder.mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == label][:16]):
            Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"<b>{i}&.png")
    known = [path.name for path in sorted((tmp_path / "photos").iterdir())][:2]
    small = ("epochs=1", "batch_size=8", "encoder.width=4", "knn_k=2", "trainer.accelerator=cpu")
    data = ("data=imagefolder", "data.image_size=8", "data.root=photos", "data.known=[0,1]", "run_dir=run")
    result = command("pretrain", *small, *data)
    assert result.code == 0, result.err
    report = write_report(tmp_path / "run")
    page = browser(report)
    assert page.driver.execute_script("return document.querySelectorAll('b b, main script:not([type])').length") == 0
    headings = page.driver.execute_script(
        "return [...document.querySelectorAll('.confusion thead th')].map(cell => cell.textContent)"
    )
    assert headings == ["", *known, "unknown"]
    assert page.complaints() == []


def test_a_hostile_name_is_text_wherever_it_stands(digits_run, tmp_path, browser):
    """A class whose name no folder could have, a key and a reason of metrics.json, and the name of a detector."""
    hostile, run = "<script>alert(1)</script>&\"'$x$ {{ 7*7 }}", shutil.copytree(digits_run, tmp_path / "run")
    about = json.loads((run / "detector/scorer.json").read_text())
    first = about["classes"][0]
    about["classes"][0] = hostile
    (run / "detector/scorer.json").write_text(json.dumps(about))
    text = (run / "metrics.json").read_text().replace("osr/mahalanobis/", "osr/<i>&/")
    numbers = json.loads(text) | {"skipped": {hostile: hostile}, "command": hostile}
    for name in ("knn", "linear"):
        numbers[f"{name}/recall"][hostile] = numbers[f"{name}/recall"].pop(first)
    (run / "metrics.json").write_text(json.dumps(numbers))
    page = browser(write_report(run))
    js = page.driver.execute_script
    assert js("return document.querySelectorAll('main script:not([type]), main i').length") == 0
    assert js("return document.querySelector('.confusion thead').rows[0].cells[1].textContent") == hostile
    assert hostile in js("return [...document.querySelectorAll('.legend li')].map(item => item.textContent)")
    assert hostile in js("return [...document.querySelectorAll('#run pre')].map(item => item.textContent)")
    numbers_text = js("return document.querySelector('#numbers').textContent")
    assert f"Not measured: {hostile}, for {hostile}." in numbers_text and "<i>&" in numbers_text
    assert numbers_text.count(hostile) >= 3  # and in the table of recalls
    captions = js("return JSON.parse(document.getElementById('map-data').textContent).captions")
    assert any(f"taken for {hostile}, score" in caption for caption in captions)
    assert page.complaints() == []  # the page's policy would report a script that tried to load


def test_a_folder_that_is_no_evaluated_run(tmp_path, digits_run):
    with pytest.raises(ValueError, match=r"config\.yaml is missing"):
        write_report(tmp_path)
    shutil.copy(digits_run / "config.yaml", tmp_path)
    with pytest.raises(ValueError, match="has not finished training; repeat the gradmix-pretrain command that began"):
        write_report(tmp_path)
    shutil.copy(digits_run / "training.json", tmp_path)
    with pytest.raises(ValueError, match=r"not evaluated yet, metrics\.json is missing"):
        write_report(tmp_path)


def test_the_map_is_the_same_every_time_and_stands_degenerate_features():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 60))
    assert np.array_equal(plane(features), plane(features))
    assert np.allclose(plane(features[:9]), plane((features[:9] * 1e25).astype(np.float32)), atol=1e-3)  # no overflow
    for odd in (np.ones((20, 8)), np.zeros((3, 4)), rng.normal(size=(1, 4)), rng.normal(size=(30, 1))):
        places = plane(odd)
        assert places.shape == (len(odd), 2) and np.isfinite(places).all()
        assert places.min() >= 0 and places.max() <= 1


def test_thinned_curves_keep_their_ends():
    x = np.arange(5000)
    shown, values = thin(x, x**2)
    assert len(shown) <= 400 and shown[0] == 0 and shown[-1] == 4999 and (values == shown**2).all()
