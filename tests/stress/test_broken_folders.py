"""Broken folders of strangers before every command that reads them: one line or the work done, soon, and nothing else.

``--stress-share`` sets how many of the cases run. They run in a process that is watched: where it hangs or dies, the
case has failed and the next one gets another process.
"""

import csv
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from gradmix.eval.commands import compare, evaluate, pretrain, score
from gradmix.ssl.machine import usable_cpus
from tests.stress.broken import VALUES, Canary, broken_bytes, broken_json, copied, digest, places, put, seal

CASES, SECONDS, SECRET = 3000, 10, "the-secret-of-the-environment"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
QUICK = (
    "epochs=1",
    "encoder.width=4",
    "data.image_size=8",
    "knn_every=0",
    "pictures_every=1",
    "trainer.accelerator=cpu",
)
COMMANDS = {"pretrain": pretrain, "eval": evaluate, "score": score, "compare": compare}


def work(pipe):
    """In the child: one command after the other, each in its folder; answers exit code, output and errors."""
    import torch

    torch.set_num_threads(1)
    os.environ["GRADMIX_SECRET"] = SECRET
    while True:
        folder, name, arguments = pipe.recv()
        os.chdir(folder)
        os.environ.pop("HYDRA_FULL_ERROR", None)
        sys.argv, sys.stdout, sys.stderr = [f"gradmix-{name}", *arguments], io.StringIO(), io.StringIO()
        code = 0
        try:
            COMMANDS[name].main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
        pipe.send((code, sys.stdout.getvalue(), sys.stderr.getvalue()))


