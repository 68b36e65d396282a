"""The curves of a run as inline SVG, so that the report page shows them with no scripts and no network."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:  # matplotlib takes a second to import, and most commands draw nothing
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, str]]
Points = list[tuple[float, float]]

# Told apart by colour-blind readers (after Okabe and Ito); contrast with white and with near-black is 3.5 and more.
BLUE: Final = "#2a82c4"
ORANGE: Final = "#d55e00"
GREEN: Final = "#0b9a72"
INK: Final = "#010203"  # stands for currentColor until the SVG is written: matplotlib takes no CSS keyword
MOST_POINTS: Final = 800  # of a line; more can't be told apart and only make the page heavy
MOST_BANDS: Final = 100
SALT: Final = "lisa_lightning"


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


@dataclass(frozen=True)
class Plot:
    """What a plot shows, before it is drawn."""

    name: str
    title: str
    caption: str
    unit: str
    lines: list[Line]
    last: float
    bands: list[tuple[float, float]]
    log: bool = False
    percent: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a plot's key; `mark` is solid, dashed, dotted, o, s, ^ or band."""

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
RIGHT: Final = 18
TOP: Final = 26
BOTTOM: Final = 42


def figures(curves: Rows) -> list[Figure]:
    """The plots that have data, drawn; the same rows give the same text."""
    finetune = [row for row in curves if row.get("stage") == "finetune"]
    align = [row for row in curves if row.get("stage") == "align"]
    makers: list[tuple[Callable[[Rows], Plot | None], Rows]] = [
        (_loss_plot, finetune),
        (_drift_plot, finetune),
        (_penalty_plot, finetune),
        (_score_plot, finetune),
        (_align_plot, align),
    ]
    plots = [plot for make, rows in makers if (plot := make(rows)) is not None]
    return [_figure(plot) for plot in plots]


def _loss_plot(rows: Rows) -> Plot | None:
    user, alignment = _points(rows, "user/loss"), _points(rows, "alignment/loss")
    if not user and not alignment:
        return None
    lines = [*_with_raw(user, ORANGE, "user steps", "-"), *_with_raw(alignment, BLUE, "alignment steps", "--")]
    caption = "Mean loss of the tokens to learn. Lines are smoothed; the faint ones are single steps."
    return _plot("loss", "Loss while fine-tuning", caption, "loss", lines, rows)


def _drift_plot(rows: Rows) -> Plot | None:
    drift = _points(rows, "proximal/drift")
    if not drift:
        return None
    # A switch is noted in the first row of the new state, so it happened one step earlier and ended the other state.
    switches = [(_is_alignment(row), (x - 1, y)) for row in rows for x, y in _points([row], "switch/drift")]
    ended_user = [point for alignment_begins, point in switches if alignment_begins]
    ended_alignment = [point for alignment_begins, point in switches if not alignment_begins]
    lines = [
        Line(drift, INK, "after every step", width=1.1, opacity=0.65),
        Line(ended_user, ORANGE, "at the end of a user stretch", "", "o"),
        Line(ended_alignment, BLUE, "at the end of an alignment stretch", "", "s"),
    ]
    caption = "Squared distance of the adapter from the anchor"
    caption += ", which moves to where the adapter is at every switch." if switches else ": from where it started."
    return _plot("drift", "Drift", caption, "squared distance", lines, rows, log=_decades(drift) > 2)


def _penalty_plot(rows: Rows) -> Plot | None:
    penalty = _points(rows, "proximal/penalty")
    if not any(y for _, y in penalty):  # other methods than Lisa note a penalty of 0
        return None
    caption = "What the proximal term adds to the loss; it rests while the method warms up."
    return _plot("penalty", "Proximal penalty", caption, "loss", [Line(penalty, INK, "penalty", width=1.3)], rows)


def _score_plot(rows: Rows) -> Plot | None:
    lines = [
        Line(_points(rows, "eval/harmful_score"), ORANGE, "harmful score", "-", "o"),
        Line(_points(rows, "eval/refusal_rate"), BLUE, "refusal rate", "--", "s"),
        Line(_points(rows, "eval/accuracy"), GREEN, "accuracy", ":", "^"),
    ]
    if not any(line.points for line in lines):
        return None
    caption = "Measured on a part of the held-out prompts, so these points are rougher than scores on all of them."
    return _plot("scores", "Scores while fine-tuning", caption, "percent", lines, rows, percent=True)


def _align_plot(rows: Rows) -> Plot | None:
    lines = _with_raw(_points(rows, "train/loss"), BLUE, "alignment rows", "-")
    if not lines:
        return None
    caption = "Training before the user’s, on alignment rows only. Smoothed; the faint line is single steps."
    return _plot("align", "Loss of the alignment stage", caption, "loss", lines, rows, bands=False)


def _plot(
    name: str, title: str, caption: str, unit: str, lines: list[Line], rows: Rows, bands: bool = True, **scale: bool
) -> Plot:
    steps = [float(row["step"]) for row in rows]
    shown = [line for line in lines if line.points]
    return Plot(name, title, caption, unit, shown, max(steps), _stretches(rows) if bands else [], **scale)


