"""The HTML around everything: one page, with its style and its script inside."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

HERE = Path(__file__).parent


def page(title: str, body: str) -> str:
    """A whole page that loads nothing.

    Args:
        body: HTML; text of users in it is escaped already.
    """
    style, script = (HERE / "page.css").read_text(), (HERE / "map.js").read_text()
    template = Template((HERE / "page.html").read_text())
    return template.substitute(title=escape(title), body=body, style=style, script=script)


def section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def missing(text: str) -> str:
    """What this page does not show, and why."""
    return f'<p class="missing">{escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table in a box that scrolls by itself. Cells are HTML, with their own ``<td>`` or ``<th>``."""
    top = "".join(f"<th>{cell}</th>" if not cell.startswith("<th") else cell for cell in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def definitions(entries: dict[str, str]) -> str:
    """Terms and what they are, both text."""
    pairs = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in entries.items() if text)
    return f"<dl>{pairs}</dl>"


def percent(value: float) -> str:
    return f"{100 * value:.2f}"
