"""The pages' templates, in `pages/`. Every text that is put into one is escaped there; `Markup` is HTML already."""

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent / "pages"


class Section(NamedTuple):
    """A part of a page, under a heading; ``name`` is its anchor."""

    name: str
    title: str
    body: Markup


class Chart(NamedTuple):
    """A drawing, and a sentence below it."""

    drawing: Markup
    caption: str = ""


def percent(value: float) -> str:
    """A share as text, in per cent."""
    return f"{100 * value:.2f}"


TEMPLATES = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.filters["percent"] = percent


def render(name: str, **values: Any) -> Markup:
    """What a template makes of some values; text in them may hold anything."""
    return Markup(TEMPLATES.get_template(name).render(values))


def section(name: str, title: str, **values: Any) -> Section:
    """A part of a page, of the template of its name."""
    return Section(name, title, render(f"{name}.html", **values))


def page(name: str, title: str, **values: Any) -> str:
    """A whole page that loads nothing: its style and its script are inside."""
    style, script = (Markup((HERE / file).read_text(encoding="utf-8")) for file in ("page.css", "map.js"))
    return render(name, title=title, style=style, script=script, **values)