def _points(rows: Rows, column: str) -> Points:
    """Step and value where a finite value was measured."""
    cells = [(float(row["step"]), float(row[column])) for row in rows if row.get(column, "") != ""]
    return [(x, y) for x, y in cells if math.isfinite(y)]


def _is_alignment(row: dict[str, str]) -> bool:
    return float(row.get("train/state") or 0) == 1


def _stretches(rows: Rows) -> list[tuple[float, float]]:
    """From where to where the alignment stretches go; none where they are too many to be seen."""
    found: list[tuple[float, float]] = []
    for step in (float(row["step"]) for row in rows if _is_alignment(row)):
        if found and found[-1][1] == step - 1:
            found[-1] = (found[-1][0], step)
        else:
            found.append((step - 1, step))
    return found if len(found) <= MOST_BANDS else []


def _with_raw(points: Points, colour: str, label: str, dash: str) -> list[Line]:
    """The values themselves, faint, below their smoothed course."""
    if not points:
        return []
    return [Line(_broken(points), colour, width=1.0, opacity=0.35), Line(_smooth(points), colour, label, dash)]


def _smooth(points: Points) -> Points:
    """Centred means over a twentieth of the points; the window shrinks at the start, where losses fall fast."""
    values = [y for _, y in points]
    half = max(1, len(values) // 40)

    def mean(i: int) -> float:
        reach = min(half, i)
        return fmean(values[i - reach : i + reach + 1])

    return [(x, mean(i)) for i, (x, _) in enumerate(points)]


def _broken(points: Points) -> Points:
    """With a gap where steps of the other state lie between; long runs stay whole, to be thinned later."""
    if len(points) > MOST_POINTS:
        return points
    broken: Points = []
    for x, y in points:
        if broken and x - broken[-1][0] > 1:
            broken.append((x - 1, math.nan))
        broken.append((x, y))
    return broken


def _thinned(points: Points) -> Points:
    """Lowest and highest point of each of at most MOST_POINTS / 2 groups, so that peaks stay."""
    if len(points) <= 2 * MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS / 2))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    ends = [{min(g, key=lambda p: p[1]), max(g, key=lambda p: p[1])} for g in groups]
    return [point for pair in ends for point in sorted(pair)]


def _decades(points: Points) -> float:
    positive = [y for _, y in points if y > 0]
    return math.log10(max(positive) / min(positive)) if positive else 0.0


def _figure(plot: Plot) -> Figure:
    marks = {"-": "solid", "--": "dashed", ":": "dotted", "": ""}
    colour = {INK: "currentColor"}
    keys = [Key(x.label, colour.get(x.colour, x.colour), marks[x.dash], x.marker) for x in plot.lines if x.label]
    if plot.bands:
        keys.append(Key("alignment stretch", BLUE, "band", ""))
    return Figure(plot.name, plot.title, plot.caption, keys, _svg(plot, WIDE), _svg(plot, NARROW))


def _svg(plot: Plot, shape: Shape) -> str:
    """Draw with matplotlib's own defaults, whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        style: Any = _style(shape)  # matplotlib's stubs want its own names as literals
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
        _set_scales(axes, plot, shape)
        text = StringIO()
        # Without a date the same run gives the same bytes; with no entry at all there is no block of links either.
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue(), plot, f"{plot.name}-{shape.name}")


def _style(shape: Shape) -> dict[str, Any]:
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return dict.fromkeys(inks, INK) | {
        "svg.fonttype": "none",
        "svg.hashsalt": SALT,
        "font.family": "sans-serif",
        "font.size": shape.font,
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
        axes.plot(
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


def _set_scales(axes: "Axes", plot: Plot, shape: Shape) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xlim(0, max(1.0, plot.last))
    axes.xaxis.set_major_locator(MaxNLocator(shape.ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("optimizer step")
    if plot.log:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    else:
        axes.set_ylim(0, 100 if plot.percent else None)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    # Upright beside the ticks it would cost width on a phone.
    axes.text(0, 1 + 10 / (shape.height - TOP - BOTTOM), plot.unit, transform=axes.transAxes, alpha=0.8)


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
        f'<title id="{title}">{plot.title}</title><desc id="{spoken}">{_spoken(plot)}</desc>'
    )
    svg = re.sub(r"<svg[^>]*>", "", svg, count=1)
    svg = svg.replace(INK, "currentColor").replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)  # how older versions of matplotlib say it
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: _rounded(tag[0]), svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    return opening + re.sub(r"\n\s*", "\n", svg).strip()


def _rounded(tag: str) -> str:
    """A hundredth of a pixel is enough for coordinates; labels stand between tags and stay as they are."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)


def _spoken(plot: Plot) -> str:
    """The plot in words, for those who can't see it; nothing here comes from outside, so nothing needs escaping."""
    courses = []
    for line in plot.lines:
        if line.label:
            (first, start), (last, end) = line.points[0], line.points[-1]
            course = f"{line.label}: {start:.3g} at step {first:g}"
            courses.append(course + (f", {end:.3g} at step {last:g}" if last > first else ""))
    return f"{plot.unit} over optimizer steps. " + "; ".join(courses) + "."
