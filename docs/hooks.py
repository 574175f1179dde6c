"""What the pages don't hold themselves: the README, tables of settings and of numbers, the sources of the API pages."""

import re
import shutil
from pathlib import Path

from gradmix.eval import catalogue
from gradmix.eval.commands.help import settings
from gradmix.eval.config import DetectorConfig, EmbedConfig, EvalConfig, ScoreConfig
from gradmix.ssl.config import Config

ROOT = Path(__file__).parent.parent
SCHEMAS = {
    "pretrain": Config,
    "eval": EvalConfig,
    "embed": EmbedConfig,
    "score": ScoreConfig,
    "detector": DetectorConfig,
}


def on_startup(**_) -> None:
    """Copy the package to build/api: mkdocstrings reads sources, and finds no package in ssl without __init__.py."""
    shutil.rmtree(ROOT / "build/api", ignore_errors=True)
    shutil.copytree(ROOT / "gradmix", ROOT / "build/api/gradmix", ignore=shutil.ignore_patterns("__pycache__"))
    (ROOT / "build/api/gradmix/ssl/__init__.py").touch()
    for path in (ROOT / "build/api").rglob("*.py"):  # docstrings have Sphinx's roles, the pages are Markdown
        text = re.sub(r":(?:func|class|meth|mod):`~?([^`]+)`", r"`\1`", path.read_text())
        path.write_text(re.sub(r"::$", ":", text, flags=re.M))


def on_page_markdown(markdown: str, **_) -> str:
    """Put the README in the place of `{front page}`."""
    return markdown.replace("{front page}", front_page())


def filled(markdown: str) -> str:
    """A page with its tables written anew: what stands between `<!-- settings COMMAND ... -->`, or
    `<!-- metrics TABLE ... -->`, and `<!-- end of the table -->`.
    """

    def write(found: re.Match[str]) -> str:
        kind, name = found[2], found[3]
        rows = table(SCHEMAS[name]) if kind == "settings" else metrics(getattr(catalogue, name))
        return f"{found[1]}\n\n{rows}\n\n{found[4]}"

    return re.sub(r"(<!-- (settings|metrics) (\w+)[^>]*-->).*?(<!-- end of the table -->)", write, markdown, flags=re.S)


def front_page() -> str:
    """The README, its links as they are from docs/."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](contributing.md)")
    return re.sub(r"\[(CITATION\.cff|SECURITY\.md)\]\(\1\)", r"`\1`", text)


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


if __name__ == "__main__":  # make docs
    for page in (ROOT / "docs").rglob("*.md"):
        page.write_text(filled(page.read_text()))
