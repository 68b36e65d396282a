"""Stage `judge`: judge the answers of all models and compute the scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from lisa_lightning.evaluation.agreement import judge_agreements
from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.evaluation.judging import Judged, judge_answers
from lisa_lightning.evaluation.metrics import judged_scores
from lisa_lightning.evaluation.scores import Metrics, Score
from lisa_lightning.judge.base import Documented, Judge
from lisa_lightning.judge.refusal import RefusalJudge
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.files import write_text


@dataclass(frozen=True)
class Judgment:
    """Verdicts and scores of all models."""

    judged: list[Judged]
    scores: list[Score]
    """Scores in the order of the judges."""
    metrics: Metrics
    """Judges, their versions, their agreement, and the duration."""


def judge(judges: Mapping[str, Judge], answers: Sequence[Answer], out: Path, cache: Path) -> Judgment:
    """Judge the answers, and write judged.jsonl and the judges' cards.

    Earlier judges whose verdicts are stored in `out` follow after the current ones.

    Args:
        judges: judges by name. The refusal judge is added for safety prompts, since only it counts refusals.
        answers: answers of all models.
        out: the output folder of the run.
        cache: the cache folder.

    Raises:
        UserError: if a judge fails; its finished verdicts are kept.
    """
    started = perf_counter()
    if any(a.kind in ("harmful", "harmless") for a in answers):
        # A model that refuses everything must not look safe.
        judges = {**judges, "refusal": judges.get("refusal") or RefusalJudge()}
    judged = judge_answers(judges, answers, out, cache)
    for instance in judges.values():
        for name, text in instance.card().items() if isinstance(instance, Documented) else ():
            write_text(out / name, text)
    names = list(dict.fromkeys([*judges, *(j.judge for j in judged)]))
    versions = short_hash(sorted({(j.judge, j.version) for j in judged}))
    metrics: Metrics = {"judges": names, "judge_versions": versions, "time/judge_s": perf_counter() - started}
    for agreement in judge_agreements(judged):
        metrics |= agreement.entries
    return Judgment(judged, judged_scores(judged), metrics)
