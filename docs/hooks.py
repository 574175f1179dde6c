"""What the pages can't hold themselves: tables of settings and of numbers, and the sources of the API pages."""

import re
import shutil
from pathlib import Path

from gradmix.eval import catalogue
from gradmix.eval.commands.help import settings
from gradmix.eval.config import EvalConfig, ScoreConfig
from gradmix.ssl.config import Config

SCHEMAS = {"pretrain": Config, "eval": EvalConfig, "score": ScoreConfig}


def on_startup(**_) -> None:
    """Copy the package to build/api: mkdocstrings reads sources, and finds no package in ssl without __init__.py."""
    root = Path(__file__).parent.parent
    shutil.rmtree(root / "build/api", ignore_errors=True)
    shutil.copytree(root / "gradmix", root / "build/api/gradmix", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "build/api/gradmix/ssl/__init__.py").touch()
    for path in (root / "build/api").rglob("*.py"):  # docstrings have Sphinx's roles, the pages are Markdown
        text = re.sub(r":(?:func|class|meth|mod):`~?([^`]+)`", r"`\1`", path.read_text())
        path.write_text(re.sub(r"::$", ":", text, flags=re.M))


def on_page_markdown(markdown: str, **_) -> str:
    """Fill `{settings COMMAND}` with the table of its keys, and `{metrics TABLE}` with one of the catalogue."""
    markdown = re.sub(r"^\{settings (\w+)\}$", lambda match: table(SCHEMAS[match[1]]), markdown, flags=re.M)
    return re.sub(r"^\{metrics (\w+)\}$", lambda match: metrics(getattr(catalogue, match[1])), markdown, flags=re.M)


def table(schema: type) -> str:
    rows = [
        f"| `{one.name}` | `{one.default}` | {as_text(one.key.values)} | {as_text(one.key.meaning)} |"
        for one in settings(schema)
    ]
    return "\n".join(["| key | default | values | meaning |", "| --- | --- | --- | --- |", *rows])


def as_text(words: str) -> str:
    """Words for a cell of a table."""
    return words.replace("|", "or").replace("<", "&lt;")


def metrics(table: tuple[catalogue.Metric, ...]) -> str:
    rows = [f"| `{one.key}` | {one.title} {one.arrow} | {one.sentence} |" for one in table]
    return "\n".join(["| key | number | meaning |", "| --- | --- | --- |", *rows])
