"""Plots of claims that are not a score against a swept key: `step_plot`, `method_plot` and `write_ranking`."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from lisa_lightning.report.svg import BLUE, GREEN, ORANGE, VIOLET, Axis, Line, Plot, Points
from lisa_lightning.report.sweep_page import STYLES
from lisa_lightning.runtime.files import atomic_write

Rows = Sequence[dict[str, str]]
STEP_PLOTS: Final = {
    "switch/drift": ("Drift at the switches", "squared distance"),
    "eval/alignment_loss": ("Loss on alignment rows", "nats per token"),
    "eval/gradient_norm": ("Joint gradient", "norm"),
}
"""Column of curves.csv -> title and unit of its plot."""
RANKED_SCORES: Final = {"harmful_score": ORANGE, "refusal_rate": VIOLET, "over_refusal": BLUE, "accuracy": GREEN}


def step_plot(rows: Rows, column: str) -> Plot:
    """Return a plot of a column against the optimizer step.

    Each method has a line of means over seeds, and a faint line per seed.
    """
    measured = [row for row in rows if row[column]]
    lines = []
    for method in dict.fromkeys(row["method"] for row in measured):
        colour, dash, _ = STYLES[method]
        method_rows = [row for row in measured if row["method"] == method]
        by_step: dict[float, list[float]] = {}
        for row in method_rows:
            by_step.setdefault(float(row["step"]), []).append(float(row[column]))
        for seed in dict.fromkeys(row["seed"] for row in method_rows):
            points = sorted((float(row["step"]), float(row[column])) for row in method_rows if row["seed"] == seed)
            lines.append(Line(points, colour, width=0.9, opacity=0.3))
        means = sorted((step, fmean(values)) for step, values in by_step.items())
        lines.append(Line(means, colour, method, dash))
    title, unit = STEP_PLOTS[column]
    last = max(float(row["step"]) for row in measured)
    return Plot(column, title, "", unit, lines, Axis("optimizer step", 0, last, integer=True))


def method_plot(rows: Rows, column: str, title: str, unit: str) -> Plot:
    """Return a plot of a column by method.

    Each method has the mean over seeds, error bars of one standard deviation, and a faint point per seed.
    """
    lines = []
    methods = sorted({row["method"] for row in rows}, key=list(STYLES).index)
    for x, method in enumerate(methods):
        colour, _, marker = STYLES[method]
        values = [float(row[column]) for row in rows if row["method"] == method]
        mean, deviation = fmean(values), stdev(values) if len(values) > 1 else 0.0
        error_bars: Points = [(x, mean - deviation), (x, mean + deviation), (x, math.nan)]
        lines += [
            Line([(float(x), y) for y in values], colour, dash="", marker=".", opacity=0.45),
            Line(error_bars, colour, width=1.2, opacity=0.6),
            Line([(float(x), mean)], colour, "", "", marker),
        ]
    ticks = [(float(x), method) for x, method in enumerate(methods)]
    lines.append(Line([(0.0, 0.0)], "none", opacity=0.0))  # the axis starts at 0
    return Plot(column, title, "", unit, lines, Axis("", -0.5, len(methods) - 0.5, ticks))


def write_ranking(measured: Sequence[tuple[str, Rows]], path: Path) -> None:
    """Write a picture with one line per defense, the safest on top.

    Each line has mean, standard deviation and single seeds of four scores.

    Args:
        measured: labels of the defenses, each with its rows, one row per seed.
        path: PNG file to write.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    ranking = sorted(measured, key=lambda m: -fmean(float(row["harmful_score"]) for row in m[1]))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        canvas = Canvas(figsize=(12.5, 0.8 + 0.24 * len(ranking)), dpi=140, layout="constrained")
        for axes, (score, colour) in zip(
            canvas.subplots(1, len(RANKED_SCORES), sharey=True), RANKED_SCORES.items(), strict=True
        ):
            for y, (_, rows) in enumerate(ranking):
                values = [float(row[score]) for row in rows]
                deviation = stdev(values) if len(values) > 1 else 0.0
                axes.plot(values, [y] * len(values), ".", color=colour, alpha=0.45)
                axes.errorbar(fmean(values), y, xerr=deviation, fmt="o", color=colour, markersize=5, linewidth=1.2)
            axes.set_title(score.replace("_", " ").capitalize() + ", percent", fontsize=11)
            axes.set_xlim(-2, 102)
            axes.set_yticks(range(len(ranking)), [label for label, _ in ranking])
            axes.grid(axis="both", alpha=0.18)
            axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(path) as temporary:
            canvas.savefig(temporary, format="png")
