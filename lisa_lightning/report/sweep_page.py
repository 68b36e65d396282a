"""The page of a sweep: scores over seeds, plots of scores against the swept keys, and curves of all runs.

Start at `render_sweep_page`, then `score_plots`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lisa_lightning.data.spacing import evenly_spaced
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.report.comparisons import Comparison, compared_scores
from lisa_lightning.report.run_page import render_template
from lisa_lightning.report.run_plots import read_points, smooth
from lisa_lightning.report.score_table import SCORES, baseline_note
from lisa_lightning.report.search_section import search_section
from lisa_lightning.report.searches import Search
from lisa_lightning.report.svg import (
    AMBER,
    BLUE,
    GREEN,
    ORANGE,
    SLATE,
    VIOLET,
    Axis,
    Figure,
    Line,
    Plot,
    Points,
    draw_figure,
)
from lisa_lightning.report.sweep_runs import (
    GROUPS,
    Run,
    SeedGroup,
    Spread,
    failures,
    format_spread,
    inconsistent_inputs,
    mean_and_deviation,
    measured_scores,
    measured_utility,
    relative_path,
    seed_groups,
    sort_key,
)

Style = tuple[str, str, str]
"""Colour, dash and marker of a line."""
STYLES: Final[dict[str, Style]] = {
    "sft": (ORANGE, "--", "o"),
    "bso": (BLUE, "-.", "s"),
    "lisa": (GREEN, "-", "^"),
    "vlguard": (VIOLET, "--", "D"),
    "proximal": (AMBER, ":", "v"),
}
"""Styles of methods in all plots. Other methods, and further settings of the same method, have a spare style."""
SPARE_STYLES: Final[tuple[Style, ...]] = tuple(
    (c, d, m) for d, m in (("-", "P"), ("--", "X"), (":", "o")) for c in (SLATE, BLUE, ORANGE, VIOLET)
)
PLOTTED_SCORES: Final = ("harmful_score", "refusal_rate", "accuracy")
MAX_SERIES: Final = 8
MAX_CURVES: Final = 90
"""Runs whose curves the page holds."""
MAX_PLOTTED: Final = 200
"""Settings in the plots of scores. A page with thousands would have tens of megabytes."""
INITIAL_CURVES: Final = 6
"""Runs whose curves are shown at first."""


@dataclass(frozen=True)
class Series:
    """Settings that a line of a plot connects."""

    label: str
    style: Style
    groups: list[SeedGroup]


@dataclass(frozen=True)
class Curve:
    """A run whose curves can be shown over those of others."""

    id: str
    label: str
    style: Style
    shown: bool
    """True if the curves are shown at first."""
    rows: list[dict[str, str]]


def render_sweep_page(
    runs: Sequence[Run],
    keys: Sequence[str],
    dependent: Sequence[str],
    out: Path,
    comparisons: Sequence[Comparison] = (),
    searches: Sequence[Search] = (),
) -> str:
    """Return the page as HTML, with everything in it.

    Args:
        runs: finished or not, in any order.
        keys: keys that distinguish the runs (`swept_keys`).
        dependent: keys that vary together with `keys`.
        out: folder of the page, for its links to the runs.
        comparisons: paired differences between settings (`compare_settings`).
        searches: searches among the runs (`read_searches`).
    """
    groups = seed_groups(runs, keys)
    scores = measured_scores(groups)
    with_curves = [r for r in runs if r.status != "failed" and (r.folder / "curves.csv").exists()]
    curves = _curves(with_curves[:MAX_CURVES], keys)
    plotted = [groups[i] for i in evenly_spaced(len(groups), MAX_PLOTTED)]
    content = {
        "heading": out.absolute().name,
        "facts": _shared_facts(runs, keys),
        "counts": {status: sum(r.status == status for r in runs) for status in ("finished", "unfinished", "failed")},
        "codes": len({r.metrics.get("code") for r in runs if r.status == "finished"}),
        "inconsistent": ", ".join(inconsistent_inputs(groups)),
        "keys": keys,
        "dependent": dependent,
        "scores": [SCORES[name][0] for name in scores],
        "rows": [_row(group, scores) for group in groups],
        "utility": [" ".join(name) for name in measured_utility(groups)],
        "utility_rows": [
            (g.values, len(g.runs), [g.mean_utility(n) for n in measured_utility(groups)]) for g in groups
        ],
        "baselines": baseline_note([run.metrics for group in groups for run in group.runs]),
        "compared": [SCORES[name][0] for name in compared_scores(comparisons)],
        "comparisons": [_comparison_row(c, compared_scores(comparisons)) for c in comparisons],
        "figures": [draw_figure(plot) for plot in [*score_plots(plotted, keys), *_tradeoff_plot(plotted, keys)]],
        "plotted": "" if len(plotted) == len(groups) else f"{len(plotted)} of the {len(groups)} settings",
        "search": search_section(searches, out),
        "curves": curves,
        "with_curves": f"{len(with_curves)} of the {len(runs)} runs have curves",
        "capped": len(with_curves) > len(curves),
        "overlays": _overlays(curves),
        "failures": {cause: [relative_path(r.folder, out) for r in failed] for cause, failed in failures(runs).items()},
        "runs": [(relative_path(r.folder, out), r.status, r.value("seed"), [r.value(k) for k in keys]) for r in runs],
    }
    return render_template("sweep.html.j2", content)


def _shared_facts(runs: Sequence[Run], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return names and values of the main settings that all runs share."""
    finetune_keys = ("harmful_ratio", "data.n", "optim.steps") if all(r.run_name.finetunes for r in runs) else ()
    facts = [("experiment", {run.choices.get("experiment", "?") for run in runs})] if finetune_keys else []
    facts += [(name, {run.value(name) for run in runs}) for name in (*GROUPS, *finetune_keys) if name not in keys]
    # The last one is the default engine.
    missing = {"?", "–", "null", "None", "none", "transformers"}
    return [(name, value) for name, values in facts if len(values) == 1 for value in values - missing]


