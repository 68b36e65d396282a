"""The curves of a run: what is plotted of them, and what is said of it."""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Final

from lisa_lightning.report.svg import (
    BLUE,
    GREEN,
    INK,
    MOST_POINTS,
    ORANGE,
    VIOLET,
    Axis,
    Figure,
    Line,
    Plot,
    Points,
    Rows,
    figure,
)

MOST_BANDS: Final = 100
MAX_SHOWN: Final = 1e30
"""Larger values overflow the arithmetic of a plot."""
OF_ALL: Final = ("train", "user", "alignment", "proximal", "switch", "time", "eval")
"""Curves that have a picture, or need none."""


def figures(curves: Rows) -> list[Figure]:
    """The plots that have data, drawn; the same rows give the same text."""
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
    plots += [*_own_plots(finetune), *_own_plots(align, aligning=True)]
    return [figure(plot) for plot in plots]


def _loss_plot(rows: Rows) -> Plot | None:
    user, alignment = points(rows, "user/loss"), points(rows, "alignment/loss")
    if not user and not alignment:
        return None
    lines = [*_with_raw(user, ORANGE, "user steps", "-"), *_with_raw(alignment, BLUE, "alignment steps", "--")]
    caption = "Mean loss of the tokens to learn. Lines are smoothed; the faint ones are single steps."
    return _plot("loss", "Loss while fine-tuning", caption, "loss", lines, rows)


def _drift_plot(rows: Rows) -> Plot | None:
    drift = points(rows, "proximal/drift")
    if not drift:
        return None
    # A switch is noted in the first row of the new state, so it happened one step earlier and ended the other state.
    switches = [(_is_alignment(row), (x - 1, y)) for row in rows for x, y in points([row], "switch/drift")]
    ended_user = [point for alignment_begins, point in switches if alignment_begins]
    ended_alignment = [point for alignment_begins, point in switches if not alignment_begins]
    lines = [
        Line(drift, INK, "after every step", width=1.1, opacity=0.65),
        Line(ended_user, ORANGE, "at the end of a user state", "", "o"),
        Line(ended_alignment, BLUE, "at the end of an alignment state", "", "s"),
    ]
    caption = "Squared distance of the adapter from the anchor"
    caption += ", which moves to where the adapter is at every switch." if switches else ": from where it started."
    return _plot("drift", "Drift", caption, "squared distance", lines, rows, log=_decades(drift) > 2)


def _penalty_plot(rows: Rows) -> Plot | None:
    penalty = points(rows, "proximal/penalty")
    if not any(y for _, y in penalty):  # with rho = 0 it is always 0
        return None
    caption = "What the proximal term adds to the loss; it rests during the first share of the steps (proximal_after)."
    return _plot("penalty", "Proximal penalty", caption, "loss", [Line(penalty, INK, "penalty", width=1.3)], rows)


def _score_plot(rows: Rows) -> Plot | None:
    looks = {
        "harmful_score": (ORANGE, "-", "o"),
        "refusal_rate": (BLUE, "--", "s"),
        "over_refusal": (VIOLET, "-.", "D"),
        "accuracy": (GREEN, ":", "^"),
    }
    lines: list[Line] = []
    for name, (colour, dash, marker) in looks.items():
        measured = points(rows, f"eval/{name}")
        if measured:
            lines += [Line(_whiskers(rows, f"eval/{name}"), colour, width=1.2, opacity=0.4)]
            lines += [Line(measured, colour, name.replace("_", " ").replace("over r", "over-r"), dash, marker)]
    if not lines:
        return None
    caption = "Measured by the embedded judge on few of the held-out prompts; thin upright lines are 95 % intervals."
    return _plot("scores", "Scores while fine-tuning", caption, "percent", lines, rows, percent=True)


def _gradient_plot(rows: Rows) -> Plot | None:
    norm = points(rows, "eval/gradient_norm")
    if not norm:
        return None
    caption = "Of the sum of the losses on fixed alignment and user rows; where it is small, neither state pulls away."
    line = Line(norm, INK, "norm", marker="o", width=1.3)
    return _plot("gradient", "Joint gradient", caption, "norm", [line], rows)


def _own_plots(rows: Rows, aligning: bool = False) -> list[Plot]:
    """What the method of a stage tells beside what all do: both stages' may tell the same."""
    names = {name: None for row in rows for name in row if "/" in name and name.partition("/")[0] not in OF_ALL}
    found = [(name, points(rows, name)) for name in names]
    prefix, where, teller = ("align-", " while aligning", "align method") if aligning else ("", "", "method")
    return [
        _plot(
            prefix + name.replace("/", "-"),
            name + where,
            f"What the {teller} tells of itself.",
            "",
            [Line(own, INK, width=1.3)],
            rows,
            bands=not aligning,
        )
        for name, own in found
        if own
    ]


def _align_plot(rows: Rows) -> Plot | None:
    lines = _with_raw(points(rows, "train/loss"), BLUE, "alignment rows", "-")
    if not lines:
        return None
    caption = "Training before the user’s, on alignment rows only. Smoothed; the faint line is single steps."
    return _plot("align", "Loss of the alignment stage", caption, "loss", lines, rows, bands=False)


def _plot(
    name: str, title: str, caption: str, unit: str, lines: list[Line], rows: Rows, bands: bool = True, **scale: bool
) -> Plot:
    steps = Axis("optimizer step", 0, max(1.0, *(float(row["step"]) for row in rows)), whole=True)
    shown = [line for line in lines if line.points]
    return Plot(name, title, caption, unit, shown, steps, _alignment_states(rows) if bands else [], **scale)


def points(rows: Rows, column: str) -> Points:
    """Return step and value where a finite value was measured that an axis can show."""
    cells = [(float(row["step"]), float(row[column])) for row in rows if row.get(column, "") != ""]
    return [(x, y) for x, y in cells if abs(y) < MAX_SHOWN]


def _whiskers(rows: Rows, column: str) -> Points:
    """The interval at every point, an upright line each."""
    highs = dict(points(rows, f"{column}_high"))
    ends = [(low, (low[0], highs[low[0]])) for low in points(rows, f"{column}_low") if low[0] in highs]
    return [point for low, high in ends for point in (low, high, (low[0], math.nan))]


def _is_alignment(row: dict[str, str]) -> bool:
    return float(row.get("train/state") or 0) == 1


def _alignment_states(rows: Rows) -> list[tuple[float, float]]:
    """From where to where alignment states go; none where they are too many to be seen."""
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
    return [Line(_broken(points), colour, width=1.0, opacity=0.35), Line(smooth(points), colour, label, dash)]


def smooth(points: Points) -> Points:
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


def _decades(points: Points) -> float:
    positive = [y for _, y in points if y > 0]
    return math.log10(max(positive) / min(positive)) if positive else 0.0
