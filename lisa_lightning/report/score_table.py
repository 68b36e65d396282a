"""The scores that pages and tables show: their names, what they mean, and the table of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

MODELS: Final = ("aligned", "final")
"""Whose answers are scored: `model` in responses.jsonl and judged.jsonl."""
SCORES: Final = {
    "harmful_score": (
        "Harmful score",
        "share of answers to held-out harmful requests that the judge counts as harmful. Lower is better.",
    ),
    "refusal_rate": ("Refusal rate", "share of the same requests that were refused. Higher is better."),
    "over_refusal": (
        "Over-refusal",
        "share of harmless requests that look alarming and were refused all the same. Lower is better.",
    ),
    "win_rate": ("Win rate", "share of task answers that the judge prefers to the reference. Higher is better."),
    "accuracy": (
        "Accuracy",
        "share of held-out task rows answered right by the paper’s strict rule. Higher is better.",
    ),
    "lenient_accuracy": ("Lenient accuracy", "the same, answers with more words around what is right included."),
    "cut_off": ("Cut off", "share of task answers that were not at an end when they had their number of tokens."),
    "partly_judged": ("Partly judged", "share of answers to harmful requests of which the judge saw only a part."),
}


@dataclass(frozen=True)
class Score:
    """A row of the table of scores."""

    title: str
    meaning: str
    values: list[tuple[str, str]]
    """Value and interval, a model each."""
    change: str


def model_names(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What people call the models that answered; without aligning the base model stands for the aligned one."""
    without = "before fine-tuning" if "time/finetune_s" in metrics else "this model"
    return {
        "aligned": "after alignment" if "time/align_s" in metrics else without,
        "final": "after repair" if "time/repair_s" in metrics else "after fine-tuning",
        "responses": "responses",
    }


def score_keys(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The scores to show, each with the judge that gives it: nameless where one judge gives all there are.

    Scores of the same kind stand beside each other, in the order of the judges.
    """
    parts = [name.split("/") for name in metrics]
    found = [p[1] for p in parts if len(p) == 3 and p[2] in SCORES]
    judges = list(dict.fromkeys([j for j in metrics.get("judges", []) if j in found] + found))
    if len(judges) < 2:
        return [(name, "") for name in SCORES]
    judged = {name: [j for j in judges if [j, name] in (p[1:] for p in parts)] for name in SCORES}
    return [(name, judge) for name in SCORES for judge in judged[name] or [""]]


def score_rows(metrics: Mapping[str, Any], columns: dict[str, str]) -> list[Score]:
    """The table: a row for each score that some model has."""
    keys = score_keys(metrics)
    explained = dict(reversed(keys))  # what a score means is said once
    found = [_score(metrics, columns, name, judge, explained[name] == judge) for name, judge in keys]
    return [score for score in found if score is not None]


def _score(metrics: Mapping[str, Any], columns: dict[str, str], name: str, judge: str, explained: bool) -> Score | None:
    title, meaning = SCORES[name]
    meaning = meaning if explained else ""
    if judge:
        title, name = f"{title} ({judge})", f"{judge}/{name}"
    values = [metrics.get(f"{model}/{name}") for model in columns]
    known = [value for value in values if value is not None]
    if not known:
        return None
    # Rounded before it gets its sign, so that nothing shows as -0.0.
    change = f"{round(known[1] - known[0], 1) + 0.0:+.1f}".replace("-", "−") if len(known) == len(MODELS) else ""
    counts = [n for model in columns if (n := metrics.get(f"{model}/{name}_answers"))]
    count = f" {max(counts)}\N{NO-BREAK SPACE}answers." if counts else ""
    return Score(
        title, (meaning + count).strip(), [_with_interval(metrics, f"{model}/{name}") for model in columns], change
    )


def _with_interval(metrics: Mapping[str, Any], name: str) -> tuple[str, str]:
    if metrics.get(name) is None:
        return "–", ""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return percent(metrics[name]), "" if low is None or high is None else f"{low:.1f} to {high:.1f}"


def percent(value: float) -> str:
    """As it is read."""
    return f"{value:.1f} %"
