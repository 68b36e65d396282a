"""Verdicts of a run by prompt, of its judges and of its task's rule. Start at `read_verdicts`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.run_files import JUDGED, RESPONSES

if TYPE_CHECKING:
    from lisa_lightning.evaluation.evaluator import Answer
    from lisa_lightning.evaluation.judging import Judged


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdicts that a score counts over, in the order of the prompts."""

    prompts: tuple[str, ...]
    """Hash of each prompt. Runs with equal hashes answered the same prompts."""
    hits: tuple[bool, ...]
    """True for each answer that counts."""


VerdictKey = tuple[str, str, str]
"""Judge, model and metric."""


def read_verdicts(folder: Path) -> dict[VerdictKey, Verdicts]:
    """Return the verdicts of a run for each judge, model and metric.

    Args:
        folder: folder of the run. Its files are untrusted data.

    Returns:
        Verdicts of the judges in judged.jsonl, and those of the task's rule on task answers in responses.jsonl: judge
        "", metric `accuracy`. {} without these files.

    Raises:
        UserError: if a line of a file is damaged.
    """
    if not (folder / JUDGED).exists() and not (folder / RESPONSES).exists():
        return {}
    # These import torch, which takes longer than all else that a report needs.
    from lisa_lightning.evaluation.evaluator import read_answers
    from lisa_lightning.evaluation.judging import read_judged

    return _judges_verdicts(read_judged(folder / JUDGED)) | _task_verdicts(read_answers(folder / RESPONSES))


def _judges_verdicts(judged: Sequence["Judged"]) -> dict[VerdictKey, Verdicts]:
    from lisa_lightning.evaluation.metrics import metric_hits

    groups: dict[tuple[str, str], list[Judged]] = {}
    for line in sorted(judged, key=lambda line: line.index):
        groups.setdefault((line.judge, line.model), []).append(line)
    return {
        (judge, model, metric): Verdicts(
            tuple(short_hash(line.prompt) for line, _ in hits), tuple(hit for _, hit in hits)
        )
        for (judge, model), lines in groups.items()
        for metric, hits in metric_hits(lines).items()
    }


def _task_verdicts(answers: Sequence["Answer"]) -> dict[VerdictKey, Verdicts]:
    groups: dict[str, list[tuple[str, bool]]] = {}
    for answer in sorted(answers, key=lambda answer: answer.index):
        if answer.correct is not None:
            # Rows with equal texts are separate test rows.
            row = short_hash([answer.index, answer.prompt, answer.context, answer.target])
            groups.setdefault(answer.model, []).append((row, answer.correct))
    return {
        ("", model, "accuracy"): Verdicts(tuple(row for row, _ in verdicts), tuple(hit for _, hit in verdicts))
        for model, verdicts in groups.items()
    }


def split_prompts(verdicts: Verdicts) -> tuple[Verdicts, Verdicts]:
    """Return the verdicts on the first, third, fifth ... prompt, and those on the other prompts.

    A search of an attacker is led by the first half, and reported on the second one. Equal prompts count once, so that
    no prompt is in both halves.
    """
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(verdicts.prompts))}
    halves: tuple[list[tuple[str, bool]], ...] = ([], [])
    for prompt, hit in zip(verdicts.prompts, verdicts.hits, strict=True):
        halves[number[prompt] % 2].append((prompt, hit))
    first, second = (Verdicts(tuple(p for p, _ in half), tuple(h for _, h in half)) for half in halves)
    return first, second


def on_same_prompts(verdicts: Sequence[Verdicts]) -> bool:
    """Return whether all verdicts are on the same prompts in the same order."""
    return len({v.prompts for v in verdicts}) == 1
