import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption("--stress", action="store_true", help="also collect tests/stress (long)")
    parser.addoption("--stress-share", type=float, default=1.0, help="share of the stress cases to run, to rehearse")


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name == "stress" and not config.getoption("--stress") else None


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run one of the three commands in this process, in an empty folder: command("pretrain", "epochs=1", ...)."""
    from gradmix.eval import commands

    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", [f"gradmix-{name}", *map(str, arguments)])
        try:
            {"pretrain": commands.pretrain, "eval": commands.evaluate, "score": commands.score}[name]()
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run
