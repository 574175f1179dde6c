"""The environment is one that pyproject.toml allows, and pyproject.toml allows no release that is known to be bad."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {(needed := Requirement(line)).name: needed for line in PROJECT["dependencies"]}
MALICIOUS = ("2.6.2", "2.6.3")  # of lightning, whose releases are numbered like pytorch-lightning's


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_what_is_installed_is_within_the_bounds(name):
    installed = importlib.metadata.version(name)
    assert REQUIREMENTS[name].specifier.contains(installed, prereleases=True), installed


def test_known_bad_releases_are_excluded():
    assert not any(map(REQUIREMENTS["pytorch-lightning"].specifier.contains, MALICIOUS))
    for version in ("2.5.0", "2.5.1"):  # CVE-2025-32434: weights_only loading could execute code
        assert not REQUIREMENTS["torch"].specifier.contains(version)


def test_no_malicious_lightning_came_with_another_package():
    installed = {package.metadata["Name"].lower(): package.version for package in importlib.metadata.distributions()}
    for name in ("lightning", "pytorch-lightning"):
        assert installed.get(name) not in MALICIOUS


def test_the_oldest_versions_are_pyprojects():
    """Every requirement, at a version that is allowed and below which none is; the higher one of two lists."""
    oldest = [sys.executable, ".ci/oldest.py"]
    printed = subprocess.run([*oldest, "dev", "export"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lowest = dict(line.split("==") for line in printed.splitlines())
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["dev"], *extras["docs"], *extras["export"]]
    needed = [needed for line in lines if (needed := Requirement(line)).name != "gradmix"]
    assert lowest.keys() == {requirement.name for requirement in needed}
    for requirement in needed:
        version = lowest[requirement.name]
        assert requirement.specifier.contains(version), requirement
        assert f"{requirement.name}>={version}" in (f"{r.name}{s}" for r in needed for s in r.specifier)