def _row(group: SeedGroup, scores: Sequence[str]) -> tuple[Any, ...]:
    """Return a row of the score table: values, number of runs, scores with intervals, minutes and GiB."""
    spreads = [group.spread(name) for name in scores]
    return (
        group.values,
        len(group.runs),
        [(format_spread(s, mean_and_deviation), format_spread(s, _format_interval)) for s in spreads],
        _format_mean(group, "time/finetune_s", 60),
        _format_mean(group, "memory/finetune_mib", 1024),
    )


def _comparison_row(comparison: Comparison, scores: Sequence[str]) -> tuple[str, str, int, list[str]]:
    """Return a row of the table of differences: setting, baseline, number of pairs, differences."""
    cells = [str(comparison.scores[name]) if name in comparison.scores else "–" for name in scores]
    return comparison.setting, comparison.baseline, comparison.runs, cells


def _format_interval(spread: Spread) -> str:
    return f"{spread.low:.1f} to {spread.high:.1f}"


def _format_mean(group: SeedGroup, name: str, unit: float) -> str:
    """Return the mean of a metric over seeds, divided by `unit`; a dash if no run has it."""
    values = [r.metrics[name] for r in group.runs if name in r.metrics]
    return f"{sum(values) / len(values) / unit:.1f}" if values else "–"


def score_plots(groups: Sequence[SeedGroup], keys: Sequence[str]) -> list[Plot]:
    """Return plots of harmful score, refusal rate and accuracy against each swept key.

    Each method and setting of the other keys has a line.
    """
    plots = []
    for index, key in enumerate(keys):
        values = sorted({g.values[index] for g in groups}, key=sort_key)
        if len(values) < 2 or (key == "method" and len(keys) > 1):
            continue
        axis, positions = _axis(key, values)
        for name in PLOTTED_SCORES:
            lines = [line for s in _series(groups, keys, index) for line in _series_lines(s, name, index, positions)]
            if lines:
                title, meaning = SCORES[name]
                caption = f"{title} of the fine-tuned model: {meaning} Means over seeds with their standard deviation."
                plots.append(
                    Plot(f"{name}-{index}", f"{title} against {key}", caption, "percent", lines, axis, percent=True)
                )
    return plots


