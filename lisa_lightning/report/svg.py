"""Plots, described as a `Plot` and drawn with matplotlib: `draw_figure` for pages, `save_png` for files.

Pages contain them as inline SVG, which needs no scripts and no network.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lisa_lightning.runtime.files import atomic_write

if TYPE_CHECKING:  # matplotlib takes a second to import, and most commands draw nothing
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, str]]
Points = list[tuple[float, float]]

# Distinguishable by colour-blind readers (after Okabe and Ito). Contrast with white and near-black is at least 3.5.
BLUE: Final = "#2a82c4"
ORANGE: Final = "#d55e00"
GREEN: Final = "#0b9a72"
VIOLET: Final = "#a5569a"
AMBER: Final = "#a67c00"
SLATE: Final = "#6b7f8e"
INK: Final = "#010203"
"""Placeholder of currentColor until the SVG is written, since matplotlib accepts no CSS keyword."""
MAX_POINTS: Final = 800
"""Points of a line; more can't be distinguished and only make the page large."""
HASH_SALT: Final = "lisa_lightning"
RUN_CLASS: Final = "run-"
"""Prefix of the CSS class of a line that belongs to a run."""


@dataclass(frozen=True)
class Line:
    """Points that are drawn as one line."""

    points: Points
    colour: str
    label: str = ""
    """Entry in the legend, "" for none."""
    dash: str = "-"
    """Line style of matplotlib, "" for markers alone."""
    marker: str = ""
    width: float = 1.8
    opacity: float = 1.0
    run: str = ""
    """Id of the line's run, by which a page can hide the line."""


@dataclass(frozen=True)
class Axis:
    """Horizontal axis of a plot."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]] = ()
    """Positions and labels of the ticks; () to choose them automatically."""
    integer: bool = False
    """True if ticks are whole numbers only."""


@dataclass(frozen=True)
class Plot:
    """Content of a plot, before it is drawn."""

    name: str
    title: str
    caption: str
    unit: str
    lines: list[Line]
    x: Axis
    bands: Sequence[tuple[float, float]] = ()
    """Start and end of the alignment states on the horizontal axis."""
    log: bool = False
    percent: bool = False
    """True if the vertical axis is from 0 to 100."""


@dataclass(frozen=True)
class LegendEntry:
    """Label of a line, with the symbol next to it."""

    label: str
    colour: str
    mark: str
    """`solid`, `dashed`, `dashdot`, `dotted` or `band`; "" for a marker alone."""
    marker: str


@dataclass(frozen=True)
class Figure:
    """A drawn plot: SVG for wide and for narrow screens, because text of a scaled drawing gets too small."""

    name: str
    title: str
    caption: str
    legend: list[LegendEntry]
    wide: str
    narrow: str


@dataclass(frozen=True)
class Layout:
    """Size of a drawing and its left margin, in points. Fixed margins align the steps of all plots of a page."""

    name: str
    width: float
    height: float
    left: float
    font: float
    ticks: int


WIDE: Final = Layout("wide", width=860, height=250, left=54, font=12, ticks=10)
NARROW: Final = Layout("narrow", width=360, height=230, left=44, font=11.5, ticks=5)
RIGHT, TOP, BOTTOM = 18, 26, 42
"""Other margins, in points."""


def draw_figure(plot: Plot) -> Figure:
    """Return a plot as SVG with its legend. Equal plots result in equal text."""
    marks = {"-": "solid", "--": "dashed", "-.": "dashdot", ":": "dotted", "": ""}
    css_colours = {INK: "currentColor"}
    legend = [
        LegendEntry(line.label, css_colours.get(line.colour, line.colour), marks[line.dash], line.marker)
        for line in plot.lines
        if line.label
    ]
    if plot.bands:
        legend.append(LegendEntry("alignment state", BLUE, "band", ""))
    return Figure(plot.name, plot.title, plot.caption, legend, _svg(plot, WIDE), _svg(plot, NARROW))


def _svg(plot: Plot, layout: Layout) -> str:
    """Return a plot as SVG, drawn with matplotlib's defaults instead of the user's matplotlibrc."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = _rc_params(layout.font)  # matplotlib's stubs want literal names
        matplotlib.rcParams.update(parameters)
        canvas = Canvas(figsize=(layout.width / 72, layout.height / 72))
        axes = canvas.add_axes(
            (
                layout.left / layout.width,
                BOTTOM / layout.height,
                (layout.width - layout.left - RIGHT) / layout.width,
                (layout.height - TOP - BOTTOM) / layout.height,
            )
        )
        _draw(axes, plot)
        _set_scales(axes, plot, layout.ticks)
        # The unit is above the axis: a vertical label next to the ticks would cost width on a phone.
        axes.text(0, 1 + 10 / (layout.height - TOP - BOTTOM), plot.unit, transform=axes.transAxes, alpha=0.8)
        text = StringIO()
        # Without a date equal plots result in equal bytes. Without any entry matplotlib writes no links either.
        no_metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    return _inline_svg(text.getvalue(), plot, f"{plot.name}-{layout.name}")


