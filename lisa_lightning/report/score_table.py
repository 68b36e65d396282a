"""Score tables: titles and meanings of all scores (`SCORES`), and the tables of one run.

Start at `score_rows`, and at `utility_rows` for general utility.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from lisa_lightning.evaluation.agreement import Agreement, read_agreements
from lisa_lightning.evaluation.scores import Score, find_score, model_of_variant
from lisa_lightning.evaluation.utility import UtilityScore, find_utility

MINUS: Final = "−"
MODELS: Final = ("aligned", "final")
"""Models whose answers are scored: `model` in responses.jsonl and judged.jsonl."""
SCORES: Final = {
    "harmful_score": (
        "Harmful score",
        "share of answers to held-out harmful requests that the judge counts as harmful. Lower is better.",
    ),
    "harmful_score_at_k": (
        "Harmful score at k",
        "share of the same requests of which at least one of the k sampled answers is harmful. Lower is better.",
    ),
    "max_severity": (
        "Maximal severity",
        "share of the same answers with the highest grade of a graded judge. Lower is better.",
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
OPTION_TITLES: Final = {"system": "system prompt", "prefix": "prefix", "prefill": "prefill", "wrapper": "wrapper"}
"""Option of the evaluation that is a text -> its name for readers."""
BASELINES: Final = {"baseline/majority_class": "majority class", "baseline/bag_of_words": "bag of words"}
"""Metric of an accuracy without a language model -> its name for readers."""


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores."""

    title: str
    meaning: str
    values: list[tuple[str, str]]
    """Value and interval of each model."""
    change: str
    """Difference between the two models, of a percentage in points; "" for a single model."""
    paired: str = ""
    """Interval and p-value of the difference; "" without verdicts on the same prompts."""


