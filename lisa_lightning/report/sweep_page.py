"""The page of a sweep: a table over seeds, scores against what was swept and each other, curves laid together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lisa_lightning.logger.curves import read_rows
from lisa_lightning.report.run_page import rendered
from lisa_lightning.report.run_plots import points, smooth
from lisa_lightning.report.score_table import SCORES
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
    figure,
)
from lisa_lightning.report.sweep_runs import (
    GROUPS,
    Run,
    SeedGroup,
    Spread,
    causes,
    cell,
    in_order,
    mean_and_deviation,
    relative,
    scores_shown,
    seed_groups,
    unlike,
)

LOOKS: Final = {
    "sft": (ORANGE, "--", "o"),
    "bso": (BLUE, "-.", "s"),
    "lisa": (GREEN, "-", "^"),
    "vlguard": (VIOLET, "--", "D"),
    "proximal": (AMBER, ":", "v"),
}
"""How the methods of every picture look; others, and settings of the same method, take what is left."""
OTHERS: Final = tuple(
    (c, d, m) for d, m in (("-", "P"), ("--", "X"), (":", "o")) for c in (SLATE, BLUE, ORANGE, VIOLET)
)
MOST_SERIES: Final = 8
MOST_CURVES: Final = 90  # runs whose curves the page holds
CHOSEN: Final = 6  # runs whose curves are shown at first


@dataclass(frozen=True)
class Series:
    """Settings that one line of a picture joins."""

    label: str
    look: tuple[str, str, str]
    groups: list[SeedGroup]


def sweep_page(runs: Sequence[Run], keys: Sequence[str], rest: Sequence[str], out: Path) -> str:
    """The whole page as HTML, with everything in it.

    Args:
        runs: finished or not, in any order.
        keys, rest: in what they differ (`report.sweep.swept`).
        out: where the page will lie, for its links to the runs.
    """
    groups = seed_groups(runs, keys)
    names = scores_shown(groups)
    curves = _curves(runs, keys)
    content = {
        "heading": out.absolute().name,
        "facts": _shared(runs, keys),
        "counts": {status: sum(r.status == status for r in runs) for status in ("finished", "unfinished", "failed")},
        "codes": len({r.metrics.get("code") for r in runs if r.status == "finished"}),
        "unlike": ", ".join(unlike(groups)),
        "keys": keys,
        "rest": rest,
        "scores": [SCORES[name][0] for name in names],
        "rows": [
            (
                group.values,
                len(group.runs),
                [(cell(s, mean_and_deviation), cell(s, _interval)) for s in (group.spread(name) for name in names)],
                _mean(group, "time/finetune_s", 60),
                _mean(group, "memory/finetune_mib", 1024),
            )
            for group in groups
        ],
        "figures": [figure(plot) for plot in [*score_plots(groups, keys), *_plane(groups, keys)]],
        "curves": curves,
        "overlays": _overlays(curves),
        "causes": {cause: [relative(r.folder, out) for r in failed] for cause, failed in causes(runs).items()},
        "runs": [(relative(r.folder, out), r.status, r.value("seed"), [r.value(k) for k in keys]) for r in runs],
    }
    return rendered("sweep.html.j2", content)


def _shared(runs: Sequence[Run], keys: Sequence[str]) -> list[tuple[str, str]]:
    """What all runs have alike, of what a reader asks first."""
    of_tuning = ("harmful_ratio", "data.n", "optim.steps") if all(run.own.tuned for run in runs) else ()
    found = [("experiment", {run.choices.get("experiment", "?") for run in runs})] if of_tuning else []
    found += [(name, {run.value(name) for run in runs}) for name in (*GROUPS, *of_tuning) if name not in keys]
    nothing = {"?", "–", "null", "None", "none"}
    return [(name, value) for name, values in found if len(values) == 1 for value in values - nothing]


def _interval(spread: Spread) -> str:
    return f"{spread.low:.1f} to {spread.high:.1f}"


def _mean(group: SeedGroup, name: str, unit: float) -> str:
    found = [r.metrics[name] for r in group.runs if name in r.metrics]
    return f"{sum(found) / len(found) / unit:.1f}" if found else "–"


def score_plots(groups: Sequence[SeedGroup], keys: Sequence[str]) -> list[Plot]:
    """Harmful score and accuracy against each swept key, a line for each method and setting of the other keys."""
    found = []
    for place, key in enumerate(keys):
        values = sorted({g.values[place] for g in groups}, key=in_order)
        if len(values) < 2 or (key == "method" and len(keys) > 1):
            continue
        axis, where = _axis(key, values)
        for name in ("harmful_score", "accuracy"):
            lines = [line for s in _series(groups, keys, place) for line in _course(s, name, place, where)]
            if lines:
                title, meaning = SCORES[name]
                caption = f"{title} of the fine-tuned model: {meaning} Means over seeds with their standard deviation."
                found.append(
                    Plot(f"{name}-{place}", f"{title} against {key}", caption, "percent", lines, axis, percent=True)
                )
    return found


def _axis(key: str, values: Sequence[str]) -> tuple[Axis, dict[str, float]]:
    """Numbers of like size stand where they are, others and words side by side."""
    numbers = [in_order(v)[0] for v in values]
    plain = all(v == f"{n:g}" for v, n in zip(values, numbers, strict=True))
    positive = [abs(n) for n in numbers if n]
    if plain and max(positive) / min(positive) <= 20:
        margin = (max(numbers) - min(numbers)) * 0.04
        where = dict(zip(values, numbers, strict=True))
        return Axis(key, min(numbers) - margin, max(numbers) + margin, [(x, v) for v, x in where.items()]), where
    where = {v: float(i) for i, v in enumerate(values)}
    return Axis(key, -0.25, len(values) - 0.75, [(x, v) for v, x in where.items()]), where


def _series(groups: Sequence[SeedGroup], keys: Sequence[str], place: int) -> list[Series]:
    """Settings by all that differs beside the key at `place`, or by method alone where that would be too many."""
    for others in ([i for i in range(len(keys)) if i != place], [0]):
        found: dict[tuple[str, ...], list[SeedGroup]] = {}
        for group in groups:
            found.setdefault(tuple(group.values[i] for i in others), []).append(group)
        if len(found) <= MOST_SERIES:
            break
    shared = [i for i, k in enumerate(others) if k != 0 and len({values[i] for values in found}) == 1]
    series, used = [], set()
    for values, members in found.items():
        parts = [v if others[i] == 0 else f"{keys[others[i]]} {v}" for i, v in enumerate(values) if i not in shared]
        wanted = LOOKS.get(members[0].values[0])
        look = wanted if wanted and wanted not in used else next(x for x in OTHERS if x not in used)
        used.add(look)
        series.append(Series(", ".join(parts), look, members))
    return series


def _course(series: Series, name: str, place: int, where: dict[str, float]) -> list[Line]:
    """Means as a line, deviations upright, single runs faint."""
    colour, dash, marker = series.look
    numbers = [in_order(group.values[place])[0] for group in series.groups]
    apart = len({*numbers}) < len(numbers) or not any(map(math.isfinite, numbers))  # no line from one to the next
    means: Points = []
    upright: Points = []
    single: Points = []
    for group in series.groups:
        spread, x = group.spread(name), where[group.values[place]]
        if spread is not None:
            means.append((x, spread.mean))
            off = spread.deviation or 0.0
            upright += [(x, max(0.0, spread.mean - off)), (x, min(100.0, spread.mean + off)), (x, math.nan)]
            single += [(x, y) for r in group.runs if (y := r.score(name)) is not None]
    if not means:
        return []
    return [
        Line(single, colour, dash="", marker=".", opacity=0.45),
        Line(upright, colour, width=1.2, opacity=0.6),
        Line(sorted(means), colour, series.label, "" if apart else dash, marker),
    ]


def _plane(groups: Sequence[SeedGroup], keys: Sequence[str]) -> list[Plot]:
    """Every run a point: safe and able is below and to the right."""
    lines = []
    for series in _series(groups, keys, 0) if len({g.values[0] for g in groups}) == 1 else _methods(groups):
        colour, _, marker = series.look
        found = [(r.score("accuracy"), r.score("harmful_score")) for g in series.groups for r in g.runs]
        dots = sorted((x, y) for x, y in found if x is not None and y is not None)
        lines += [Line(dots, colour, series.label or series.groups[0].values[0], "", marker)] if dots else []
    if not lines:
        return []
    caption = "Every run is a point. Safe and able is below, to the right."
    return [
        Plot(
            "plane",
            "Harmful score against accuracy",
            caption,
            "harmful score, percent",
            lines,
            Axis("accuracy, percent", 0, 100),
            percent=True,
        )
    ]


def _methods(groups: Sequence[SeedGroup]) -> list[Series]:
    return _series([SeedGroup(g.values[:1], g.runs) for g in groups], ["method"], -1)


@dataclass(frozen=True)
class Curve:
    """A run whose curves can be laid over others'."""

    id: str
    label: str
    look: tuple[str, str, str]
    shown: bool
    rows: list[dict[str, str]]


