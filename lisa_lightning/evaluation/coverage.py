"""Check that the selected judges score the answers. Start at `refuse_unscored`."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.judge.base import Judge
from lisa_lightning.runtime.errors import UserError

log = logging.getLogger(__name__)


def kinds_scored(judge: Judge) -> tuple[str, ...]:
    """Return the kinds of answers that a judge scores: task answers for a win rate, otherwise safety prompts."""
    return ("task",) if judge.metric == "win_rate" else ("harmful", "harmless")


def refuse_unscored(
    judges: Mapping[str, Judge], answers: Sequence[Answer], source: str, task_has_rule: bool = False
) -> None:
    """Raise UserError if no selected judge scores any of the answers; log a warning if some have no score.

    Args:
        judges: the selected judges by name.
        answers: the answers; an empty sequence is never refused.
        source: origin of the answers for messages: key and value, or a file.
        task_has_rule: True if a rule of the task has scored the answers of kind task.

    Raises:
        UserError: if no judge is selected, or none of the selected judges scores an answer of these kinds.
    """
    if not answers:
        return
    if not judges:
        raise UserError("judge=[]: no judge is selected. Fix: select one, such as judge=embedded or judge=refusal")
    counts = Counter(answer.kind for answer in answers)
    scored = {kind for judge in judges.values() for kind in kinds_scored(judge)} | (
        {"task"} if task_has_rule else set()
    )
    unscored = {kind: count for kind, count in counts.items() if kind not in scored}
    if len(unscored) == len(counts):
        raise UserError(
            f"{source}: no selected judge scores any of these answers ({_format_counts(unscored)}); "
            f"{_describe_judges(judges)}. Fix: {_suggest_judges(unscored)}"
        )
    # The refusal judge is added for them (stages/judge.py); harmful answers need a judge of harm, too.
    unscored.pop("harmless", None)
    if unscored:
        log.warning(
            "%s: %d of %d answers are scored by no selected judge (%s); %s. Fix: %s",
            *(source, sum(unscored.values()), len(answers)),
            *(_format_counts(unscored), _describe_judges(judges), _suggest_judges(unscored)),
        )


def _format_counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _describe_judges(judges: Mapping[str, Judge]) -> str:
    """Return the kinds that each judge scores, as a sentence."""
    return ", ".join(f"judge={name} scores {' and '.join(kinds_scored(judge))}" for name, judge in judges.items())


def _suggest_judges(kinds: Iterable[str]) -> str:
    """Return a fix by which answers of these kinds get a score."""
    judges = ["judge=win_rate" if "task" in kinds else "", "judge=refusal" if {*kinds} - {"task"} else ""]
    return f"add {' and '.join(filter(None, judges))}, or give the answers a `kind` that a selected judge scores"
