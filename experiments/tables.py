"""Numbers of a claim: merged into its CSV file run by run (`merge`), and as a table in its README (`fill`)."""

import csv
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from lisa_lightning.report.comparisons import Comparison, compared_scores
from lisa_lightning.report.sweep_runs import sort_key
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import write_text

Rows = list[dict[str, str]]
START: Final = "<!-- ours -->\n"
END: Final = "<!-- end -->"
SCORES: Final = ("harmful_score", "refusal_rate", "over_refusal", "accuracy")
CELL: Final = ("harmful_score", "refusal_rate", "accuracy")
"""Scores of a cell in a table of two keys."""
UNTRAINED: Final = "untrained.csv"
"""File in a claim's folder with the scores of the untrained model."""
BASELINES: Final = (
    *(f"aligned/{score}" for score in SCORES),
    *("baseline/majority_class", "baseline/bag_of_words"),
)
"""Columns that the table of baselines shows instead of the table of results."""
DECIMALS: Final = {"time/finetune_s": 0, "memory/finetune_mib": 0, "train/steps": 0}
"""Decimals of a column; all others have one."""


def read(path: Path) -> Rows:
    """Return the lines of a CSV file, [] if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merge(path: Path, new: Rows, keys: Sequence[str]) -> Rows:
    """Merge new lines into a CSV file, and return all its lines.

    Args:
        path: file to update. It may not exist yet.
        new: lines of runs. They replace the lines of the same setting and seed.
        keys: columns that identify a setting, without the seed.

    Raises:
        UserError: if two new lines have the same setting and seed.
    """
    keys = [*keys, "seed"]
    counts = Counter(tuple(row[k] for k in (*keys, "step") if k in row) for row in new)
    if repeated := sorted(setting for setting, count in counts.items() if count > 1):
        raise UserError(
            f"{path}: two runs of {', '.join(repeated[0])}, which differ in what this claim does not sweep. Fix: "
            "remove the folder of one below multirun/claims"
        )
    replaced = {tuple(row[k] for k in keys) for row in new}
    rows = new + [row for row in read(path) if tuple(row[k] for k in keys) not in replaced]
    rows.sort(key=lambda row: [sort_key(row[k]) for k in (*keys, "step") if k in row])
    write(path, rows)
    return rows


def write(path: Path, rows: Rows) -> None:
    """Write lines to a CSV file."""
    text = StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def fill(readme: Path, table: str) -> None:
    """Replace the text between START and END in a README; a file without both stays unchanged."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    head, start, remainder = text.partition(START)
    _, end, tail = remainder.partition(END)
    if start and end:
        write_text(readme, f"{head}{start}\n{table}\n\n{end}{tail}")


def format_table(rows: Rows, keys: Sequence[str]) -> str:
    """Return a Markdown table: crossed for two keys, else with one line per setting."""
    return cross_table(rows, keys) if len(keys) == 2 else list_table(rows, keys)


def cross_table(rows: Rows, keys: Sequence[str]) -> str:
    """Return a Markdown table of harmful score / refusal rate / accuracy.

    Values of the first key are lines, those of the second are columns.
    """
    line_values, column_values = (sorted({row[k] for row in rows}, key=sort_key) for k in keys)
    seeds = {c: sorted({row["seed"] for row in rows if row[keys[1]] == c}) for c in column_values}
    shared = [seed for seed in seeds[column_values[0]] if all(seed in s for s in seeds.values())]
    more = {c: [seed for seed in s if seed not in shared] for c, s in seeds.items()}
    further = "".join(f", at {keys[1]} {c} also {' and '.join(s)}" for c, s in more.items() if s)
    lines = [
        f"| {keys[0]} \\ {keys[1]} |" + "".join(f" {v} |" for v in column_values),
        "|---|" + "---|" * len(column_values),
    ]
    for value in line_values:
        cells = [[r for r in rows if (r[keys[0]], r[keys[1]]) == (value, column)] for column in column_values]
        lines.append(f"| {value} |" + "".join(f" {' / '.join(spread(c, n) for n in CELL)} |" for c in cells))
    note = f"Harmful score / refusal rate / accuracy in percent, {_seeds(shared, further)}."
    return "\n".join(lines) + f"\n\n{note}"