def save_png(plots: Sequence[Plot], path: Path) -> None:
    """Write plots side by side with one legend, as a PNG file for pages that can't contain SVG.

    Args:
        plots: at least one plot.
        path: file to write.

    Raises:
        UserError: if the file can't be written.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = _rc_params(10)
        matplotlib.rcParams.update({name: "black" if value == INK else value for name, value in parameters.items()})
        canvas = Canvas(figsize=(4.4 * len(plots), 3.4), dpi=160, layout="constrained")
        labels = {}
        for axes, plot in zip(canvas.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            _draw(axes, plot)
            _set_scales(axes, plot, 6)
            axes.set_title(plot.title, fontsize=11)
            axes.set_ylabel(plot.unit)
            drawn_lines = [drawn for line, drawn in zip(plot.lines, axes.get_lines(), strict=True) if line.label]
            labels |= dict(zip((line.label for line in plot.lines if line.label), drawn_lines, strict=True))
        if len(labels) > 1:
            canvas.legend(
                list(labels.values()),
                list(labels),
                loc="outside lower center",
                ncols=min(len(labels), 6),
                frameon=False,
            )
        with atomic_write(path) as temporary:
            canvas.savefig(temporary, format="png")


def _rc_params(font: float) -> dict[str, Any]:
    """Return the parameters of matplotlib for a font size in points."""
    colour_names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return dict.fromkeys(colour_names, INK) | {
        "svg.fonttype": "none",
        "svg.hashsalt": HASH_SALT,
        "font.family": "sans-serif",
        "font.size": font,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.alpha": 0.18,
        "path.simplify_threshold": 0.3,
    }


def _draw(axes: "Axes", plot: Plot) -> None:
    for start, end in plot.bands:
        axes.axvspan(start, end, facecolor=BLUE, alpha=0.2, linewidth=0)
    for line in plot.lines:
        x, y = zip(*_thin(line.points), strict=True)
        (drawn,) = axes.plot(
            x,
            y,
            color=line.colour,
            linestyle=line.dash or "none",
            marker=line.marker or None,
            markersize=5.5,
            linewidth=line.width,
            alpha=line.opacity,
            clip_on=not line.marker,
        )
        if line.run:
            drawn.set_gid(f"{RUN_CLASS}{line.run}")


def _thin(points: Points) -> Points:
    """Return lowest and highest point of each of at most MAX_POINTS / 2 groups, so that peaks stay visible."""
    if len(points) <= 2 * MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS / 2))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    ends = [{min(g, key=lambda p: p[1]), max(g, key=lambda p: p[1])} for g in groups]
    return [point for pair in ends for point in sorted(pair)]


def _set_scales(axes: "Axes", plot: Plot, ticks: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xlim(plot.x.low, plot.x.high)
    if plot.x.ticks:
        axes.set_xticks([x for x, _ in plot.x.ticks], [name for _, name in plot.x.ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=plot.x.integer, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(plot.x.label)
    if plot.log:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _format_power(value)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        bottom = axes.get_ylim()[0] if any(y < 0 for line in plot.lines for _, y in line.points) else 0
        # The outer ticks are beyond all values.
        ticks_y = axes.yaxis.get_major_locator().tick_values(bottom, max(0, axes.get_ylim()[1]))
        axes.set_ylim(*(0, 100) if plot.percent else (ticks_y[0], ticks_y[-1]))


def _format_power(value: float) -> str:
    """Return a power of ten as plain characters, such as 10⁻⁴: matplotlib's formulas need other fonts."""
    if value <= 0:
        return ""
    exponent = round(math.log10(value))
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _inline_svg(svg: str, plot: Plot, prefix: str) -> str:
    """Return matplotlib's SVG file as an element with unique ids, and with the size, fonts and ink of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    title, description = f"{prefix}-title", f"{prefix}-desc"
    opening = (
        f'<svg class="{prefix.rpartition("-")[2]}" {view[0]} role="img" aria-labelledby="{title} {description}">'
        f'<title id="{title}">{escape(plot.title)}</title><desc id="{description}">{escape(_describe(plot))}</desc>'
    )
    svg = re.sub(r"<svg[^>]*>", "", svg, count=1)
    svg = svg.replace(INK, "currentColor").replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)  # older versions of matplotlib
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: _round_numbers(tag[0]), svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(rf' id="({RUN_CLASS}[^"]+)"', r' class="\1"', svg)
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    return opening + re.sub(r"\n\s*", "\n", svg).strip()


def _round_numbers(tag: str) -> str:
    """Return a tag with coordinates rounded to hundredths of a pixel."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)


def _describe(plot: Plot) -> str:
    """Return a description of the plot for screen readers: first and last value of every line."""
    tick_labels = dict(plot.x.ticks)
    courses = []
    for line in plot.lines:
        if line.label:
            (first, start), (last, end) = line.points[0], line.points[-1]
            course = f"{line.label}: {start:.3g} at {tick_labels.get(first, f'{first:g}')}"
            courses.append(course + (f", {end:.3g} at {tick_labels.get(last, f'{last:g}')}" if last > first else ""))
    return f"{plot.unit} over {plot.x.label}. " + "; ".join(courses) + "."
