"""Plots of the curves of a run. Start at `curve_figures`; each `_*_plot` returns one plot, or None without data."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Final

from lisa_lightning.evaluation.token_kl import PositionKL
from lisa_lightning.report.svg import (
    BLUE,
    GREEN,
    INK,
    MAX_POINTS,
    ORANGE,
    VIOLET,
    Axis,
    Figure,
    Line,
    Plot,
    Points,
    Rows,
    draw_figure,
)

MAX_BANDS: Final = 100
"""Alignment states that are marked; more are too narrow to be seen."""
MAX_SHOWN: Final = 1e30
"""Larger values overflow the arithmetic of a plot."""
COMMON_PREFIXES: Final = ("train", "user", "alignment", "proximal", "switch", "time", "eval")
"""Prefixes of curves that have a plot here or need none; all others are the method's."""
SCORE_STYLES: Final = {
    "harmful_score": (ORANGE, "-", "o"),
    "refusal_rate": (BLUE, "--", "s"),
    "over_refusal": (VIOLET, "-.", "D"),
    "accuracy": (GREEN, ":", "^"),
}
"""Score -> colour, dash and marker."""
MODEL_STYLES: Final = ((BLUE, "--", "s"), (ORANGE, "-", "o"))
"""Colour, dash and marker of the models before and after fine-tuning."""


def curve_figures(curves: Rows) -> list[Figure]:
    """Return the figures of all plots that have data. Equal rows result in equal bytes.

    Args:
        curves: rows of curves.csv, as text; "" for a value that was not measured.
    """
    finetune = [row for row in curves if row.get("stage") == "finetune"]
    align = [row for row in curves if row.get("stage") == "align"]
    makers: list[tuple[Callable[[Rows], Plot | None], Rows]] = [
        (_loss_plot, finetune),
        (_drift_plot, finetune),
        (_penalty_plot, finetune),
        (_score_plot, finetune),
        (_gradient_plot, finetune),
        (_align_plot, align),
    ]
    plots = [plot for make, rows in makers if (plot := make(rows)) is not None]
    plots += [*_method_plots(finetune), *_method_plots(align, aligning=True)]
    return [draw_figure(plot) for plot in plots]


def token_kl_figure(positions: Sequence[PositionKL], models: Mapping[str, str]) -> Figure | None:
    """Return the figure of the divergence from the initial model by token, None without data.

    Args:
        positions: divergence of each model at each token.
        models: model -> its name for readers.
    """
    lines: list[Line] = []
    for (model, head), (colour, dash, marker) in zip(models.items(), MODEL_STYLES, strict=False):
        points = [position for position in positions if position.model == model]
        bars = [[(p.token, p.low), (p.token, p.high), (p.token, math.nan)] for p in points]
        if points:
            lines.append(Line([point for bar in bars for point in bar], colour, width=1.2, opacity=0.4))
            lines.append(Line([(p.token, p.kl) for p in points], colour, head, dash, marker))
    if not lines:
        return None
    caption = (
        "Mean KL divergence from the initial model at each token of harmful answers that the user’s rows lack. "
        "Alignment that changes only the first tokens is shallow. Bars: 95 % intervals over answers."
    )
    axis = Axis("token of the answer", 1, max(2.0, *(position.token for position in positions)), integer=True)
    return draw_figure(Plot("token-kl", "Divergence from the initial model", caption, "nats", lines, axis))


def _loss_plot(rows: Rows) -> Plot | None:
    user, alignment = read_points(rows, "user/loss"), read_points(rows, "alignment/loss")
    if not user and not alignment:
        return None
    lines = [*_with_raw(user, ORANGE, "user steps", "-"), *_with_raw(alignment, BLUE, "alignment steps", "--")]
    caption = "Mean loss of the supervised tokens. Bold lines are smoothed, faint lines are single steps."
    return _plot("loss", "Loss while fine-tuning", caption, "loss", lines, rows)


def _drift_plot(rows: Rows) -> Plot | None:
    drift = read_points(rows, "proximal/drift")
    if not drift:
        return None
    # A switch is noted in the first row of the new state, so it happened one step earlier and ended the other state.
    switches = [(_is_alignment(row), (x - 1, y)) for row in rows for x, y in read_points([row], "switch/drift")]
    ended_user = [point for alignment_begins, point in switches if alignment_begins]
    ended_alignment = [point for alignment_begins, point in switches if not alignment_begins]
    lines = [
        Line(drift, INK, "after every step", width=1.1, opacity=0.65),
        Line(ended_user, ORANGE, "at the end of a user state", "", "o"),
        Line(ended_alignment, BLUE, "at the end of an alignment state", "", "s"),
    ]
    anchor = "the weights at the last switch" if switches else "the weights at the start"
    caption = f"Squared distance of the adapter from the anchor, {anchor}."
    return _plot("drift", "Drift", caption, "squared distance", lines, rows, log=_decades(drift) > 2)


def _penalty_plot(rows: Rows) -> Plot | None:
    penalty = read_points(rows, "proximal/penalty")
    if not any(y for _, y in penalty):  # with rho = 0 it is always 0
        return None
    caption = "Proximal term of the loss. It is zero during the first share of the steps (proximal_after)."
    return _plot("penalty", "Proximal penalty", caption, "loss", [Line(penalty, INK, "penalty", width=1.3)], rows)


