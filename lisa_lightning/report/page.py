"""report.html: one self-contained file with the numbers, the curves and sample answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def samples(answers: Sequence[dict[str, str]], each: int = 8) -> list[dict[str, str]]:
    """The first few answers of every stage and kind."""
    taken: dict[tuple[str, str], int] = {}
    chosen = []
    for answer in answers:
        group = (answer["stage"], answer["kind"])
        taken[group] = taken.get(group, 0) + 1
        if taken[group] <= each:
            chosen.append(answer)
    return chosen


def page(out: Path, metrics: dict[str, Any], curves: Any, answers: Any, choices: dict[str, str], config: str) -> None:
    (out / "report.html").write_text("x")
