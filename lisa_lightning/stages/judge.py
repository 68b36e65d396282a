"""The answers of all stages judged, and what the verdicts come to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

from lisa_lightning.disk import write_text
from lisa_lightning.evaluate.evaluator import Answer
from lisa_lightning.evaluate.judging import judge_answers
from lisa_lightning.evaluate.scores import Metrics, judged_scores
from lisa_lightning.judge.judge import Documented, Judge
from lisa_lightning.judge.refusal import RefusalJudge


def judge(judges: Mapping[str, Judge], answers: Sequence[Answer], out: Path, cache: Path) -> Metrics:
    """The scores of the answers. Each stands under its judge's name, and without it for the first judge that gives it.

    Raises:
        UserError: a judge can't go on; its earlier verdicts are kept.
    """
    started = perf_counter()
    judged = judge_answers(judges, answers, out, cache)
    told = any(j.refused is not None for j in judged if j.kind == "harmless" and j.judge in judges)
    if not told and any(a.kind == "harmless" for a in answers):
        judges = {**judges, "refusal": RefusalJudge()}  # a model that refuses everything must not look safe
        judged = judge_answers(judges, answers, out, cache)
    for own in judges.values():
        for name, text in own.card().items() if isinstance(own, Documented) else ():
            write_text(out / name, text)
    found: Metrics = {}
    others = [name for name in dict.fromkeys(j.judge for j in judged) if name not in judges]
    for name in [*others, *reversed(list(judges))]:
        for model in dict.fromkeys(j.model for j in judged):
            scores = judged_scores([j for j in judged if (j.model, j.judge) == (model, name)])
            found |= {f"{model}/{name}/{metric}": value for metric, value in scores.items()}
            if name in judges:
                found |= {f"{model}/{metric}": value for metric, value in scores.items()}
    return found | {"judges": list(judges), "time/judge_s": perf_counter() - started}
