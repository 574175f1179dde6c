"""Every command of README.md and docs/ runs, in the order of its page, with nothing changed but sizes and data sets."""

import csv
import io
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

import gradmix
from gradmix.eval.commands import compare
from gradmix.ssl.networks.backbones import ResNet

pytestmark = pytest.mark.usefixtures("benchmarks", "quick_evaluation")
ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]
SMALL = ("epochs=1", "batch_size=16", "encoder.width=4", "knn_k=3", "pictures_every=1", "trainer.accelerator=cpu")
DIGITS = {"cat": 3, "dog": 6, "rabbit": 8, "fox": 1}  # what plays the animals
ELSEWHERE = {  # sections that other tests run
    "README.md": ("Three lines in your own loop",),  # tests/gradmix/test_loop_pages.py
    "docs/recipes/own-loop.md": ("A complete SimCLR in plain PyTorch",),
    "docs/recipes/evaluate.md": ("Any backbone",),  # tests/eval/test_evaluate_page.py
}
SEVERAL = ("trainer.devices=", "torchrun")  # tested below, in processes of their own


def steps(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's code: single lines of shell, whole blocks of Python."""
    text = (ROOT / page).read_text()
    for section in ELSEWHERE.get(page, ()):
        text, found_it = re.subn(rf"^## {section}\n.*?(?=^## |\Z)", "", text, flags=re.M | re.S)
        assert found_it, f"{page} has no section {section!r}"
    found = []
    for language, code in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S):
        if language == "python":
            found.append((language, code))
        elif language in ("", "bash"):
            found += [("shell", line.split("  #")[0].strip()) for line in code.splitlines()]
    return found


def small(words: list[str]) -> list[str]:
    """A gradmix-pretrain command's arguments with tiny settings, and images that are here for those of a download."""
    words = ["data.split=0" if word == "data.split=all" else word for word in words if not word.startswith(SEVERAL)]
    if "data=cifar10" in words:
        words = [word for word in words if word not in ("data=cifar10", "data.split=0")]
        words += ["data=imagefolder", "data.root=photos", "data.known=[cat,dog]"]
    words = [word for word in words if word != "data.root=tiny-imagenet-200"]
    words = ["data.pseudo_unknown=2" if word.startswith("data.pseudo_unknown=") else word for word in words]
    other = ["data=digits"] if any(word.startswith("experiment=") for word in words) else []
    timm = any(word.startswith("encoder=timm/") for word in words)  # which have no width, and halve images five times
    folder = [f"data.image_size={32 if timm else 16}"] if "data=imagefolder" in words else []
    words = [word for word in words if not (folder and word.startswith("data.image_size="))]
    usual = [word for word in SMALL if not (timm and word.startswith("encoder.width="))]
    if not folder:  # digits are many: fewer steps, of smaller images
        usual = ["batch_size=128" if word.startswith("batch_size=") else word for word in usual]
        usual.append("data.image_size=8")
    return sorted([*words, *other, *folder, *usual], key=lambda word: word.startswith("--"))  # flags come last


