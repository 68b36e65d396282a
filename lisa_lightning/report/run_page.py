"""The page of a run, report.html: one self-contained file with scores, curves and sample answers.

Start at `write_run_page`, then `_content`, which collects everything that page.html.j2 shows.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from lisa_lightning.config.validate import flat
from lisa_lightning.evaluation.scores import Score, find_score, model_of_variant
from lisa_lightning.evaluation.token_kl import read_positions
from lisa_lightning.evaluation.utility import read_utility
from lisa_lightning.logger.run_name import RunName, build_run_name
from lisa_lightning.report.paired_changes import read_changes
from lisa_lightning.report.score_table import (
    MODELS,
    SCORES,
    ScoreRow,
    agreement_rows,
    baseline_note,
    describe_options,
    format_percent,
    model_names,
    score_rows,
    utility_rows,
    variant_rows,
)
from lisa_lightning.report.set_table import set_tables
from lisa_lightning.runtime.files import write_text
from lisa_lightning.runtime.run_files import TOKEN_KL

if TYPE_CHECKING:  # torch takes longer to import than all else that a command without a report does
    from lisa_lightning.evaluation.evaluator import Answer

KINDS: Final = {
    "harmful": ("Harmful requests", "A safe model refuses these."),
    "harmless": ("Harmless requests that look alarming", "A helpful model answers these."),
}
"""Kind of a safety prompt -> its heading and the desired behaviour."""
TIMES: Final = {
    "curate": "Curation",
    "align": "Alignment",
    "outliers": "The user's selection of rows",
    "filter": "Filter of user rows",
    "select": "Selection of rows",
    "finetune": "Fine-tuning",
    "reference": "Reference adapter",
    "repair": "Repair",
    "evaluate": "Evaluation",
    "token_kl": "Divergence from the initial model",
    "lm_eval": "General utility",
    "judge": "Judging",
    "total": "This run in total",
}
"""Stage, as metric names have it -> its title."""
GOOD: Final = {("harmful", "refused"), ("harmless", "answered"), ("task", "correct"), ("task", "preferred")}
"""Kind and verdict of answers that are shown as good."""
BAD: Final = {("harmful", "flagged"), ("harmless", "refused"), ("task", "wrong"), ("task", "not preferred")}
"""Kind and verdict of answers that are shown as bad."""
OWN: Final = "as above"
"""Column head of the run's own evaluation beside its variants, if no variant names it."""
MAX_CHARACTERS: Final = 1500
"""Characters of an answer that are shown. The page must stay small when a model never ends its answers."""


@dataclass(frozen=True)
class JudgedAnswer:
    """A model answer with its verdict."""

    answer: "Answer"
    verdict: str
    """One or two words, such as `refused` or `not preferred`."""


@dataclass(frozen=True)
class Cell:
    """One model's answer to a prompt."""

    model: str
    text: str
    verdict: str
    tone: str
    """`good`, `bad` or `neutral`, a class of style.css."""
    folded: bool
    """True if a click is needed to show the text."""


@dataclass(frozen=True)
class Sample:
    """A prompt with the answer of each model, None for a model without one."""

    prompt: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Group:
    """The sample answers of one kind of prompt."""

    title: str
    meaning: str
    samples: list[Sample]
    count: int
    """Number of prompts of the kind, including those not shown."""


@dataclass(frozen=True)
class VariantTable:
    """Scores of one model under other prompts and decoding, side by side."""

    title: str
    """Column head of the model in the main table."""
    columns: dict[str, str]
    """Model -> name of the variant."""
    rows: list[ScoreRow]
    options: list[tuple[str, str]]
    """Name of a variant -> its options in words."""


def sample_answers(answers: Sequence[JudgedAnswer], limit: int = 8) -> list[JudgedAnswer]:
    """Return the first answers of every model and kind, at most `limit` of each, one for each prompt."""
    counts: dict[tuple[str, str], int] = {}
    sampled = []
    for judged in answers:
        if judged.answer.sample:
            continue
        group = (judged.answer.model, judged.answer.kind)
        counts[group] = counts.get(group, 0) + 1
        if counts[group] <= limit:
            sampled.append(judged)
    return sampled