def _axis(key: str, values: Sequence[str]) -> tuple[Axis, dict[str, float]]:
    """Return the axis of a key, and value -> position.

    Numbers of similar size are at their value. Other numbers and words are at equal distances.
    """
    numbers = [sort_key(v)[0] for v in values]
    plain = all(v == f"{n:g}" for v, n in zip(values, numbers, strict=True))
    positive = [abs(n) for n in numbers if n]
    if plain and max(positive) / min(positive) <= 20:
        margin = (max(numbers) - min(numbers)) * 0.04
        positions = dict(zip(values, numbers, strict=True))
        return Axis(
            key, min(numbers) - margin, max(numbers) + margin, [(x, v) for v, x in positions.items()]
        ), positions
    positions = {v: float(i) for i, v in enumerate(values)}
    return Axis(key, -0.25, len(values) - 0.75, [(x, v) for v, x in positions.items()]), positions


def _series(groups: Sequence[SeedGroup], keys: Sequence[str], index: int) -> list[Series]:
    """Return settings by the values of all keys but the one at `index`, by method alone if those are too many."""
    for remaining in ([i for i in range(len(keys)) if i != index], [0]):
        by_values: dict[tuple[str, ...], list[SeedGroup]] = {}
        for group in groups:
            by_values.setdefault(tuple(group.values[i] for i in remaining), []).append(group)
        if len(by_values) <= MAX_SERIES:
            break
    shared = [i for i, k in enumerate(remaining) if k != 0 and len({values[i] for values in by_values}) == 1]
    series, used = [], set()
    for values, members in by_values.items():
        words = [
            v if remaining[i] == 0 else f"{keys[remaining[i]]} {v}" for i, v in enumerate(values) if i not in shared
        ]
        preferred = STYLES.get(members[0].values[0])
        style = preferred if preferred and preferred not in used else next(x for x in SPARE_STYLES if x not in used)
        used.add(style)
        series.append(Series(", ".join(words), style, members))
    return series


def _series_lines(series: Series, name: str, index: int, positions: dict[str, float]) -> list[Line]:
    """Return faint points of single runs, error bars, and the line of means; [] without scores."""
    colour, dash, marker = series.style
    numbers = [sort_key(group.values[index])[0] for group in series.groups]
    # Words have no order, and several groups may have the same value: then no line connects the means.
    unconnected = len({*numbers}) < len(numbers) or not any(map(math.isfinite, numbers))
    means: Points = []
    error_bars: Points = []
    single_runs: Points = []
    for group in series.groups:
        spread, x = group.spread(name), positions[group.values[index]]
        if spread is not None:
            means.append((x, spread.mean))
            deviation = spread.deviation or 0.0
            low, high = max(0.0, spread.mean - deviation), min(100.0, spread.mean + deviation)
            error_bars += [(x, low), (x, high), (x, math.nan)]
            single_runs += [(x, score.value) for r in group.runs if (score := r.score(name)) is not None]
    if not means:
        return []
    return [
        Line(single_runs, colour, dash="", marker=".", opacity=0.45),
        Line(error_bars, colour, width=1.2, opacity=0.6),
        Line(sorted(means), colour, series.label, "" if unconnected else dash, marker),
    ]


