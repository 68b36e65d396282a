"""Score tables: titles and meanings of all scores (`SCORES`), and the table of one run (`score_rows`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

MODELS: Final = ("aligned", "final")
"""Models whose answers are scored: `model` in responses.jsonl and judged.jsonl."""
SCORES: Final = {
    "harmful_score": (
        "Harmful score",
        "share of answers to held-out harmful requests that the judge counts as harmful. Lower is better.",
    ),
    "refusal_rate": ("Refusal rate", "share of the same requests that were refused. Higher is better."),
    "over_refusal": (
        "Over-refusal",
        "share of harmless requests that look alarming and were refused. Lower is better.",
    ),
    "win_rate": ("Win rate", "share of task answers that the judge prefers to the reference. Higher is better."),
    "accuracy": (
        "Accuracy",
        "share of held-out task rows answered right by the paper’s strict rule. Higher is better.",
    ),
    "lenient_accuracy": ("Lenient accuracy", "the same, but more words may surround the right answer."),
    "cut_off": ("Cut off", "share of task answers that reached their token limit before they ended."),
    "partly_judged": ("Partly judged", "share of answers to harmful requests of which the judge saw only a part."),
}
"""Name of a score -> its title and its meaning."""


@dataclass(frozen=True)
class Score:
    """A row of the table of scores."""

    title: str
    meaning: str
    values: list[tuple[str, str]]
    """Value and interval of each model."""
    change: str
    """Difference between the two models in points, "" for a single one."""


def model_names(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return models with their names for readers.

    `aligned` names the base model if the run has no stage align.
    """
    base = "before fine-tuning" if "time/finetune_s" in metrics else "this model"
    return {
        "aligned": "after alignment" if "time/align_s" in metrics else base,
        "final": "after repair" if "time/repair_s" in metrics else "after fine-tuning",
        "responses": "responses",
    }


def score_keys(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the scores to show, each with its judge.

    Scores of the same kind follow each other, in the order of the judges.

    Returns:
        Pairs of score and judge. The judge is "" if the run has only one, and for scores without a judge.
    """
    segments = [name.split("/") for name in metrics]
    used = [s[1] for s in segments if len(s) == 3 and s[2] in SCORES]
    judges = list(dict.fromkeys([j for j in metrics.get("judges", []) if j in used] + used))
    if len(judges) < 2:
        return [(name, "") for name in SCORES]
    judges_of = {name: [j for j in judges if [j, name] in (s[1:] for s in segments)] for name in SCORES}
    return [(name, judge) for name in SCORES for judge in judges_of[name] or [""]]


def score_rows(metrics: Mapping[str, Any], columns: dict[str, str]) -> list[Score]:
    """Return the table of scores, one row for each score that a model has.

    Args:
        metrics: content of metrics.json.
        columns: model -> column head.
    """
    keys = score_keys(metrics)
    first_judge = dict(reversed(keys))  # a score is explained in its first row only
    rows = [_score(metrics, columns, name, judge, first_judge[name] == judge) for name, judge in keys]
    return [row for row in rows if row is not None]


def _score(metrics: Mapping[str, Any], columns: dict[str, str], name: str, judge: str, explain: bool) -> Score | None:
    """Return the row of a score, None if no model has it."""
    title, meaning = SCORES[name]
    meaning = meaning if explain else ""
    if judge:
        title, name = f"{title} ({judge})", f"{judge}/{name}"
    values = [metrics.get(f"{model}/{name}") for model in columns]
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    # Rounded before it gets its sign, so that nothing shows as -0.0.
    change = (
        f"{round(measured[1] - measured[0], 1) + 0.0:+.1f}".replace("-", "−") if len(measured) == len(MODELS) else ""
    )
    counts = [n for model in columns if (n := metrics.get(f"{model}/{name}_answers"))]
    count = f" {max(counts)}\N{NO-BREAK SPACE}answers." if counts else ""
    return Score(
        title, (meaning + count).strip(), [_with_interval(metrics, f"{model}/{name}") for model in columns], change
    )


def _with_interval(metrics: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return value and 95 % interval as text."""
    if metrics.get(name) is None:
        return "–", ""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return format_percent(metrics[name]), "" if low is None or high is None else f"{low:.1f} to {high:.1f}"


def format_percent(value: float) -> str:
    """Return a percentage with one decimal and its unit."""
    return f"{value:.1f} %"
