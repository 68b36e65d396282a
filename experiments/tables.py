"""The table of a claim's own numbers, written into its README between two marks, so that it can't grow stale."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from lisa_lightning.cache import write_text
from lisa_lightning.report.sweep import in_order

Rows = Sequence[dict[str, str]]
START: Final = "<!-- ours -->\n"
END: Final = "<!-- end -->"
PAIR: Final = ("harmful_score", "accuracy")
DECIMALS: Final = {"time/finetune_s": 0, "memory/finetune_mib": 0, "train/steps": 0}


def fill(readme: Path, rows: Rows, keys: Sequence[str]) -> None:
    """Put the table of `rows` into the page, where it has the marks."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        table = crossed(rows, keys) if len(keys) == 2 else listed(rows, keys)
        write_text(readme, f"{before}{start}\n{table}\n\n{end}{after}")


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
