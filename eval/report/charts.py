"""Static charts: matplotlib figures as SVG that takes the page's text colour, so that dark mode works.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines differ in dashes too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#8F8F00")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
INK = "#010203"  # stands for the page's own text colour
POINTS = 400  # vertices of a curve; more can't be seen
Points = tuple[np.ndarray, np.ndarray]  # of a curve: x [n] and y [n]

STYLE: dict[Any, object] = {  # by names that only newer versions of matplotlib have a type for
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.xmargin": 0.02,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass
class Line:
    """A curve: x ``[n]``, y ``[n]`` and its name. Without a colour, the chart gives it the next one."""

    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    label: str | None = None
    colour: str | None = None
    dashes: object = None


def line_chart(title: str, lines: Sequence[Line], x: str, y: str, *, unit: bool = False, marks: bool = False) -> Markup:
    """Curves over one axis.

    Args:
        x, y: what the axes show; an axis y of "%" ends at 100.
        unit: both axes go from 0 to 1.
        marks: a dot on every vertex, also of short curves without it.
    """
    with rc_context(STYLE):
        figure, axes = _figure(title, x, y, (3.6, 3.6) if unit else (4.2, 3.2))
        for number, line in enumerate(lines):
            colour = line.colour or COLOURS[number % len(COLOURS)]
            dashes = line.dashes or DASHES[number % len(DASHES)]
            dot = "o" if marks or len(line.x) < 20 else None
            axes.plot(
                line.x,
                line.y,
                color=colour,
                linestyle=dashes,
                label=line.label,
                marker=dot,
                markersize=3,
                clip_on=y != "%",
            )
        if unit:
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
            axes.set_aspect("equal")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if y == "%":
            axes.set_ylim(top=min(axes.get_ylim()[1], 100))
        if any(line.label for line in lines):
            axes.legend(loc="best")
        return _svg(figure, title)


def histogram(title: str, parts: dict[str, np.ndarray], x: str, marks: dict[str, float]) -> Markup:
    """Shares of each part by value; ``marks`` are vertical lines."""
    with rc_context(STYLE):
        figure, axes = _figure(title, x, "share of the images", (5.2, 3.0))
        bins = np.histogram_bin_edges(np.concatenate(list(parts.values())), 40).tolist()
        for number, (name, values) in enumerate(parts.items()):
            weights = np.full(len(values), 1 / len(values))
            if number == 0:
                axes.hist(values, bins, weights=weights, label=name, color=COLOURS[0], alpha=0.55)
            else:
                outline: dict[str, Any] = {"histtype": "step", "edgecolor": COLOURS[3], "linewidth": 1.4}
                axes.hist(values, bins, weights=weights, label=name, hatch="////", **outline)
        for name, value in marks.items():
            axes.axvline(value, color=INK, linestyle=DASHES[1], label=name)
        axes.legend(loc="best")
        return _svg(figure, title)


def thin(x: np.ndarray, y: np.ndarray) -> Points:
    """At most `POINTS` of a curve's vertices, both ends among them."""
    rows = np.unique(np.linspace(0, len(x) - 1, POINTS).astype(int)) if len(x) > POINTS else np.arange(len(x))
    return np.asarray(x)[rows], np.asarray(y)[rows]


def smooth(x: np.ndarray, y: np.ndarray) -> Points:
    """A long curve as means of blocks."""
    parts = min(len(x), POINTS)
    x, y = (np.array([block.mean() for block in np.array_split(values, parts)]) for values in (x, y))
    return x, y


def _figure(title: str, x: str, y: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(size, layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, title: str) -> Markup:
    text = StringIO()
    with rc_context({"svg.hashsalt": title}):  # ids that are the same every time, and others for every title
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # matplotlib numbers them anew in every figure
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"\n\s*", "\n", svg)
    head = Markup('<svg class="chart" role="img" aria-label="{}"').format(title)
    return Markup(svg.replace("<svg", head, 1))  # matplotlib escapes its texts itself