def _tradeoff_plot(groups: Sequence[SeedGroup], keys: Sequence[str]) -> list[Plot]:
    """Return the plot of harmful score against accuracy with a point per run, [] if no run has both scores."""
    lines = []
    for series in _series(groups, keys, 0) if len({g.values[0] for g in groups}) == 1 else _method_series(groups):
        colour, _, marker = series.style
        pairs = [(r.score("accuracy"), r.score("harmful_score")) for g in series.groups for r in g.runs]
        points = sorted((x.value, y.value) for x, y in pairs if x is not None and y is not None)
        lines += [Line(points, colour, series.label or series.groups[0].values[0], "", marker)] if points else []
    if not lines:
        return []
    caption = "One point per run. Safe and capable models are at the lower right."
    return [
        Plot(
            "tradeoff",
            "Harmful score against accuracy",
            caption,
            "harmful score, percent",
            lines,
            Axis("accuracy, percent", 0, 100),
            percent=True,
        )
    ]


def _method_series(groups: Sequence[SeedGroup]) -> list[Series]:
    return _series([SeedGroup(g.values[:1], g.runs) for g in groups], ["method"], -1)


def _curves(with_curves: Sequence[Run], keys: Sequence[str]) -> list[Curve]:
    """Return the curves of runs that have them.

    At first one run of each method is shown: the first seed at the middle one of the values.
    """
    by_method: dict[str, list[Run]] = {}
    for run in with_curves:
        by_method.setdefault(run.value("method"), []).append(run)
    shown = _initially_shown(by_method, keys)
    curves = []
    for i, run in enumerate(with_curves):
        method = run.value("method")
        members = by_method[method]
        colour = STYLES.get(method, SPARE_STYLES[list(by_method).index(method) % len(SPARE_STYLES)])[0]
        if len(by_method) == 1:
            colour = (GREEN, ORANGE, BLUE, VIOLET, AMBER, SLATE)[i % 6]
        solid = next((i for i, r in enumerate(members) if r in shown), 0)
        dash = ("-", "--", ":", "-.")[(members.index(run) - solid) % 4]
        label = ", ".join([method, *(f"{k} {run.value(k)}" for k in keys[1:]), f"seed {run.value('seed')}"])
        rows = [row for row in read_rows(run.folder / "curves.csv") if row["stage"] == "finetune"]
        curves.append(Curve(str(i), label, (colour, dash, ""), run in shown[:INITIAL_CURVES], rows))
    return curves


def _initially_shown(by_method: dict[str, list[Run]], keys: Sequence[str]) -> list[Run]:
    """Return one run of each method, or the first runs of a single method."""
    shown = []
    for members in by_method.values():
        first_seed = [r for r in members if r.value("seed") == members[0].value("seed")]
        first_seed.sort(key=lambda r: [sort_key(r.value(k)) for k in keys])
        shown += [first_seed[len(first_seed) // 2]] if len(by_method) > 1 else first_seed[:INITIAL_CURVES]
    return shown


def _overlays(curves: Sequence[Curve]) -> list[Figure]:
    """Return a figure per curve column, with a line for each run that has values."""
    columns = (
        ("user/loss", "Loss on the user's rows", "Smoothed.", "loss"),
        ("alignment/loss", "Loss on alignment rows", "Smoothed. Methods without alignment steps have no line.", "loss"),
        ("proximal/drift", "Drift", "Squared distance of the adapter from its anchor.", "squared distance"),
        ("eval/gradient_norm", "Joint gradient", "Norm of the gradient of both losses on fixed rows.", "norm"),
    )
    figures = []
    for column, title, caption, unit in columns:
        lines, last = [], 1.0
        for curve in curves:
            measured = read_points(curve.rows, column)
            if measured:
                last = max(last, measured[-1][0])
                points = smooth(measured) if column.endswith("loss") else measured
                lines.append(Line(points, curve.style[0], dash=curve.style[1], width=1.4, run=curve.id))
        if lines:
            name, axis = column.replace("/", "-"), Axis("optimizer step", 0, last, integer=True)
            figures.append(draw_figure(Plot(name, title, caption, unit, lines, axis)))
    return figures
