"""Scores of a model's answers: `Score`, and the names under which metrics.json stores them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Metrics = dict[str, Any]
"""Content of metrics.json, or a part of it."""
METRICS: Final = (
    *("harmful_score", "harmful_score_at_k", "max_severity", "refusal_rate", "over_refusal", "win_rate"),
    *("accuracy", "lenient_accuracy", "cut_off", "partly_judged"),
)
"""Metrics with an interval. Those of a judge's categories are counts, named `category/NAME`."""

SET_METRIC: Final = re.compile(
    rf"((?P<judge>[^/]+)/)?set/(?P<prompt_set>[^/]+)/(?P<metric>({'|'.join(METRICS)})(_low|_high|_answers)?)"
)
"""Pattern of the name of a prompt set's score, or of its interval or number of answers, without the model."""


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of one model's answers: a percentage with its 95 % interval, or a count without one."""

    model: str
    """`aligned`, `final`, one of them with the name of a variant, or the name of a model in a user's file."""
    judge: str
    """Name of the judge; "" for a metric of the task."""
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    answers: int | None = None
    """Number of answers; None for a count."""
    prompt_set: str = ""
    """Name of the prompt set that the answers belong to; "" for the answers of all sets."""

    def entries(self, prefix: str = "") -> Metrics:
        """Return the entries of this score in metrics.json, with a prefix such as `final/embedded/`."""
        name = f"{prefix}set/{self.prompt_set}/{self.metric}" if self.prompt_set else f"{prefix}{self.metric}"
        if self.low is None:
            return {name: self.value}
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_answers": self.answers}


def model_of_variant(model: str, variant: str) -> str:
    """Return the name of a model in the scores of a variant of the evaluation, such as `final-prefill`."""
    return f"{model}-{variant}"


def model_without_variant(name: str) -> str:
    """Return the model of a name that `model_of_variant` has returned, or the name of a model itself."""
    return name.partition("-")[0]


def score_metrics(scores: Sequence[Score]) -> Metrics:
    """Return the entries of scores in metrics.json.

    A score of a judge has the name MODEL/JUDGE/METRIC. The first judge that computes a metric also sets MODEL/METRIC,
    which is the name of a score of the task, too. The METRIC of a prompt set is set/NAME/METRIC.

    Args:
        scores: scores in the order of their judges.
    """
    metrics: Metrics = {}
    # The first judge comes last, so that it sets the names without a judge.
    for judge in reversed(dict.fromkeys(score.judge for score in scores)):
        for model in dict.fromkeys(score.model for score in scores):
            of_judge = [score for score in scores if (score.judge, score.model) == (judge, model)]
            for prefix in (f"{model}/{judge}/", f"{model}/") if judge else (f"{model}/",):
                for score in of_judge:
                    metrics |= score.entries(prefix)
    return metrics


def read_scores(metrics: Mapping[str, Any]) -> list[Score]:
    """Return the scores in metrics.json, in the order of their judges; the inverse of `score_metrics`.

    Args:
        metrics: content of metrics.json, in which every name with a slash has a number.
    """
    scores = []
    for name, value in metrics.items():
        model, _, score_name = name.partition("/")
        judge, prompt_set, metric = _split_name(score_name)
        if metric in METRICS or metric.startswith("category/"):
            low, high, answers = (metrics.get(f"{name}_{end}") for end in ("low", "high", "answers"))
            scores.append(Score(model, judge, metric, value, low, high, answers, prompt_set))
    judged = {(score.model, score.prompt_set, score.metric) for score in scores if score.judge}
    # Names without a judge repeat those of the first judge.
    scores = [score for score in scores if score.judge or (score.model, score.prompt_set, score.metric) not in judged]
    order = {judge: index for index, judge in enumerate(metrics.get("judges", []))}
    return sorted(scores, key=lambda score: order.get(score.judge, len(order)))


def _split_name(name: str) -> tuple[str, str, str]:
    """Return judge, prompt set and metric of a score's name without its model; "" for a part that it lacks."""
    if of_set := SET_METRIC.fullmatch(name):
        return of_set["judge"] or "", of_set["prompt_set"], of_set["metric"]
    judge, _, metric = name.partition("/")
    return ("", "", name) if name in METRICS or judge == "category" else (judge, "", metric)


def find_score(scores: Sequence[Score], model: str, metric: str, judge: str = "", prompt_set: str = "") -> Score | None:
    """Return the score of a model; None if it was not measured.

    Args:
        scores: scores in the order of their judges.
        model: name of the model.
        metric: name of the metric.
        judge: name of the judge; "" for the first one.
        prompt_set: name of the prompt set; "" for the score of all sets.
    """
    key = (model, metric, prompt_set)
    matches = (s for s in scores if (s.model, s.metric, s.prompt_set) == key and judge in ("", s.judge))
    return next(matches, None)
