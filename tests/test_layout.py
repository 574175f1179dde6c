"""The house stands: `ssl/` does not shadow the standard library, the wheel holds every room, imports point one way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("gradmix", "ssl", "eval", "configs")


def python(*arguments, cwd=ROOT, **environment):
    import os

    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def sources(room):
    return [p for p in (ROOT / room).rglob("*.py") if not any(part.is_symlink() for part in (p, *p.parents))]


def test_ssl_in_the_repository_root_is_the_standard_librarys():
    where = python("-c", "import ssl; print(ssl.__file__, ssl.OPENSSL_VERSION)")
    assert str(ROOT / "ssl") not in where
    assert python("-m", "pip", "--version").startswith("pip ")


def test_rooms_without_init_files_stay_without():
    assert not (ROOT / "ssl" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_rooms_are_imported_through_gradmix_only():
    for room in (*ROOMS, "tests", "benchmarks"):
        for path in sources(room):
            wrong = re.search(r"^\s*(from|import) (eval|configs|ssl\.\w)", path.read_text(), re.MULTILINE)
            assert wrong is None, f"{path}: {wrong.group(0)}"


def test_imports_point_one_way():
    forbidden = {
        "gradmix": r"^(from|import) (gradmix\.(ssl|eval|configs)|pytorch_lightning|hydra)",
        "ssl": r"^\s*(from|import) gradmix\.eval",
    }
    for room, pattern in forbidden.items():
        for path in sources(room):
            wrong = re.search(pattern, path.read_text(), re.MULTILINE)
            assert wrong is None, f"{path}: {wrong.group(0)}"


def test_imports_stand_at_the_top_of_a_file():
    """But for a few, each with its reason."""
    inside = set()
    for path in (path for room in ROOMS for path in sources(room)):
        lines = path.read_text().splitlines()
        functions = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef)]
        imports = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
        inside |= {f"{path}: {lines[node.lineno - 1]}" for node in imports}
    assert 0 < len(inside) <= 5 and all("  # only here: " in line for line in inside), inside


def test_folders_import_only_from_those_above_them():
    """In the order that CONTRIBUTING lists them."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for room in ("ssl", "eval"):
        listed = re.search(rf"^{room}/ .*?the rest", page, re.M | re.S)[0]
        order = re.findall(r"(\w+)/ ", listed.removeprefix(f"{room}/"))
        folders = {path.name for path in (ROOT / room).iterdir() if path.is_dir() and path.name != "__pycache__"}
        assert set(order) == folders
        for path in sources(room):
            here = path.relative_to(ROOT / room).parts[0]
            for used in re.findall(rf"^\s*(?:from|import) gradmix\.{room}\.(\w+)", path.read_text(), re.M):
                if {here, used} <= folders:
                    assert order.index(used) <= order.index(here), f"{path}: {here} imports from {used}"


def test_the_packages_names_are_there_before_torch_is():
    """For the interpreter's Tab and help(), for type checkers, and for `from gradmix import *`."""
    python("-c", "import sys, gradmix; assert set(gradmix.__all__) <= set(dir(gradmix)) and 'torch' not in sys.modules")
    python("-c", "from gradmix import *; import gradmix; [globals()[name] for name in gradmix.__all__]")
    source = (ROOT / "gradmix" / "__init__.py").read_text()
    lines = re.findall(r"^    from gradmix\.(?!ssl)[\w.]+ import (.*)$", source, re.M)
    named = [name.strip() for line in lines for name in line.split(",")]
    import gradmix

    assert {*named, "load"} == set(gradmix.__all__)
    with pytest.raises(AttributeError, match="module 'gradmix' has no attribute 'GradMox'"):
        gradmix.GradMox  # noqa: B018


def test_a_wheel_runs_from_another_folder(tmp_path):
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("gradmix-*.whl")
    site = tmp_path / "site"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    modules = [
        "gradmix." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ("ssl", "eval")
        for path in sources(room)
        if path.stem != "__init__"
    ]
    code = f"""
import importlib, gradmix, gradmix.configs
assert gradmix.__file__.startswith({str(site)!r}), gradmix.__file__
for name in {modules!r}:
    importlib.import_module(name)
from gradmix.eval.commands.pretrain import main
main()
"""
    (tmp_path / "job.py").write_text(code)
    job = ("epochs=1", "batch_size=128", "encoder.width=4", "data.image_size=8", "run_dir=run")
    out = python(str(tmp_path / "job.py"), *job, cwd=tmp_path, PYTHONPATH=str(site))
    assert "deep_knn on pixels" in out
    assert (tmp_path / "run" / "metrics.json").is_file()
