"""Plots: as inline SVG, so that a page shows them with no scripts and no network, and as PNG files."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lisa_lightning.runtime.files import beside

if TYPE_CHECKING:  # matplotlib takes a second to import, and most commands draw nothing
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, str]]
Points = list[tuple[float, float]]

# Told apart by colour-blind readers (after Okabe and Ito); contrast with white and with near-black is 3.5 and more.
BLUE: Final = "#2a82c4"
ORANGE: Final = "#d55e00"
GREEN: Final = "#0b9a72"
VIOLET: Final = "#a5569a"
AMBER: Final = "#a67c00"
SLATE: Final = "#6b7f8e"
INK: Final = "#010203"  # stands for currentColor until the SVG is written: matplotlib takes no CSS keyword
MOST_POINTS: Final = 800  # of a line; more can't be told apart and only make the page heavy
SALT: Final = "lisa_lightning"
RUN: Final = "run-"  # of a line, becomes its class


@dataclass(frozen=True)
class Line:
    """Points drawn as one line, or as markers alone where `dash` is empty; without a label it isn't in the key."""

    points: Points
    colour: str
    label: str = ""
    dash: str = "-"
    marker: str = ""
    width: float = 1.8
    opacity: float = 1.0
    run: str = ""
    """The run that it belongs to, by which a page can hide it."""


@dataclass(frozen=True)
class Axis:
    """The horizontal axis; where `ticks` are given, they are its only ones."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]] = ()
    whole: bool = False


@dataclass(frozen=True)
class Plot:
    """What a plot shows, before it is drawn."""

    name: str
    title: str
    caption: str
    unit: str
    lines: list[Line]
    x: Axis
    bands: Sequence[tuple[float, float]] = ()
    log: bool = False
    percent: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a plot's key; `mark` is solid, dashed, dashdot, dotted, band or empty."""

    label: str
    colour: str
    mark: str
    marker: str


@dataclass(frozen=True)
class Figure:
    """A plot as the page needs it: drawn for a wide and for a narrow screen, since scaled text gets too small."""

    name: str
    title: str
    caption: str
    keys: list[Key]
    wide: str
    narrow: str


@dataclass(frozen=True)
class Shape:
    """The size of a drawing and of its margins; fixed margins put the steps of all plots below one another."""

    name: str
    width: float
    height: float
    left: float
    font: float
    ticks: int


WIDE: Final = Shape("wide", width=860, height=250, left=54, font=12, ticks=10)
NARROW: Final = Shape("narrow", width=360, height=230, left=44, font=11.5, ticks=5)
RIGHT, TOP, BOTTOM = 18, 26, 42


def _thinned(points: Points) -> Points:
    """Lowest and highest point of each of at most MOST_POINTS / 2 groups, so that peaks stay."""
    if len(points) <= 2 * MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS / 2))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    ends = [{min(g, key=lambda p: p[1]), max(g, key=lambda p: p[1])} for g in groups]
    return [point for pair in ends for point in sorted(pair)]


def figure(plot: Plot) -> Figure:
    """Draw a plot; the same plot gives the same text."""
    marks = {"-": "solid", "--": "dashed", "-.": "dashdot", ":": "dotted", "": ""}
    colour = {INK: "currentColor"}
    keys = [Key(x.label, colour.get(x.colour, x.colour), marks[x.dash], x.marker) for x in plot.lines if x.label]
    if plot.bands:
        keys.append(Key("alignment state", BLUE, "band", ""))
    return Figure(plot.name, plot.title, plot.caption, keys, _svg(plot, WIDE), _svg(plot, NARROW))


