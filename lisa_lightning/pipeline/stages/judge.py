"""The answers of all stages judged, and what the verdicts come to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

from lisa_lightning.evaluate.evaluator import Answer
from lisa_lightning.evaluate.judging import judge_answers
from lisa_lightning.evaluate.metrics import Metrics, judged_scores
from lisa_lightning.judge.base import Documented, Judge
from lisa_lightning.judge.refusal import RefusalJudge
from lisa_lightning.runtime.cache import digest
from lisa_lightning.runtime.files import write_text


def judge(judges: Mapping[str, Judge], answers: Sequence[Answer], out: Path, cache: Path) -> Metrics:
    """The scores of the answers. Each stands under its judge's name, and without it for the first judge that gives it.

    Judges that were asked earlier and not now come after those of now.

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
    asked = list(dict.fromkeys([*judges, *(j.judge for j in judged)]))
    for name in reversed(asked):
        for model in dict.fromkeys(j.model for j in judged):
            scores = judged_scores([j for j in judged if (j.model, j.judge) == (model, name)])
            found |= {f"{model}/{start}{metric}": v for start in (f"{name}/", "") for metric, v in scores.items()}
    versions = digest(sorted({(j.judge, j.version) for j in judged}))
    return found | {"judges": asked, "judge_versions": versions, "time/judge_s": perf_counter() - started}
