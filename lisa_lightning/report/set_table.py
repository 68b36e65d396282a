"""Tables of the scores of named prompt sets, with a row for each set. Start at `set_tables`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lisa_lightning.evaluation.scores import Score, find_score
from lisa_lightning.report.score_table import SCORES

TABLES: Final = (("harmful_score", "refusal_rate"), ("over_refusal",))
"""Scores of each table: those of harmful prompts, and those of harmless ones."""
ALL_SETS: Final = "all sets"


@dataclass(frozen=True)
class SetRow:
    """Scores of one prompt set, or of all."""

    title: str
    values: list[tuple[str, str]]
    """Value and 95 % interval for each head of the table."""
    answers: int
    """Number of answers of a model to the prompts of the set."""


@dataclass(frozen=True)
class SetTable:
    """Scores of all sets of harmful, or of harmless prompts. The first row is that of all sets."""

    heads: list[str]
    """Score and model of each column."""
    rows: list[SetRow]


def set_tables(scores: Sequence[Score], columns: Mapping[str, str]) -> list[SetTable]:
    """Return the tables of named prompt sets; [] without any.

    Args:
        scores: scores of all models, in the order of their judges. The first judge with a score counts.
        columns: model -> column head.
    """
    return [table for metrics in TABLES if (table := _table(scores, metrics, columns)) is not None]


def _table(scores: Sequence[Score], metrics: Sequence[str], columns: Mapping[str, str]) -> SetTable | None:
    """Return the table of these scores, None without a named set."""
    of_sets = [score for score in scores if score.metric in metrics and score.model in columns and score.prompt_set]
    if not of_sets:
        return None
    names = dict.fromkeys(score.prompt_set for score in of_sets)
    measured = {(score.metric, score.model) for score in of_sets}
    keys = [(metric, model) for metric in metrics for model in columns if (metric, model) in measured]
    heads = [f"{SCORES[metric][0]}, {columns[model]}" for metric, model in keys]
    return SetTable(heads, [_row(scores, keys, name) for name in ("", *names)])


def _row(scores: Sequence[Score], keys: Sequence[tuple[str, str]], prompt_set: str) -> SetRow:
    of_set = [find_score(scores, model, metric, prompt_set=prompt_set) for metric, model in keys]
    answers = max((score.answers or 0) for score in of_set if score is not None)
    return SetRow(prompt_set or ALL_SETS, [_cell(score) for score in of_set], answers)


def _cell(score: Score | None) -> tuple[str, str]:
    if score is None:
        return "–", ""
    has_interval = score.low is not None and score.high is not None
    return f"{score.value:.1f}", f"{score.low:.1f} to {score.high:.1f}" if has_interval else ""