def write_run_page(
    out: Path,
    metrics: Mapping[str, Any],
    scores: Sequence[Score],
    curves: Sequence[dict[str, str]],
    answers: Sequence[JudgedAnswer],
    choices: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Write report.html.

    Args:
        out: folder of the run, whose stored verdicts are compared.
        metrics: content of metrics.json. Stages that did not run have no entries.
        scores: scores of all models, in the order of their judges.
        curves: rows of curves.csv, as text.
        answers: all answers of the run. They are untrusted text.
        choices: config group -> chosen option.
        config: nested config of the run. Interpolations stay text, since the folder may be another person's.

    Raises:
        UserError: if the file can't be written, or token_kl.csv is damaged.
    """
    from lisa_lightning.report.run_plots import curve_figures, token_kl_figure

    content = _content(metrics, scores, read_changes(out), answers, choices, config)
    divergence = token_kl_figure(read_positions(out / TOKEN_KL), content["columns"])
    content["figures"] = [*curve_figures(curves), *([divergence] if divergence else [])]
    write_text(out / "report.html", render_template("page.html.j2", content))


def render_template(template: str, content: Mapping[str, Any]) -> str:
    """Return a template of this folder as HTML. All values of `content` are escaped."""
    # Imported here, since it takes longer than all else that a command without a report does.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content)


def _content(
    metrics: Mapping[str, Any],
    scores: Sequence[Score],
    changes: Mapping[tuple[str, str], str],
    answers: Sequence[JudgedAnswer],
    choices: Mapping[str, str],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the variables of the template, without the plots."""
    settings = dict(flat(config))
    run_name = build_run_name(settings, choices)
    columns = _columns(metrics, scores, answers)
    sampled = sample_answers(answers)
    facts = _facts(run_name, settings, metrics, choices)
    return {
        "heading": run_name.heading,
        "title": ", ".join([run_name.heading, *(f"{k} {v}" for k, v in facts if k in ("harmful ratio", "seed"))]),
        "facts": facts,
        "summary": _highlight_numbers(_summary(metrics, scores, columns)),
        "random": settings.get("model.id") is None,
        "columns": columns,
        "scores": score_rows(scores, columns, changes, baseline_note([metrics])),
        "variants": _variant_tables(metrics, scores, columns, config),
        "set_tables": set_tables(scores, columns),
        "utility": utility_rows(read_utility(metrics), columns),
        "judges": metrics.get("judges", []),
        "agreements": agreement_rows(metrics),
        "groups": _groups(sampled, answers, columns),
        "tasks": _samples(sampled, "task", columns),
        "task_count": _count(answers, "task"),
        "times": _times(metrics),
        "seed": metrics.get("seed"),
        "choices": choices,
        "config": yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=200),
    }


def _columns(metrics: Mapping[str, Any], scores: Sequence[Score], answers: Sequence[JudgedAnswer]) -> dict[str, str]:
    """Return the models that answered, each with its column head."""
    present = {score.model for score in scores} | {judged.answer.model for judged in answers}
    return {model: head for model, head in model_names(metrics).items() if model in MODELS and model in present}


def _variant_tables(
    metrics: Mapping[str, Any], scores: Sequence[Score], columns: Mapping[str, str], config: Mapping[str, Any]
) -> list[VariantTable]:
    """Return a table for each model that was evaluated in variants too."""
    configured = _configured_variants(config)
    unchanged = next((name for name, options in configured.items() if not options), OWN)
    options_in_words = [(name, describe_options(options)) for name, options in configured.items() if options]
    evaluated = {score.model for score in scores}
    tables = []
    for model, title in columns.items():
        names = {model_of_variant(model, name): name for name in metrics.get("variants", [])}
        present = {variant: name for variant, name in names.items() if variant in evaluated}
        if present:
            heads = {model: unchanged, **present}
            tables.append(VariantTable(title, heads, variant_rows(scores, heads), options_in_words))
    return tables


def _configured_variants(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return variants with their options, without entries that no run has."""
    section = config.get("evaluate")
    variants = section.get("variants") if isinstance(section, Mapping) else None
    entries = variants.items() if isinstance(variants, Mapping) else ()
    return {str(name): options for name, options in entries if isinstance(options, Mapping)}


def _facts(
    run_name: RunName, settings: Mapping[str, Any], metrics: Mapping[str, Any], choices: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return names and values of the settings that distinguish this run from others."""
    facts = {
        **({"align": "none"} if run_name.finetunes and "align" not in run_name.defenses else {}),
        **run_name.defenses,
        "attack": run_name.attack,
        **_filter_facts(run_name, metrics),
        "adapter": settings.get("adapter"),
        "aligned": settings.get("aligned"),
        "trained weights": "all (full-parameter)" if run_name.is_full else None,
        "harmful ratio": settings.get("harmful_ratio") if run_name.finetunes else None,
        "seed": metrics.get("seed", settings.get("seed")),
        "task": run_name.task,
        "model": run_name.model if run_name.model == choices.get("model") else settings.get("model.id"),
        "steps": metrics.get("train/steps"),
        **_broken_at(settings, metrics),
        "prompts": metrics.get("prompts"),
        "engine": metrics.get("engine"),
        "experiment": choices.get("experiment") if run_name.finetunes else None,
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "None")]


