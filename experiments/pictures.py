"""Pictures of claims that are not a score against a swept key."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from lisa_lightning.report.svg import BLUE, GREEN, ORANGE, Axis, Line, Plot, Points
from lisa_lightning.report.sweep_page import LOOKS
from lisa_lightning.runtime.files import beside

Rows = Sequence[dict[str, str]]
COURSES: Final = {
    "switch/drift": ("Drift at the switches", "squared distance"),
    "eval/alignment_loss": ("Loss on alignment rows", "nats a token"),
    "eval/gradient_norm": ("Joint gradient", "norm"),
}


def course(rows: Rows, name: str) -> Plot:
    """A column against the step: means over seeds as lines, single seeds faint."""
    measured = [row for row in rows if row[name]]
    lines = []
    for method in dict.fromkeys(row["method"] for row in measured):
        colour, dash, _ = LOOKS[method]
        own = [row for row in measured if row["method"] == method]
        by_step: dict[float, list[float]] = {}
        for row in own:
            by_step.setdefault(float(row["step"]), []).append(float(row[name]))
        for seed in dict.fromkeys(row["seed"] for row in own):
            single = sorted((float(row["step"]), float(row[name])) for row in own if row["seed"] == seed)
            lines.append(Line(single, colour, width=0.9, opacity=0.3))
        lines.append(Line(sorted((step, fmean(found)) for step, found in by_step.items()), colour, method, dash))
    title, unit = COURSES[name]
    last = max(float(row["step"]) for row in measured)
    return Plot(name, title, "", unit, lines, Axis("optimizer step", 0, last, whole=True))


def one_each(rows: Rows, name: str, title: str, unit: str) -> Plot:
    """A column for each method: the mean over seeds with its standard deviation, single seeds faint."""
    lines = []
    methods = sorted({row["method"] for row in rows}, key=list(LOOKS).index)
    for x, method in enumerate(methods):
        colour, _, marker = LOOKS[method]
        found = [float(row[name]) for row in rows if row["method"] == method]
        mean, off = fmean(found), stdev(found) if len(found) > 1 else 0.0
        upright: Points = [(x, mean - off), (x, mean + off), (x, math.nan)]
        lines += [
            Line([(float(x), y) for y in found], colour, dash="", marker=".", opacity=0.45),
            Line(upright, colour, width=1.2, opacity=0.6),
            Line([(float(x), mean)], colour, "", "", marker),
        ]
    ticks = [(float(x), method) for x, method in enumerate(methods)]
    lines.append(Line([(0.0, 0.0)], "none", opacity=0.0))  # the axis starts at 0
    return Plot(name, title, "", unit, lines, Axis("", -0.5, len(methods) - 0.5, ticks))


def ranked(measured: Sequence[tuple[str, Rows]], path: Path) -> None:
    """A line for each defense, the safest on top: mean, standard deviation and single seeds of three scores."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    scores = {"harmful_score": ORANGE, "over_refusal": BLUE, "accuracy": GREEN}
    order = sorted(measured, key=lambda m: -fmean(float(row["harmful_score"]) for row in m[1]))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        canvas = Canvas(figsize=(10, 0.8 + 0.24 * len(order)), dpi=140, layout="constrained")
        for axes, (score, colour) in zip(canvas.subplots(1, 3, sharey=True), scores.items(), strict=True):
            for y, (_, rows) in enumerate(order):
                found = [float(row[score]) for row in rows]
                off = stdev(found) if len(found) > 1 else 0.0
                axes.plot(found, [y] * len(found), ".", color=colour, alpha=0.45)
                axes.errorbar(fmean(found), y, xerr=off, fmt="o", color=colour, markersize=5, linewidth=1.2)
            axes.set_title(score.replace("_", " ").capitalize() + ", percent", fontsize=11)
            axes.set_xlim(-2, 102)
            axes.set_yticks(range(len(order)), [name for name, _ in order])
            axes.grid(axis="both", alpha=0.18)
            axes.spines[["top", "right"]].set_visible(False)
        with beside(path) as part:
            canvas.savefig(part, format="png")
