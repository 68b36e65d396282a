"""Results of lm-evaluation-harness, and the names under which metrics.json stores them. Start at `utility_scores`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lisa_lightning.evaluation.scores import Metrics

PREFIX: Final = "lm_eval"
"""Second part of the metrics' names, which begin with a model."""
STDERR: Final = "_stderr"


@dataclass(frozen=True, slots=True)
class UtilityScore:
    """A metric of one model on one task, as the harness reports it."""

    model: str
    """`aligned` or `final`."""
    task: str
    metric: str
    """Name of the metric, followed by that of the answers' filter if the task has one."""
    value: float
    stderr: float | None = None
    """Standard error; None if the harness has none."""

    @property
    def name(self) -> tuple[str, str]:
        """Task and metric."""
        return self.task, self.metric

    @property
    def entries(self) -> Metrics:
        """The entries of this score in metrics.json."""
        name = f"{self.model}/{PREFIX}/{self.task}/{self.metric}"
        return {name: self.value} | ({} if self.stderr is None else {f"{name}{STDERR}": self.stderr})


def utility_scores(model: str, task: str, results: Mapping[str, Mapping[str, Any]]) -> list[UtilityScore]:
    """Return the scores of a task, or of all tasks with a tag.

    Args:
        model: name of the model.
        task: name of the task, the group or the tag.
        results: results of the harness by name. A group's are those of all its tasks together.
    """
    names = [task] if _values(results.get(task, {})) else list(results)
    scores = []
    for name in names:
        values = _values(results[name])
        for (metric, answer_filter), value in values.items():
            if metric.endswith(STDERR):
                continue
            title = metric if answer_filter == "none" else f"{metric}_{answer_filter}"
            stderr = values.get((f"{metric}{STDERR}", answer_filter))
            scores.append(UtilityScore(model, _without_slash(name), _without_slash(title), value, stderr))
    return scores


def _values(result: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Return metric and filter -> number, of the entries METRIC,FILTER that have one."""
    return {
        (metric, answer_filter): float(value)
        for metric, comma, answer_filter in ((*key.partition(","),) for key in result)
        if comma and _is_number(value := result[f"{metric},{answer_filter}"])
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _without_slash(name: str) -> str:
    return name.replace("/", "_")


def read_utility(metrics: Mapping[str, Any]) -> list[UtilityScore]:
    """Return the scores of the harness in metrics.json, in its order.

    Args:
        metrics: content of metrics.json.
    """
    scores = []
    for name, value in metrics.items():
        model, *parts = name.split("/")
        if len(parts) != 3 or parts[0] != PREFIX or name.removesuffix(STDERR) in metrics.keys() - {name}:
            continue
        scores.append(UtilityScore(model, parts[1], parts[2], value, metrics.get(f"{name}{STDERR}")))
    return scores


def find_utility(scores: Sequence[UtilityScore], model: str, name: tuple[str, str]) -> UtilityScore | None:
    """Return the score of a model; None if it was not measured.

    Args:
        scores: scores of the harness.
        model: name of the model.
        name: task and metric.
    """
    return next((score for score in scores if (score.model, score.name) == (model, name)), None)
