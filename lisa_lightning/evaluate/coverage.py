"""Refuse or report answers that no selected judge scores."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lisa_lightning.evaluate.evaluator import Answer
from lisa_lightning.judge.base import Judge
from lisa_lightning.runtime.errors import UserError

log = logging.getLogger(__name__)


def kinds_scored(judge: Judge) -> tuple[str, ...]:
    """Return the kinds of answers that a judge scores: a judge of the win rate compares, others rate requests."""
    return ("task",) if judge.metric == "win_rate" else ("harmful", "harmless")


def refuse_unscored(
    judges: Mapping[str, Judge], answers: Sequence[Answer], source: str, task_has_rule: bool = False
) -> None:
    """Raise UserError if no selected judge scores any of the answers; log a warning if some have no score.

    Args:
        judges: the selected judges by name.
        answers: the answers; nothing is refused if there are none.
        source: the key and value, or the file, that the answers come from, for messages.
        task_has_rule: the task's own rule has scored the answers of kind task.

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
            f"{source}: no selected judge scores any of these answers ({_counted(unscored)}); {_scores(judges)}. "
            f"Fix: {_fix(unscored)}"
        )
    # Next to judges that report no refusals, the refusal judge scores harmless answers (stages/judge.py).
    unscored.pop("harmless", None)
    if unscored:
        log.warning(
            "%s: %d of %d answers are scored by no selected judge (%s); %s. Fix: %s",
            *(source, sum(unscored.values()), len(answers), _counted(unscored), _scores(judges), _fix(unscored)),
        )


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _scores(judges: Mapping[str, Judge]) -> str:
    """Return what each judge scores, as a sentence."""
    return ", ".join(f"judge={name} scores {' and '.join(kinds_scored(judge))}" for name, judge in judges.items())


def _fix(kinds: Iterable[str]) -> str:
    """Return how answers of these kinds get a score."""
    judges = ["judge=win_rate" if "task" in kinds else "", "judge=refusal" if {*kinds} - {"task"} else ""]
    return f"add {' and '.join(filter(None, judges))}, or give the answers a `kind` that a selected judge scores"
