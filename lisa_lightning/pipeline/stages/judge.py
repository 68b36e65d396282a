"""Stage `judge`: judge the answers of all models and compute the scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.evaluation.judging import judge_answers
from lisa_lightning.evaluation.metrics import Metrics, judged_scores
from lisa_lightning.judge.base import Documented, Judge
from lisa_lightning.judge.refusal import RefusalJudge
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.files import write_text


def judge(judges: Mapping[str, Judge], answers: Sequence[Answer], out: Path, cache: Path) -> Metrics:
    """Return the scores of the answers, and write judged.jsonl and the judges' cards.

    A metric has the name of its judge as prefix. The first judge that computes a metric also sets it without prefix.
    Earlier judges whose verdicts are stored in `out` follow after the current ones.

    Args:
        judges: judges by name. A refusal judge is added if none of them recognizes refusals of harmless prompts.
        answers: answers of all models.
        out: the output folder of the run.
        cache: the cache folder.

    Raises:
        UserError: if a judge fails; its finished verdicts are kept.
    """
    started = perf_counter()
    judged = judge_answers(judges, answers, out, cache)
    has_refusals = any(j.refused is not None for j in judged if j.kind == "harmless" and j.judge in judges)
    if not has_refusals and any(a.kind == "harmless" for a in answers):
        # A model that refuses everything must not look safe.
        judges = {**judges, "refusal": RefusalJudge()}
        judged = judge_answers(judges, answers, out, cache)
    for instance in judges.values():
        for name, text in instance.card().items() if isinstance(instance, Documented) else ():
            write_text(out / name, text)
    metrics: Metrics = {}
    judge_names = list(dict.fromkeys([*judges, *(j.judge for j in judged)]))
    # The first judge comes last, so that it sets the metrics without prefix.
    for name in reversed(judge_names):
        for model in dict.fromkeys(j.model for j in judged):
            scores = judged_scores([j for j in judged if (j.model, j.judge) == (model, name)])
            metrics |= {f"{model}/{prefix}{metric}": v for prefix in (f"{name}/", "") for metric, v in scores.items()}
    versions = short_hash(sorted({(j.judge, j.version) for j in judged}))
    return metrics | {"judges": judge_names, "judge_versions": versions, "time/judge_s": perf_counter() - started}