def _filter_facts(run_name: RunName, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the filter of the user's rows, the rows that it removed, and its leak ratio; {} without a filter."""
    if run_name.filter is None or "filter/removed" not in metrics:
        return {}
    leak = metrics.get("filter/leak_ratio")
    return {
        "filter": run_name.filter,
        "removed user rows": f"{metrics['filter/removed']}, {metrics['filter/benign_removed']} of them harmless",
        **({} if leak is None else {"leak ratio": format_percent(leak)}),
    }


def _broken_at(settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return when the harmful score exceeded the threshold while fine-tuning, {} for a run without evaluations then."""
    threshold = settings.get("evaluate.harmful_threshold")
    if "train/steps" not in metrics or not settings.get("evaluate.every") or not isinstance(threshold, int | float):
        return {}
    step = metrics.get("eval/steps_until_harmful")
    return {f"harmful score above {threshold:g} %": "never" if step is None else f"from step {step}"}


def _summary(metrics: Mapping[str, Any], scores: Sequence[Score], columns: dict[str, str]) -> str:
    """Return the main scores of the run as one sentence."""
    clauses = []
    for metric in ("harmful_score", "refusal_rate"):
        of_models = [
            f"{format_percent(score.value)} {head}"
            for model, head in columns.items()
            if (score := find_score(scores, model, metric)) is not None
        ]
        clauses += [f"{SCORES[metric][0].lower()} {', '.join(of_models)}"] if of_models else []
    accuracy = next((s for m in reversed(MODELS) if (s := find_score(scores, m, "accuracy")) is not None), None)
    clauses += [f"accuracy {format_percent(accuracy.value)}"] if accuracy is not None else []
    if clauses:
        sentence = "; ".join(clauses)
        return sentence[0].upper() + sentence[1:] + "."
    if "train/steps" in metrics:
        return f"Fine-tuned for {metrics['train/steps']} steps; the scores were not measured."
    return "The scores were not measured in this run."


def _highlight_numbers(sentence: str) -> Any:
    """Return the sentence as HTML in which no line breaks between a number and its unit."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(\d[\d.]* %)", r'<span class="number">\1</span>', str(escape(sentence))))


def _groups(sampled: Sequence[JudgedAnswer], answers: Sequence[JudgedAnswer], columns: dict[str, str]) -> list[Group]:
    groups = [
        Group(title, meaning, _samples(sampled, kind, columns), _count(answers, kind))
        for kind, (title, meaning) in KINDS.items()
    ]
    return [group for group in groups if group.samples]


def _count(answers: Sequence[JudgedAnswer], kind: str) -> int:
    """Return the number of prompts of a kind."""
    prompts = [j.answer.model for j in answers if j.answer.kind == kind and not j.answer.sample]
    return max(prompts.count(model) for model in MODELS)


def _samples(sampled: Sequence[JudgedAnswer], kind: str, columns: dict[str, str]) -> list[Sample]:
    """Return the answers of a kind by prompt. A prompt that a model answered twice is two samples."""
    from lisa_lightning.data.templates import join_context

    seen: dict[tuple[str, str], int] = {}
    cells: dict[tuple[str, int], dict[str, Cell]] = {}
    of_kind = [judged for judged in sampled if judged.answer.kind == kind and judged.answer.model in columns]
    same_prompt = len({judged.answer.prompt for judged in of_kind}) == 1
    for judged in of_kind:
        answer = judged.answer
        # Most tasks have one instruction for all rows, which need not be read again and again.
        prompt = answer.context if same_prompt and answer.context else join_context(answer.prompt, answer.context)
        key = (answer.model, prompt)
        seen[key] = seen.get(key, 0) + 1
        cells.setdefault((prompt, seen[key]), {})[answer.model] = _cell(judged, columns)
    return [Sample(_truncate(prompt), [by_model.get(m) for m in columns]) for (prompt, _), by_model in cells.items()]


def _cell(judged: JudgedAnswer, columns: dict[str, str]) -> Cell:
    answer = judged.answer
    outcome = (answer.kind, judged.verdict)
    return Cell(
        columns.get(answer.model, answer.model),
        _truncate(answer.response),
        judged.verdict,
        tone="good" if outcome in GOOD else "bad" if outcome in BAD else "neutral",
        folded=outcome in {("harmful", "flagged"), ("harmful", "not refused")},
    )


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " … (cut; complete in responses.jsonl)"


def _times(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return title, duration and peak memory of every measured stage."""
    return [
        (title, _format_duration(metrics[f"time/{name}_s"]), _format_memory(metrics.get(f"memory/{name}_mib")))
        for name, title in TIMES.items()
        if metrics.get(f"time/{name}_s") is not None
    ]


def _format_memory(mib: float | None) -> str:
    """Return MiB as text in GiB, a dash for None or 0."""
    return f"{mib / 1024:.2f} GiB" if mib else "–"


def _format_duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole_seconds:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"
