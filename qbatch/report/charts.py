"""Charts as SVG text inside a page: matplotlib draws, the page's style sheet colours.

matplotlib is imported on the first chart: that alone lists the fonts of the machine.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_IN, _HEIGHT_IN = 4.2, 2.5
"""About as wide as a phone's page, where letters of 8 points can still be read."""

_COLOURS = {
    "#010101": "currentColor",
    "#020202": "var(--grid)",
    "#030301": "var(--series-1)",
    "#030302": "var(--series-2)",
    "#030303": "var(--series-3)",
}
"""What matplotlib draws with, and what the page makes of it in light and in dark."""

_INK, _GRID, *_SERIES = _COLOURS

MAX_BARS = 24
_MAX_MARKERS = 16
_MAX_LETTERS = 30

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.formatter.limits": (-4, 6),
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8,
    "grid.color": _GRID,
    "grid.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.color": _GRID,
    "ytick.labelcolor": _INK,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """What an axis says and which numbers it names."""

    label: str
    names: Sequence[str] = ()
    """Of the places 0, 1, ...; () for numbers."""
    from_zero: bool = False
    whole: bool = False
    """Name whole numbers only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A drawing and what it says."""

    title: str
    svg: str
    note: str = ""


@dataclass(slots=True)
class _Drawing:
    """A chart while it is drawn, and its SVG text after."""

    axes: "Axes"
    svg: str = ""


@contextmanager
def _drawing(title: str, *, height: float = 1.0) -> Iterator[_Drawing]:
    """Give axes to draw on; afterwards ``svg`` holds the chart, fit to stand in a page.

    Args:
        title: Read out to those who cannot see the chart.
        height: In heights of a usual chart.
    """
    from matplotlib import rc_context  # noqa: PLC0415 - takes half a second
    from matplotlib.figure import Figure  # noqa: PLC0415

    style: Any = {**_STYLE, "svg.hashsalt": title}  # stubs know keys by name only
    with rc_context(style):
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN * height), layout="tight")
        drawn = _Drawing(figure.add_subplot())
        yield drawn
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    drawn.svg = _for_page(out.getvalue(), title)


def _for_page(svg: str, title: str) -> str:
    """Return SVG without prologue and metadata, in the page's colours and as wide as its place."""
    box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[a-zA-Z0-9.]+_[0-9]+"', "", body)  # nothing refers to these
    body = re.sub(r"font-family: [^;]*; ", "", body)
    for drawn, shown in _COLOURS.items():
        body = body.replace(drawn, shown)
    return (
        f'<svg {box[0] if box else ""} role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
    )


def bar_chart(title: str, values: Mapping[str, float], *, unit: str, note: str = "") -> Chart:
    """Return horizontal bars in the order given, each with its value; the first 24 of more."""
    names = [*values][:MAX_BARS]
    lengths = [values[name] for name in names]
    with _drawing(title, height=max(0.4, 0.12 * len(names) + 0.2)) as chart:
        axes = chart.axes
        bars = axes.barh(range(len(names)), lengths, color=_SERIES[0], height=0.7)
        axes.set_yticks(range(len(names)), [name[:_MAX_LETTERS] for name in names])
        axes.bar_label(bars, labels=[f"{length:,.4g}" for length in lengths], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
    return Chart(title=title, svg=chart.svg, note=note)


def stacked_bars(
    title: str, parts: Mapping[str, Mapping[str, float]], *, unit: str, note: str = ""
) -> Chart:
    """Return one horizontal bar for each name, made of the same parts.

    Args:
        title: Of the chart.
        parts: By name, then by part; at most three parts.
        unit: Of the numbers.
        note: Below the chart.
    """
    names = [*parts]
    with _drawing(title, height=max(0.5, 0.14 * len(names) + 0.3)) as chart:
        axes, left = chart.axes, [0.0] * len(names)
        for part, colour in zip(next(iter(parts.values())), _SERIES, strict=False):
            widths = [parts[name][part] for name in names]
            axes.barh(names, widths, left=left, color=colour, height=0.7, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        _add_legend(axes, 2)
    return Chart(title=title, svg=chart.svg, note=note)


def histogram(
    title: str,
    counted: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    note: str = "",
) -> Chart:
    """Return a histogram of ``counts`` between ``edges``, of which there is one more."""
    with _drawing(title) as chart:
        chart.axes.stairs(counted["counts"], counted["edges"], fill=True, color=_SERIES[0])
        chart.axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
    return Chart(title=title, svg=chart.svg, note=note)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: Axis,
    y: Axis,
    mark: tuple[float, float, str] | None = None,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    note: str = "",
) -> Chart:
    """Return lines over a common axis.

    Args:
        title: Of the chart.
        lines: At most three.
        x: What goes to the right.
        y: What goes up.
        mark: A point to stand out, with its name.
        band: Lower and upper ends of a range around the first line.
        note: Below the chart.
    """
    with _drawing(title) as chart:
        axes = chart.axes
        for line, colour in zip(lines, _SERIES, strict=False):
            marker = "o" if len(line.x) < _MAX_MARKERS else ""
            axes.plot(line.x, line.y, color=colour, marker=marker, markersize=3, label=line.name)
        if band is not None:
            axes.fill_between(lines[0].x, *band, color=_SERIES[0], alpha=0.2, linewidth=0)
        if mark is not None:
            axes.plot(mark[0], mark[1], "o", color=_SERIES[1], markersize=7, label=mark[2])
        axes.set(xlabel=x.label, ylabel=y.label)
        if x.names:
            axes.set_xticks(range(len(x.names)), x.names)
        if x.whole:
            axes.locator_params(axis="x", integer=True)
        if y.from_zero:
            axes.set_ylim(bottom=0)
        _add_legend(axes, len(lines) + (mark is not None))
    return Chart(title=title, svg=chart.svg, note=note)


def _add_legend(axes: "Axes", num_names: int) -> None:
    """Name several things above the chart, where they hide nothing."""
    if num_names > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