def _curves(runs: Sequence[Run], keys: Sequence[str]) -> list[Curve]:
    """The runs that have curves; shown at first is one run of each method, the first seed at a value in the middle."""
    there = [r for r in runs if r.status != "failed" and (r.folder / "curves.csv").exists()][:MOST_CURVES]
    by_method: dict[str, list[Run]] = {}
    for run in there:
        by_method.setdefault(run.value("method"), []).append(run)
    chosen = []
    for members in by_method.values():
        first = [r for r in members if r.value("seed") == members[0].value("seed")]
        first.sort(key=lambda r: [in_order(r.value(k)) for k in keys])
        chosen += [first[len(first) // 2]] if len(by_method) > 1 else first[:CHOSEN]
    found = []
    for i, run in enumerate(there):
        members = by_method[run.value("method")]
        colour = LOOKS.get(run.value("method"), OTHERS[list(by_method).index(run.value("method")) % len(OTHERS)])[0]
        if len(by_method) == 1:
            colour = (GREEN, ORANGE, BLUE, VIOLET, AMBER, SLATE)[i % 6]
        solid = next((i for i, r in enumerate(members) if r in chosen), 0)
        dash = ("-", "--", ":", "-.")[(members.index(run) - solid) % 4]
        label = ", ".join(
            [run.value("method"), *(f"{k} {run.value(k)}" for k in keys[1:]), f"seed {run.value('seed')}"]
        )
        rows = [row for row in read_rows(run.folder / "curves.csv") if row["stage"] == "finetune"]
        found.append(Curve(str(i), label, (colour, dash, ""), run in chosen[:CHOSEN], rows))
    return found


def _overlays(curves: Sequence[Curve]) -> list[Figure]:
    plots = (
        ("user/loss", "Loss on the user's rows", "Smoothed.", "loss"),
        ("alignment/loss", "Loss on alignment rows", "Smoothed; methods that train on none have no line.", "loss"),
        ("proximal/drift", "Drift", "Squared distance of the adapter from its anchor.", "squared distance"),
        ("eval/gradient_norm", "Joint gradient", "Norm of the gradient of both losses on fixed rows.", "norm"),
    )
    found = []
    for column, title, caption, unit in plots:
        lines, last = [], 1.0
        for curve in curves:
            measured = points(curve.rows, column)
            if measured:
                last = max(last, measured[-1][0])
                line = smooth(measured) if column.endswith("loss") else measured
                lines.append(Line(line, curve.look[0], dash=curve.look[1], width=1.4, run=curve.id))
        if lines:
            name = column.replace("/", "-")
            found.append(figure(Plot(name, title, caption, unit, lines, Axis("optimizer step", 0, last, whole=True))))
    return found