def model_names(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return models with their names for readers.

    `aligned` names the base model if the run has no stage align, and the adapter that the user supplies.
    """
    if "adapter" in metrics:
        return {
            "aligned": "before repair" if "time/repair_s" in metrics else "this adapter",
            "final": "after repair",
            "responses": "responses",
        }
    base = "before fine-tuning" if "time/finetune_s" in metrics else "this model"
    return {
        "aligned": "after alignment" if "time/align_s" in metrics else base,
        "final": "after repair" if "time/repair_s" in metrics else "after fine-tuning",
        "responses": "responses",
    }


def variant_models(metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the models that are variants of others -> the other's name for readers, and that of the variant."""
    return {
        model_of_variant(model, variant): (head, variant)
        for model, head in model_names(metrics).items()
        for variant in metrics.get("variants", [])
    }


def score_keys(scores: Sequence[Score]) -> list[tuple[str, str]]:
    """Return the metrics to show, each with its judge.

    Scores of the same metric follow each other, in the order of the judges.

    Returns:
        Pairs of metric and judge. The judge is "" if the run has only one, and for scores without a judge.
    """
    judges_by_metric = {m: list(dict.fromkeys(s.judge for s in scores if s.metric == m)) for m in SCORES}
    if len({judge for judges in judges_by_metric.values() for judge in judges if judge}) < 2:
        return [(metric, "") for metric in SCORES]
    return [(metric, judge) for metric in SCORES for judge in judges_by_metric[metric]]


def baseline_note(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the accuracies without a language model as a sentence, "" if no run has them.

    Args:
        runs: contents of metrics.json. If values differ between runs, their range is shown.
    """
    values = {title: [run[name] for run in runs if name in run] for name, title in BASELINES.items()}
    shown = [f"{title} {_format_range(min(v), max(v))}" for title, v in values.items() if v]
    return f"Accuracy without a language model: {', '.join(shown)}." if shown else ""


def _format_range(low: float, high: float) -> str:
    """Return `84.1 %`, or `84.1 to 85.3 %` for values that differ."""
    ends = list(dict.fromkeys(f"{value:.1f}" for value in (low, high)))
    return f"{' to '.join(ends)} %"


def score_rows(
    scores: Sequence[Score], columns: Mapping[str, str], changes: Mapping[tuple[str, str], str], note: str = ""
) -> list[ScoreRow]:
    """Return the table of scores, one row for each score that a model has.

    Args:
        scores: scores of all models, in the order of their judges.
        columns: model -> column head.
        changes: pair of metric and judge -> interval and p-value of the change.
        note: baselines of the accuracy, see `baseline_note`.
    """
    keys = score_keys(scores)
    # A metric is explained in its first row only.
    first_judge = dict(reversed(keys))
    notes = {"accuracy": note}
    rows = [
        _score_row(
            scores, columns, changes, metric, judge, notes.get(metric, "") if first_judge[metric] == judge else None
        )
        for metric, judge in keys
    ]
    return [row for row in rows if row is not None]


def _score_row(
    scores: Sequence[Score],
    columns: Mapping[str, str],
    changes: Mapping[tuple[str, str], str],
    metric: str,
    judge: str,
    note: str | None,
) -> ScoreRow | None:
    """Return the row of a score, None if no model has it. A `note` of None omits the explanation."""
    title, meaning = SCORES[metric]
    of_models = [find_score(scores, model, metric, judge) for model in columns]
    measured = [score for score in of_models if score is not None]
    if not measured:
        return None
    change = format_points(measured[1].value - measured[0].value) if len(measured) == len(MODELS) else ""
    counts = [score.answers for score in measured if score.answers]
    count = f" {max(counts)}\N{NO-BREAK SPACE}answers." if counts else ""
    explanation = "" if note is None else f"{meaning} {note}".strip()
    return ScoreRow(
        f"{title} ({judge})" if judge else title,
        (explanation + count).strip(),
        [_with_interval(score) for score in of_models],
        change,
        changes.get((metric, measured[0].judge), "") if change else "",
    )


def variant_rows(scores: Sequence[Score], columns: Mapping[str, str]) -> list[ScoreRow]:
    """Return the table of a model's variants: the scores that one of them has besides the run's own evaluation.

    Args:
        scores: scores of all models, in the order of their judges.
        columns: model -> name of the variant, first the model of the run's own evaluation.
    """
    variants = [*columns][1:]
    rows = []
    for metric, judge in score_keys(scores):
        row = _score_row(scores, columns, {}, metric, judge, None)
        if row is not None and any(find_score(scores, variant, metric, judge) for variant in variants):
            rows.append(replace(row, meaning=""))
    return rows


def describe_options(options: Mapping[str, Any]) -> str:
    """Return the options of a variant in words, without any text of a prompt."""
    words = []
    for name, value in options.items():
        title = OPTION_TITLES.get(name)
        if title is None:
            words.append(f"{name} {value}")
        else:
            words.append(title if value else f"no {title}")
    return ", ".join(words)


def agreement_rows(metrics: Mapping[str, Any]) -> list[ScoreRow]:
    """Return the table of the judges' agreement, one row for each two judges: equal verdicts, and kappa.

    Args:
        metrics: content of metrics.json.
    """
    return [
        ScoreRow(
            f"{agreement.first} and {agreement.second}",
            f"{agreement.answers}\N{NO-BREAK SPACE}answers",
            [(format_percent(agreement.equal), ""), _kappa_with_interval(agreement)],
            "",
        )
        for agreement in read_agreements(metrics)
    ]


def _kappa_with_interval(agreement: Agreement) -> tuple[str, str]:
    """Return kappa and its 95 % interval as text."""
    if agreement.kappa is None:
        return "–", "a judge’s verdicts are all the same"
    if agreement.low is None or agreement.high is None:
        return f"{agreement.kappa:.2f}", "all verdicts equal"
    values = (f"{value:.2f}".replace("-", MINUS) for value in (agreement.kappa, agreement.low, agreement.high))
    kappa, low, high = values
    return kappa, f"{low} to {high}"


def utility_rows(scores: Sequence[UtilityScore], columns: Mapping[str, str]) -> list[ScoreRow]:
    """Return the table of general utility, one row for each metric of a task.

    Args:
        scores: scores of the harness.
        columns: model -> column head.
    """
    rows = []
    for name in utility_names(scores):
        of_models = [find_utility(scores, model, name) for model in columns]
        measured = [score for score in of_models if score is not None]
        change = format_change(measured[1].value - measured[0].value) if len(measured) == len(MODELS) else ""
        rows.append(ScoreRow(name[0], name[1], [_with_error(score) for score in of_models], change))
    return rows


def utility_names(scores: Sequence[UtilityScore]) -> list[tuple[str, str]]:
    """Return task and metric of the scores, each once."""
    return list(dict.fromkeys(score.name for score in scores))


def _with_error(score: UtilityScore | None) -> tuple[str, str]:
    """Return value and standard error as text."""
    if score is None:
        return "–", ""
    return f"{score.value:.3f}", "" if score.stderr is None else f"± {score.stderr:.3f}"


def format_change(difference: float) -> str:
    """Return a difference with three decimals and its sign."""
    return f"{round(difference, 3) + 0.0:+.3f}".replace("-", MINUS)


def _with_interval(score: Score | None) -> tuple[str, str]:
    """Return value and 95 % interval as text."""
    if score is None:
        return "–", ""
    has_interval = score.low is not None and score.high is not None
    return format_percent(score.value), f"{score.low:.1f} to {score.high:.1f}" if has_interval else ""


def format_points(difference: float) -> str:
    """Return a difference in points with one decimal and its sign."""
    # Rounded before it gets its sign, so that nothing shows as -0.0.
    return f"{round(difference, 1) + 0.0:+.1f}".replace("-", MINUS)


def format_percent(value: float) -> str:
    """Return a percentage with one decimal and its unit."""
    return f"{value:.1f} %"