class Worker(threading.local):
    """A process for each thread that runs commands; another one takes over when it dies or hangs."""

    def __init__(self):
        self.process = None

    def __call__(self, folder, name, *arguments, seconds=SECONDS):
        """Run a command for that many seconds, more on a machine that has other work.

        Exit code (None: it hung; negative: it was killed), what it said, and the seconds that it took."""
        if self.process is None:
            self.pipe, theirs = CONTEXT.Pipe()
            self.process = CONTEXT.Process(target=work, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        start = time.monotonic()
        seconds *= max(1, 2 * os.getloadavg()[0] / usable_cpus())
        self.pipe.send((folder, name, arguments))
        try:
            answer = self.pipe.recv() if self.pipe.poll(seconds) else (None, "", "")
        except EOFError:
            self.process.join()
            answer = (self.process.exitcode, "", "")
        if answer[0] is None or answer[0] < 0:
            self.process.kill()
            self.process.join()
            self.process = None
        return (*answer, time.monotonic() - start)


run = Worker()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    code, _, err, _ = run(folder, "pretrain", *QUICK, "run_dir=run", seconds=300)
    assert code == 0, err
    (folder / "photos").mkdir()
    for row, image in enumerate(load_digits().images[:4]):
        Image.fromarray((image * 15).astype(np.uint8)).save(folder / "photos" / f"{row}.png")
    return folder


def changes_of(run_dir, generator):
    """(what, which command reads it, change)."""
    detector = run_dir / "detector"
    for name in ("scorer.json", "detector.json"):
        yield from ((*c, "score") for c in broken_json(f"detector/{name}", json.loads((detector / name).read_text())))
    for name in ("backbone", "detector", "thumbnails"):
        yield from ((*c, "score") for c in broken_bytes(f"detector/{name}.safetensors", generator, 150))
    for kind in ("class_knn", "mahalanobis"):
        inner = f"detectors/{kind}/"
        manifest = json.loads((run_dir / inner / "detector.json").read_text())
        yield from ((*c, kind) for c in broken_json(f"{inner}detector.json", manifest))
        yield from ((*c, kind) for c in broken_bytes(f"{inner}detector.safetensors", generator, 80))
    yield from (
        (*c, "compare") for c in broken_json("metrics.json", json.loads((run_dir / "metrics.json").read_text()))
    )
    yield from ((*c, "eval") for c in broken_json("training.json", json.loads((run_dir / "training.json").read_text())))
    for name in ("features/test.safetensors", "features/scores.safetensors"):
        yield from ((*c, "compare") for c in broken_bytes(name, generator, 60))
    yield from ((*c, "eval") for c in broken_bytes("head.safetensors", generator, 30))
    yield from ((*c, "export") for c in broken_bytes("backbone.safetensors", generator, 60))
    events = next((run_dir / "tensorboard").glob("events*")).relative_to(run_dir)
    yield from ((*c, "compare") for c in broken_bytes(str(events), generator, 60))
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    for path in places(tree):
        for label, value in {"missing": put, **VALUES}.items():
            if label not in ("deep", "surrogate", "nan", "infinite"):
                text = yaml.safe_dump(put(tree, path, value))
                write = lambda folder, text=text: (folder / "config.yaml").write_text(text)  # noqa: E731
                yield f"config.yaml: {'.'.join(map(str, path))}: {label}", write, "export"
    yield from ((*c, "export") for c in broken_bytes("config.yaml", generator, 60))


ARGUMENTS = {
    "score": ("score", "detector=run/detector", "images=photos", "out=scores.csv"),
    "class_knn": ("score", "detector=run/detectors/class_knn", "images=photos", "out=scores.csv"),
    "mahalanobis": ("score", "detector=run/detectors/mahalanobis", "images=photos", "out=scores.csv"),
    "compare": ("compare", "run"),
    "eval": ("eval", "run=run", "detectors=[deep_knn]"),
    "export": ("eval", "run=run", "export=[safetensors]", "out=exported"),
}
# To measure a run again takes its time; reading a folder does not.
LIMITS = {reader: 60 if reader == "eval" else SECONDS for reader in ARGUMENTS}


def wrong_scores(path):
    """Why a file of scores is none, or None."""
    for row in csv.DictReader(path.open()):
        if row["error"]:
            continue
        if not math.isfinite(float(row["score"])) or (row["margin"] and not math.isfinite(float(row["margin"]))):
            return f"score {row['score']}, margin {row['margin']}"
        if row["p_value"] and not 0 < float(row["p_value"]) <= 1:
            return f"p_value {row['p_value']}"
    return None


def judge(folder, before, code, out, err, measured):
    """What went wrong, or None."""
    lines = err.strip().splitlines()
    if code is None:
        return "hangs"
    if code not in (0, 2) or "Traceback" in err or (code == 2 and len(lines) != 1):
        return f"exit {code}: {lines[-1] if lines else ''} ({len(lines)} lines)"
    if SECRET in out + err:
        return "tells a secret of the environment"
    if "\x1b" in out + err:
        return "an escape code reaches the terminal"
    allowed = ("scores.csv", "compare.html", "run/", "exported")
    if extra := [
        name for name, was in digest(folder).items() if not name.startswith(allowed) and before.get(name) != was
    ]:
        return f"writes {extra[0]}"
    if code == 0 and (folder / "scores.csv").exists() and (why := wrong_scores(folder / "scores.csv")):
        return why
    if measured is not None and code == 0 and (found := json.loads((folder / "run/metrics.json").read_text())):
        if found["knn/top1"] != measured:
            return f"knn/top1 is {found['knn/top1']}, measured {measured}"
    return None


@dataclass
class Case:
    """A change of the good folder, and what a command made of it."""

    what: str
    reader: str
    code: int | None
    seconds: float
    trouble: str | None


def tried(good: Path, folder: Path, change: tuple, measured: float) -> Case:
    what, break_it, reader = change
    copied(good, folder)
    break_it(folder / "run")
    if what.startswith("detector"):  # a stranger's hashes are right
        seal((folder / "run" / what.partition(":")[0]).parent)
    before = digest(folder)
    code, out, err, seconds = run(folder, *ARGUMENTS[reader], seconds=LIMITS[reader])
    trouble = judge(folder, before, code, out, err, measured if reader == "eval" else None)
    shutil.rmtree(folder)
    return Case(what, reader, code, seconds, trouble)


def test_broken_folders(good, cases, tell, tmp_path):
    """Trouble is told when it is found: all of it takes a while."""
    generator = np.random.default_rng(0)
    every = list(changes_of(good / "run", generator))
    chosen = [every[i] for i in generator.permutation(len(every))[: cases(CASES)]]
    measured = json.loads((good / "run/metrics.json").read_text())["knn/top1"]
    outside, folders = digest(good), [tmp_path / "cases" / str(number) for number in range(len(chosen))]
    with ThreadPoolExecutor(usable_cpus()) as pool:  # a watched process for each
        done = []
        for case in pool.map(tried, [good] * len(chosen), folders, chosen, [measured] * len(chosen)):
            done.append(case)
            if case.trouble or len(done) % 250 == 0:
                tell(f"case {len(done)}, {case.what}: {case.trouble or 'fine'}")
    assert digest(good) == outside and os.listdir(tmp_path) == ["cases"] and not os.listdir(tmp_path / "cases")
    counts = Counter(f"{case.reader} exit {case.code}" for case in done)
    slowest = max((case.seconds, case.what) for case in done if case.reader != "eval")
    troubles = [f"{case.what}: {case.trouble}" for case in done if case.trouble]
    table = ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
    tell(f"{len(done)} broken folders of {len(every)}: {table}; slowest {slowest}; {len(troubles)} troubles")
    assert not troubles, "\n".join(troubles)


def test_the_judge_sees_trouble(good, tmp_path):
    """The control: a canary that fires, a secret that is told, a number that is none."""
    folder = copied(good, tmp_path / "a")
    before = digest(folder)
    assert judge(folder, before, 0, "", "", None) is None
    assert judge(folder, before, 0, SECRET, "", None) and judge(folder, before, None, "", "", None)
    assert judge(folder, before, 1, "", "Traceback", None) and judge(folder, before, 2, "", "two\nlines", None)
    pickled, here = pickle.dumps(Canary()), os.getcwd()
    os.chdir(folder)
    pickle.loads(pickled)  # the canary fires
    os.chdir(here)
    assert judge(folder, before, 2, "", "one line", None) == "writes executed"
    (folder / "executed").rmdir()
    (folder / "scores.csv").write_text("path,score,prediction,margin,p_value,nearest,error\na,nan,8,,,,\n")
    assert "nan" in judge(folder, before, 0, "", "", None)


def test_the_folders_are_good_before_they_are_broken(good, tmp_path):
    for reader in ARGUMENTS:
        folder = copied(good, Path(tmp_path / reader))
        code, _, err, _ = run(folder, *ARGUMENTS[reader], seconds=120)
        assert code == 0, (reader, err)
