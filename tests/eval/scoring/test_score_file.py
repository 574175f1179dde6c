"""Scoring that is stopped, by whatever: rows stay, it goes on, and the file is that of a scoring never stopped."""

import csv
import fcntl
import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy.stats import false_discovery_control
from sklearn.datasets import load_digits

import gradmix.ssl.runs.lock
from gradmix.eval import detectors
from gradmix.eval.scoring.score_file import scoring_key, write_scores
from gradmix.eval.scoring.scorer import Scorer, find_images
from gradmix.ssl.runs.files import hash_file, hash_json


@pytest.fixture
def detector(digits_run, tmp_path):
    return shutil.copytree(digits_run / "detector", tmp_path / "detector")


@pytest.fixture
def photos(tmp_path):
    """Forty images, with names that CSV quotes and one that is no UTF-8, and a file that can't be read."""
    (tmp_path / "photos").mkdir()
    odd = {3: "a, comma", 4: 'a "quote"', 5: "two\nlines", 6: "r\r\n,", 7: os.fsdecode(b"caf\xe9")}
    for i, image in enumerate(load_digits().images[:40]):
        Image.fromarray((image * 15).astype(np.uint8)).save(tmp_path / "photos" / f"{i:02d}{odd.get(i, '')}.png")
    (tmp_path / "photos" / "20.png").write_text("<html>")
    return tmp_path / "photos"


def parts(folder):
    return list(folder.glob("*.part"))