def _score_plot(rows: Rows) -> Plot | None:
    lines: list[Line] = []
    for name, (colour, dash, marker) in SCORE_STYLES.items():
        measured = read_points(rows, f"eval/{name}")
        if measured:
            lines += [Line(_error_bars(rows, f"eval/{name}"), colour, width=1.2, opacity=0.4)]
            lines += [Line(measured, colour, name.replace("_", " ").replace("over r", "over-r"), dash, marker)]
    if not lines:
        return None
    caption = (
        "Harmful scores by the embedded judge and refusals by rule on a few held-out prompts. Bars: 95 % intervals."
    )
    return _plot("scores", "Scores while fine-tuning", caption, "percent", lines, rows, percent=True)


def _gradient_plot(rows: Rows) -> Plot | None:
    norm = read_points(rows, "eval/gradient_norm")
    if not norm:
        return None
    caption = "Gradient norm of the summed losses on fixed alignment and user rows. Near 0, neither state pulls away."
    line = Line(norm, INK, "norm", marker="o", width=1.3)
    return _plot("gradient", "Joint gradient", caption, "norm", [line], rows)


def _align_plot(rows: Rows) -> Plot | None:
    lines = _with_raw(read_points(rows, "train/loss"), BLUE, "alignment rows", "-")
    if not lines:
        return None
    caption = "Training on alignment rows, before the user’s. The bold line is smoothed, the faint one single steps."
    return _plot("align", "Loss of the alignment stage", caption, "loss", lines, rows, bands=False)


def _method_plots(rows: Rows, aligning: bool = False) -> list[Plot]:
    """Return a plot of each method-specific metric of a stage. Both stages may have metrics of the same name."""
    names = {
        name: None for row in rows for name in row if "/" in name and name.partition("/")[0] not in COMMON_PREFIXES
    }
    measured = [(name, read_points(rows, name)) for name in names]
    prefix, suffix, owner = ("align-", " while aligning", "align method") if aligning else ("", "", "method")
    return [
        _plot(
            prefix + name.replace("/", "-"),
            name + suffix,
            f"A metric that only this {owner} logs.",
            "",
            [Line(values, INK, width=1.3)],
            rows,
            bands=not aligning,
        )
        for name, values in measured
        if values
    ]


def _plot(
    name: str, title: str, caption: str, unit: str, lines: list[Line], rows: Rows, bands: bool = True, **scale: bool
) -> Plot:
    """Return a plot over the optimizer steps of `rows`, with alignment states as bands."""
    steps = Axis("optimizer step", 0, max(1.0, *(float(row["step"]) for row in rows)), integer=True)
    nonempty = [line for line in lines if line.points]
    return Plot(name, title, caption, unit, nonempty, steps, _alignment_states(rows) if bands else [], **scale)


def read_points(rows: Rows, column: str) -> Points:
    """Return step and value of every row with a finite value that an axis can show."""
    cells = [(float(row["step"]), float(row[column])) for row in rows if row.get(column, "") != ""]
    return [(x, y) for x, y in cells if abs(y) < MAX_SHOWN]


def _error_bars(rows: Rows, column: str) -> Points:
    """Return the interval of every point as a vertical line; NaN separates the lines."""
    highs = dict(read_points(rows, f"{column}_high"))
    ends = [(low, (low[0], highs[low[0]])) for low in read_points(rows, f"{column}_low") if low[0] in highs]
    return [point for low, high in ends for point in (low, high, (low[0], math.nan))]


def _is_alignment(row: dict[str, str]) -> bool:
    return float(row.get("train/state") or 0) == 1


def _alignment_states(rows: Rows) -> list[tuple[float, float]]:
    """Return first and last step of every alignment state, [] for more than MAX_BANDS."""
    states: list[tuple[float, float]] = []
    for step in (float(row["step"]) for row in rows if _is_alignment(row)):
        if states and states[-1][1] == step - 1:
            states[-1] = (states[-1][0], step)
        else:
            states.append((step - 1, step))
    return states if len(states) <= MAX_BANDS else []


def _with_raw(points: Points, colour: str, label: str, dash: str) -> list[Line]:
    """Return a faint line of the values and a bold one of their smoothed course, [] without points."""
    if not points:
        return []
    return [Line(_with_gaps(points), colour, width=1.0, opacity=0.35), Line(smooth(points), colour, label, dash)]


def smooth(points: Points) -> Points:
    """Return centred means over a twentieth of the points.

    The window shrinks at the start, where losses fall fast.
    """
    values = [y for _, y in points]
    half = max(1, len(values) // 40)

    def mean(i: int) -> float:
        reach = min(half, i)
        return fmean(values[i - reach : i + reach + 1])

    return [(x, mean(i)) for i, (x, _) in enumerate(points)]


def _with_gaps(points: Points) -> Points:
    """Return the points with a NaN wherever steps of the other state interrupt them.

    Points that will be thinned for drawing are returned unchanged.
    """
    if len(points) > MAX_POINTS:
        return points
    separated: Points = []
    for x, y in points:
        if separated and x - separated[-1][0] > 1:
            separated.append((x - 1, math.nan))
        separated.append((x, y))
    return separated


def _decades(points: Points) -> float:
    """Return the range of the positive values in powers of ten."""
    positive = [y for _, y in points if y > 0]
    return math.log10(max(positive) / min(positive)) if positive else 0.0