def save_digits(folder: Path, digit: int, rows: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = load_digits()
    images = data.images[data.target == digit]
    for row in rows:
        Image.fromarray((images[row] * (255 / 16)).astype(np.uint8)).save(folder / f"{row}.png")


@pytest.fixture
def workplace(tmp_path):
    """What the pages speak of: photos/, other-photos/, ..., unsorted/, new/ and weights.pth."""
    for name in ("cat", "dog", "rabbit"):
        save_digits(tmp_path / "photos" / name, DIGITS[name], range(24))
    for number, name in enumerate(("other-photos", "pets", "farm", "textures")):
        save_digits(tmp_path / name, (0, 2, 7, 9)[number], range(10))
    save_digits(tmp_path / "foxes", DIGITS["fox"], range(12))
    save_digits(tmp_path / "unsorted", 5, range(40))
    save_digits(tmp_path / "new", DIGITS["cat"], range(6))
    with torch.random.fork_rng():
        torch.save(ResNet("resnet18", width=4).state_dict(), tmp_path / "weights.pth")
    return tmp_path


@cache
def help_of(script: str) -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as told:
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    return told.getvalue()


def run_step(kind: str, text: str, command, monkeypatch) -> str:
    """Run one step in this process; what it printed, or "" for what other tests run."""
    if kind == "python":
        exec(compile(text, "documentation", "exec"), {"__name__": "documentation"})
        return ""
    words = shlex.split(text)
    name = Path(words[0]).name
    if name == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target: {text}"
    elif name == "python" and words[1].startswith("benchmarks/"):  # hours: whether it has these arguments
        told = help_of(words[1])
        for word in words[2:]:
            assert not word.startswith("--") or word in told, f"{text}: no argument {word}"
    elif name == "cp":
        subprocess.run(words, check=True)
    elif name == "gradmix-compare":
        monkeypatch.setattr(sys, "argv", words)
        compare.main()
    elif name.startswith("gradmix-"):
        arguments = small(words[1:]) if name == "gradmix-pretrain" else words[1:]
        result = command(name.removeprefix("gradmix-"), *arguments)
        assert result.code == 0, f"{text}\n{result.err}"
        return result.out
    else:
        assert name in ("eval", "torchrun"), f"no test knows this line: {text}"
    return ""


def alone(page: str) -> list[tuple[str, str]]:
    """The steps that one process can do."""
    return [step for step in steps(page) if not any(word in step[1] for word in SEVERAL)]


FOLLOWED = ("README.md", "docs/recipes/evaluate.md")  # below, to the end that their text promises
OTHERS = [page for page in PAGES if page not in FOLLOWED and not set(alone(page)) <= set(alone("README.md"))]


@pytest.mark.parametrize("page", OTHERS)
def test_commands_of_the_pages(page, workplace, command, monkeypatch):
    for kind, text in alone(page):
        run_step(kind, text, command, monkeypatch)


def test_who_follows_the_page_of_evaluation_ends_with_comparisons(workplace, command, monkeypatch):
    printed = "".join(run_step(kind, text, command, monkeypatch) for kind, text in steps("docs/recipes/evaluate.md"))
    assert "2 known classes: cat, dog; 1 unknown" in printed
    runs = workplace / "runs"
    numbers = {name: json.loads((runs / name / "metrics.json").read_text()) for name in ("mine-k10", "mine-far")}
    assert 0 <= numbers["mine-k10"]["osr/vim/auroc"] <= 1 and "osr/class_knn/auroc" not in numbers["mine-k10"]
    assert 0 <= numbers["mine-far"]["osr/deep_knn/auroc"] <= 1
    assert json.loads((runs / "mine/metrics_corruptions.json").read_text())["corruptions/mce/knn"] > 0
    compared = (workplace / "compare.html").read_text()
    assert "runs/mine" in compared and "runs/plain" in compared


def test_who_follows_the_readme_ends_with_a_report_and_scores(workplace, command, monkeypatch):
    shutil.rmtree(workplace / "photos")
    for name, digit in DIGITS.items():
        if name != "fox":
            save_digits(workplace / "photos/train" / name, digit, range(30))
        save_digits(workplace / "photos/test" / name, digit, range(30, 45))
    printed = [run_step(kind, text, command, monkeypatch) for kind, text in steps("README.md")]
    assert any("3 known classes: cat, dog, rabbit; 1 unknown" in text for text in printed)
    for run in ("demo", "mine"):
        assert (workplace / "runs" / run / "report.html").stat().st_size > 10_000, run
    numbers = json.loads((workplace / "runs/mine/metrics.json").read_text())
    assert 0 <= numbers["osr/deep_knn/auroc"] <= 1
    rows = list(csv.DictReader(open(workplace / "scores.csv")))
    assert [row["path"] for row in rows] == [f"new/{number}.png" for number in range(6)]
    assert all(row["prediction"] in ("cat", "dog", "rabbit", "unknown") and float(row["score"]) >= 0 for row in rows)


def several_steps() -> dict[str, list[str]]:
    lines = [text for _, text in steps("docs/several-gpus.md")]
    return {shlex.split(line)[0]: [w for w in shlex.split(line) if "=" in w and w[0] != "-"] for line in lines}


def start(words: list[str], folder: Path) -> subprocess.Popen:
    scripts = Path(sys.executable).parent  # where the commands are
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_processes_on_one_machine(workplace):
    words = small(several_steps()["gradmix-pretrain"])
    process = start(["gradmix-pretrain", *words, "trainer.devices=2"], workplace)
    assert process.wait(timeout=300) == 0, process.stdout.read()
    assert (workplace / "runs/eight/report.html").is_file()


def test_two_hosts(workplace):
    """Two torchrun agents that meet at an address: two hosts, as far as one machine can play them."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        meeting = f"--rdzv-endpoint=localhost:{one.getsockname()[1]}"
    words = small(several_steps()["torchrun"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--rdzv-backend=c10d", meeting, "--no-python", "gradmix-pretrain"]
    hosts = [start([*launcher, *words, "trainer.devices=1", "trainer.num_nodes=2"], workplace) for _ in range(2)]
    for host in hosts:
        assert host.wait(timeout=300) == 0, host.stdout.read()
    assert (workplace / "runs/two-hosts/report.html").is_file()


def test_the_site_builds_without_a_warning_and_has_the_docstrings(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert (built.returncode, built.stderr) == (0, "")
    names = (".", "api/gradmix", "api/ssl", "settings")
    pages = {name: (tmp_path / f"site/{name}/index.html").read_text() for name in names}
    assert "watch" in pages["api/gradmix"] and "NTXentLoss" in pages["api/ssl"]
    assert "Three lines in your own loop" in pages["."] and 'href="recipes/own-loop/"' in pages["."]
    for picture in re.findall(r'<img[^>]* src="([^"]+)"', pages["."]):
        assert (tmp_path / "site" / picture).is_file(), picture
    assert "data.unknown_root" in pages["settings"]
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', pages["settings"])  # opens offline


def test_the_front_page_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link.partition("#")[0]).is_file(), link


def test_the_citation_names_the_paper_and_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == gradmix.__version__
    assert "2505.12803" in citation["preferred-citation"]["url"]
    assert [author["family-names"] for author in citation["preferred-citation"]["authors"]] == ["Xu", "Kao", "Keuper"]