@pytest.mark.parametrize("name", ["scores.csv", "scores.jsonl"])
def test_wherever_the_part_ends_the_scores_are_the_same(name, detector, photos, tmp_path, capsys):
    scorer, paths, out = Scorer(detector), find_images(str(photos)), tmp_path / "new folder" / name
    counts = write_scores(scorer, paths, out, batch_size=3)
    assert counts[0] == 40 and counts[2] == 1 and not parts(out.parent)
    assert capsys.readouterr().out == ""
    whole = out.read_bytes()
    ends = []
    for images in range(3, 40, 3):  # what whole batches take
        write_scores(scorer, paths[:images], tmp_path / name, batch_size=3)
        assert whole.startswith((tmp_path / name).read_bytes())
        ends.append((tmp_path / name).stat().st_size)
    part = out.with_name(f"{name}.{scoring_key(scorer, paths, 3)}.part")
    cuts = np.random.default_rng(0).integers(0, len(whole), 12).tolist()
    for cut in [*cuts, *(ends[1] + shift for shift in (-2, -1, 0, 1)), len(whole)]:
        tail = bytes(len(whole) - cut if cut % 2 else 0)  # zeros: what a file system may show after a power cut
        part.write_bytes(whole[:cut] + tail)
        assert write_scores(scorer, paths, out, batch_size=3) == counts
        assert out.read_bytes() == whole and not part.exists()
        kept = 40 if cut == len(whole) else 3 * sum(end <= cut for end in ends)
        assert capsys.readouterr().out == (f"{part}: {kept} of 40 images are scored already\n" if kept else "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_loses_no_batch(number, code, detector, photos, command, started, tmp_path):
    arguments = (f"detector={detector}", f"images={photos}", "batch_size=1")
    assert command("score", *arguments, "out=whole.csv").code == 2  # for the unreadable one
    finished = tmp_path / "scores.csv"
    finished.write_text("path,score,prediction,margin,nearest,error\nof an earlier scoring")

    def strike(process):
        while not any(part.stat().st_size > 1000 for part in parts(tmp_path)):
            time.sleep(0.001)
        os.kill(process, number)

    if number == signal.SIGKILL:
        killed = started(os.devnull, "score", *arguments)
        strike(killed.pid)
        killed.join(10)
        assert killed.exitcode == code
    else:
        threading.Thread(target=strike, args=(os.getpid(),)).start()
        stopped = command("score", *arguments)
        assert stopped.code == code and "of 40 images are scored; the same command goes on after them" in stopped.err
    (part,) = parts(tmp_path)
    there = part.read_bytes()
    assert finished.read_text().endswith("of an earlier scoring")
    assert (tmp_path / "whole.csv").read_bytes().startswith(there) and len(there) > 1000
    result = command("score", *arguments)
    assert result.code == 2 and f"{part.name}: " in result.out and "of 40 images are scored already" in result.out
    assert finished.read_bytes() == (tmp_path / "whole.csv").read_bytes() and not parts(tmp_path)


@pytest.mark.parametrize("room", [0, 1500])
def test_a_full_disk_loses_no_batch(room, files_up_to, detector, photos, command, tmp_path):
    arguments = (f"detector={detector}", f"images={photos}", "batch_size=3")
    command("score", *arguments, "out=whole.csv")
    with files_up_to(room):
        full = command("score", *arguments)
    assert full.code == 2 and "gradmix-score: scores.csv: can't be written (File too large)\n" in full.err
    assert ("of 40 images are scored; the same command goes on after them" in full.err) == bool(room)
    assert len(parts(tmp_path)) == bool(room)
    assert ("scored already" in command("score", *arguments).out) == bool(room)
    assert (tmp_path / "scores.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes() and not parts(tmp_path)


def test_a_part_of_another_scoring_is_left_alone(detector, photos, tmp_path, capsys):
    scorer, out = Scorer(detector), tmp_path / "scores.csv"
    paths = find_images(str(photos))
    write_scores(scorer, paths, out, batch_size=5)
    part = out.with_name(f"scores.csv.{scoring_key(scorer, paths, 5)}.part")
    part.write_bytes(out.read_bytes()[:2000])

    def goes_on(paths=paths, batch_size=5, scorer=scorer):
        before = part.read_bytes()
        write_scores(scorer, paths, out, batch_size)
        said = capsys.readouterr().out
        if said.startswith(f"{part}: left alone; of another detector or other images, "):
            assert part.read_bytes() == before
            return False
        assert "images are scored already" in said and not part.exists()
        return True

    assert not goes_on(batch_size=4)
    assert not goes_on(paths[:-1])
    image, state = (photos / "01.png").read_bytes(), os.stat(photos / "01.png")
    (photos / "01.png").write_bytes((photos / "02.png").read_bytes())
    assert not goes_on()
    (photos / "01.png").write_bytes(image)
    os.utime(photos / "01.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    about = json.loads((detector / "scorer.json").read_text())
    about["classes"][0] = "seven"
    del about["sha256"]
    (detector / "scorer.json").write_text(json.dumps(about | {"sha256": hash_json(about)}))
    assert not goes_on(scorer=Scorer(detector))
    assert goes_on()


def test_two_processes_do_not_write_one_part(detector, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(gradmix.ssl.runs.lock, "PATIENCE", 0.3)
    scorer, paths, out = Scorer(detector), find_images(str(photos)), tmp_path / "scores.csv"
    part = out.with_name(f"scores.csv.{scoring_key(scorer, paths, 256)}.part")
    with open(part, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"\.part: another process is writing there"):
            write_scores(scorer, paths, out)
        assert part.exists()

        def complete():
            other.write(b"all of its rows")
            os.replace(part, out)
            other.close()

        threading.Timer(0.1, complete).start()
        with pytest.raises(ValueError, match=r"\.part: another process has just completed it"):
            write_scores(scorer, paths, out)
    assert out.read_bytes() == b"all of its rows"
    write_scores(scorer, paths, out)
    assert out.read_bytes().count(b".png") >= 40


def rows_of(path):
    with open(path, newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_another_share_to_accept_needs_no_fitting(command, detector, photos, tmp_path):
    """By the held-out scores in the folder; p-values, predictions and margins say the same."""
    arguments = (f"detector={detector}", f"images={photos}")
    held_out = np.sort(load_file(detector / "detector.safetensors")["held_out_scores"])
    for accept in (0.95, 0.9, 0.5):
        result = command("score", *arguments, *([] if accept == 0.95 else [f"accept={accept}"]), f"out={accept}.csv")
        assert result.code == 2 and "drift: as a whole these images score" in result.out  # one can't be read
        rows = [row for row in rows_of(tmp_path / f"{accept}.csv") if not row["error"]]
        assert len(rows) == 39
        for row in rows:
            score, p_value = np.float32(row["score"]), float(row["p_value"])
            assert p_value == pytest.approx((1 + sum(held_out >= score)) / (len(held_out) + 1), abs=1e-12)
            assert (row["prediction"] == "unknown") == (p_value <= 1 - accept + 1e-9) == (float(row["margin"]) > 0)
    unknown = [sum(r["prediction"] == "unknown" for r in rows_of(tmp_path / f"{a}.csv")) for a in (0.95, 0.9, 0.5)]
    assert unknown[0] <= unknown[1] < unknown[2]
    result = command("score", *arguments, "per_class=true", "accept=0.8", "out=by_class.csv")
    assert " of 6\n" in result.out
    for bad, message in (("accept=0.999", "it takes 999"), ("accept=1.5", "accept"), ("accept=1", "no number is")):
        result = command("score", *arguments, bad)
        assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["scores.csv", "scores.jsonl"])
def test_discoveries_are_a_column(name, command, detector, tmp_path):
    """Of digits among pictures of nothing: Benjamini and Hochberg's, as scipy has it."""
    (tmp_path / "all").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate([*noise, *(load_digits().images[:20] * 15).astype(np.uint8)]):
        Image.fromarray(image).save(tmp_path / "all" / f"{i:02d}.png")
    plain, asked = (f"detector={detector}", "images=all", f"out={name}"), "false_discovery=0.2"
    assert command("score", *plain).code == 0
    before = (tmp_path / name).read_bytes()
    result = command("score", *plain, asked)
    assert result.code == 0 and "not like the held-out known ones" in result.out, result.err
    if name.endswith("l"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        found = [row.pop("discovery") for row in rows]
        assert "".join(json.dumps(row) + "\n" for row in rows).encode() == before
    else:
        rows = rows_of(tmp_path / name)
        found = [row["discovery"] == "true" for row in rows]
        lines = (tmp_path / name).read_bytes().splitlines()
        assert [line.rpartition(b",")[0] for line in lines] == before.splitlines()
    expected = false_discovery_control([float(row["p_value"]) for row in rows]) <= 0.2 + 1e-12
    assert "\ndiscoveries: none\n" in command("score", *plain, "false_discovery=1e-6").out
    assert found == expected.tolist() and f"discoveries: {sum(found)} images" in result.out and sum(found) > 5


def test_a_folder_from_before_p_values_still_scores(command, detector, photos, tmp_path):
    fitted = detectors.load(detector)
    threshold, fitted.calibration_ = fitted.threshold, None
    fitted.save(detector)
    about = json.loads((detector / "scorer.json").read_text())
    del about["sha256"]
    about["files"]["detector.json"] = hash_file(detector / "detector.json")
    (detector / "scorer.json").write_text(json.dumps(about | {"sha256": hash_json(about)}))
    arguments = (f"detector={detector}", f"images={photos}")
    assert command("score", *arguments).code == 2  # for the one that can't be read
    rows = [row for row in rows_of(tmp_path / "scores.csv") if not row["error"]]
    assert {row["p_value"] for row in rows} == {""}
    assert [row["prediction"] == "unknown" for row in rows] == [float(row["score"]) > threshold for row in rows]
    result = command("score", *arguments, "accept=0.9")
    assert result.code == 2 and "keeps no scores of held-out images" in result.err