def list_table(rows: Rows, keys: Sequence[str]) -> str:
    """Return a Markdown table with a line for each setting and a column for each measured value."""
    hidden = {*keys, "seed", *BASELINES}
    names = [n for n in rows[0] if n not in hidden and not n.endswith(("_low", "_high", "_answers"))]
    seeds = sorted({row["seed"] for row in rows})
    lines = ["|" + "".join(f" {n} |" for n in (*keys, *names)), "|" + "---|" * (len(keys) + len(names))]
    for values in sorted({tuple(row[k] for k in keys) for row in rows}, key=lambda v: [sort_key(x) for x in v]):
        setting_rows = [row for row in rows if tuple(row[k] for k in keys) == values]
        lines.append("|" + "".join(f" {cell} |" for cell in (*values, *(spread(setting_rows, n) for n in names))))
    return "\n".join(lines) + f"\n\n{_seeds(seeds).capitalize()}."


def baseline_table(rows: Rows, untrained: Rows) -> str:
    """Return a Markdown table of the baselines, "" if none is stored.

    Args:
        rows: lines of results.csv. A column `task` separates them.
        untrained: lines of untrained.csv.
    """
    tasks = sorted({row.get("task", "") for row in rows})
    lines = []
    for task in tasks:
        of_task = [row for row in rows if row.get("task", "") == task]
        untrained_of_task = [row for row in untrained if task in ("", row["task"])]
        cells = {
            "majority class": ["–"] * 3 + [spread(of_task, "baseline/majority_class")],
            "bag of words": ["–"] * 3 + [spread(of_task, "baseline/bag_of_words")],
            "untrained model": [spread(untrained_of_task, score) for score in SCORES],
            "aligned model": [spread(of_task, f"aligned/{score}") for score in SCORES],
        }
        lines += [
            f"| {name}{', ' if task else ''}{task} | {' | '.join(values)} |"
            for name, values in cells.items()
            if {*values} != {"–"}
        ]
    if not lines:
        return ""
    heads = ("baseline", *(score.replace("_", " ").replace("over ", "over-") for score in SCORES))
    head = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    note = "Baselines in percent: mean ± standard deviation over the runs of the table."
    return "\n".join([*head, *lines]) + f"\n\n{note}"


def comparison_table(comparisons: Sequence[Comparison], primary: Sequence[str]) -> str:
    """Return a Markdown table of paired differences, one line per comparison.

    Args:
        comparisons: at least one comparison.
        primary: setting and baseline of the primary comparison, whose line is bold; empty without one.
    """
    names = compared_scores(comparisons)
    heads = ("setting", "baseline", "pairs", *(name.replace("_", " ") for name in names))
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for c in comparisons:
        scores = (str(c.scores[name]) if name in c.scores else "–" for name in names)
        cells = [c.setting, c.baseline, str(c.runs), *scores]
        if [c.setting, c.baseline] == [*primary]:
            cells = [f"**{cell}**" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "Paired differences in percentage points, setting minus baseline, with 95 % intervals over seeds and prompts."
    )
    return "\n".join([note, "", *lines])


def spread(rows: Rows, name: str) -> str:
    """Return mean ± standard deviation of a column over seeds, a dash without values."""
    values = [float(row[name]) for row in rows if row.get(name)]
    if not values:
        return "–"
    decimals = DECIMALS.get(name, 1)
    return f"{fmean(values):.{decimals}f}" + (f" ± {stdev(values):.{decimals}f}" if len(values) > 1 else "")


def _seeds(seeds: Sequence[str], further: str = "") -> str:
    if len(seeds) == 1 and not further:
        return f"seed {seeds[0]} alone"
    return f"seeds {', '.join(seeds)}{further}: mean ± standard deviation"