def _svg(plot: Plot, shape: Shape) -> str:
    """Draw with matplotlib's own defaults, whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        style: Any = _style(shape.font)  # matplotlib's stubs want its own names as literals
        matplotlib.rcParams.update(style)
        canvas = Canvas(figsize=(shape.width / 72, shape.height / 72))
        axes = canvas.add_axes(
            (
                shape.left / shape.width,
                BOTTOM / shape.height,
                (shape.width - shape.left - RIGHT) / shape.width,
                (shape.height - TOP - BOTTOM) / shape.height,
            )
        )
        _draw(axes, plot)
        _set_scales(axes, plot, shape.ticks)
        # Upright beside the ticks it would cost width on a phone.
        axes.text(0, 1 + 10 / (shape.height - TOP - BOTTOM), plot.unit, transform=axes.transAxes, alpha=0.8)
        text = StringIO()
        # Without a date the same run gives the same bytes; with no entry at all there is no block of links either.
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue(), plot, f"{plot.name}-{shape.name}")


def save_png(plots: Sequence[Plot], path: Path) -> None:
    """Plots side by side over one key, as a picture for a page that isn't ours."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        style: Any = _style(10)
        matplotlib.rcParams.update({name: "black" if value == INK else value for name, value in style.items()})
        canvas = Canvas(figsize=(4.4 * len(plots), 3.4), dpi=160, layout="constrained")
        labels = {}
        for axes, plot in zip(canvas.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            _draw(axes, plot)
            _set_scales(axes, plot, 6)
            axes.set_title(plot.title, fontsize=11)
            axes.set_ylabel(plot.unit)
            shown = [drawn for line, drawn in zip(plot.lines, axes.get_lines(), strict=True) if line.label]
            labels |= dict(zip((line.label for line in plot.lines if line.label), shown, strict=True))
        if len(labels) > 1:
            canvas.legend(
                list(labels.values()),
                list(labels),
                loc="outside lower center",
                ncols=min(len(labels), 6),
                frameon=False,
            )
        with beside(path) as part:
            canvas.savefig(part, format="png")


def _style(font: float) -> dict[str, Any]:
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return dict.fromkeys(inks, INK) | {
        "svg.fonttype": "none",
        "svg.hashsalt": SALT,
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
        x, y = zip(*_thinned(line.points), strict=True)
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
            drawn.set_gid(f"{RUN}{line.run}")


def _set_scales(axes: "Axes", plot: Plot, ticks: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xlim(plot.x.low, plot.x.high)
    if plot.x.ticks:
        axes.set_xticks([x for x, _ in plot.x.ticks], [name for _, name in plot.x.ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=plot.x.whole, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(plot.x.label)
    if plot.log:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        bottom = axes.get_ylim()[0] if any(y < 0 for line in plot.lines for _, y in line.points) else 0
        ends = axes.yaxis.get_major_locator().tick_values(bottom, max(0, axes.get_ylim()[1]))  # lie beyond all values
        axes.set_ylim(*(0, 100) if plot.percent else (ends[0], ends[-1]))


def _power(value: float) -> str:
    """10⁻³ as plain characters: matplotlib would set it as a formula, in fonts of its own."""
    if value <= 0:
        return ""
    exponent = round(math.log10(value))
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _inline(svg: str, plot: Plot, prefix: str) -> str:
    """matplotlib's file as an element of the page: its size, fonts and ink are the page's, its ids are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', svg)
    assert view is not None
    title, spoken = f"{prefix}-title", f"{prefix}-desc"
    opening = (
        f'<svg class="{prefix.rpartition("-")[2]}" {view[0]} role="img" aria-labelledby="{title} {spoken}">'
        f'<title id="{title}">{escape(plot.title)}</title><desc id="{spoken}">{escape(_spoken(plot))}</desc>'
    )
    svg = re.sub(r"<svg[^>]*>", "", svg, count=1)
    svg = svg.replace(INK, "currentColor").replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)  # how older versions of matplotlib say it
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: _rounded(tag[0]), svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(rf' id="({RUN}[^"]+)"', r' class="\1"', svg)
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    return opening + re.sub(r"\n\s*", "\n", svg).strip()


def _rounded(tag: str) -> str:
    """A hundredth of a pixel is enough for coordinates; labels stand between tags and stay as they are."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)


def _spoken(plot: Plot) -> str:
    """The plot in words, for those who can't see it."""
    names = dict(plot.x.ticks)
    courses = []
    for line in plot.lines:
        if line.label:
            (first, start), (last, end) = line.points[0], line.points[-1]
            course = f"{line.label}: {start:.3g} at {names.get(first, f'{first:g}')}"
            courses.append(course + (f", {end:.3g} at {names.get(last, f'{last:g}')}" if last > first else ""))
    return f"{plot.unit} over {plot.x.label}. " + "; ".join(courses) + "."
