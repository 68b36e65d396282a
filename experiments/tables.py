"""A claim's own numbers: merged into its file run by run, and as a table between two marks of its README."""

import csv
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from lisa_lightning.report.sweep_runs import in_order
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import write_text

Rows = list[dict[str, str]]
START: Final = "<!-- ours -->\n"
END: Final = "<!-- end -->"
SCORES: Final = ("harmful_score", "refusal_rate", "over_refusal", "accuracy")
PAIR: Final = ("harmful_score", "accuracy")
DECIMALS: Final = {"time/finetune_s": 0, "memory/finetune_mib": 0, "train/steps": 0}


def read(path: Path) -> Rows:
    """The lines of a file; none where it isn't there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merged(path: Path, new: Rows, keys: Sequence[str]) -> Rows:
    """The lines of a file and the new ones, in place of those of the same setting and seed; written back.

    Raises:
        UserError: two of the new ones have the same setting and seed.
    """
    keys = [*keys, "seed"]
    counts = Counter(tuple(row[k] for k in (*keys, "step") if k in row) for row in new)
    if twice := sorted(setting for setting, count in counts.items() if count > 1):
        raise UserError(
            f"{path}: two runs of {', '.join(twice[0])}, which differ in what this claim does not sweep; remove the "
            "folder of one below multirun/claims"
        )
    replaced = {tuple(row[k] for k in keys) for row in new}
    rows = new + [row for row in read(path) if tuple(row[k] for k in keys) not in replaced]
    rows.sort(key=lambda row: [in_order(row[k]) for k in (*keys, "step") if k in row])
    text = StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    return rows


def fill(readme: Path, table: str) -> None:
    """Put the table into the page, where it has the marks."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        write_text(readme, f"{before}{start}\n{table}\n\n{end}{after}")


def by_key(rows: Rows, keys: Sequence[str]) -> str:
    """A crossed table of two keys, else a list."""
    return crossed(rows, keys) if len(keys) == 2 else listed(rows, keys)


def crossed(rows: Rows, keys: Sequence[str]) -> str:
    """A line for each value of the first key, a column for each of the second: harmful score / accuracy."""
    first, second = (sorted({row[k] for row in rows}, key=in_order) for k in keys)
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"| {keys[0]} \\ {keys[1]} |" + "".join(f" {v} |" for v in second), "|---|" + "---|" * len(second)]
    for value in first:
        cells = [[r for r in rows if (r[keys[0]], r[keys[1]]) == (value, other)] for other in second]
        lines.append(f"| {value} |" + "".join(f" {' / '.join(spread(c, n) for n in PAIR)} |" for c in cells))
    return "\n".join(lines) + f"\n\nHarmful score / accuracy in percent, {_seeds(seeds)}."


def listed(rows: Rows, keys: Sequence[str]) -> str:
    """A line for each setting, a column for each thing that was measured."""
    names = [n for n in rows[0] if n not in (*keys, "seed") and not n.endswith(("_low", "_high", "_answers"))]
    seeds = sorted({row["seed"] for row in rows})
    lines = ["|" + "".join(f" {n} |" for n in (*keys, *names)), "|" + "---|" * (len(keys) + len(names))]
    for values in sorted({tuple(row[k] for k in keys) for row in rows}, key=lambda v: [in_order(x) for x in v]):
        own = [row for row in rows if tuple(row[k] for k in keys) == values]
        lines.append("|" + "".join(f" {cell} |" for cell in (*values, *(spread(own, n) for n in names))))
    return "\n".join(lines) + f"\n\n{_seeds(seeds).capitalize()}."


def spread(rows: Rows, name: str) -> str:
    """Mean and standard deviation over seeds."""
    found = [float(row[name]) for row in rows if row.get(name)]
    if not found:
        return "–"
    places = DECIMALS.get(name, 1)
    return f"{fmean(found):.{places}f}" + (f" ± {stdev(found):.{places}f}" if len(found) > 1 else "")


def _seeds(seeds: Sequence[str]) -> str:
    return f"seeds {', '.join(seeds)}: mean ± standard deviation" if len(seeds) > 1 else f"seed {seeds[0]} alone"
