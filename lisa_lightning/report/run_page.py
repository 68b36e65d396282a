"""report.html: one self-contained file with the numbers, the curves and sample answers, for a person to read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from lisa_lightning.config.validate import flat
from lisa_lightning.logger.run_name import Identity, identity
from lisa_lightning.report.score_table import MODELS, model_names, percent, score_rows
from lisa_lightning.runtime.files import write_text

if TYPE_CHECKING:  # torch takes longer to import than all else that a command without a report does
    from lisa_lightning.evaluate.evaluator import Answer

KINDS: Final = {
    "harmful": ("Harmful requests", "A safe model refuses these."),
    "harmless": ("Harmless requests that look alarming", "A helpful model answers these."),
}
TIMES: Final = {
    "curate": "Curation",
    "align": "Alignment",
    "finetune": "Fine-tuning",
    "reference": "Reference adapter",
    "repair": "Repair",
    "evaluate": "Evaluation",
    "judge": "Judging",
    "total": "This run in all",
}
GOOD: Final = {("harmful", "refused"), ("harmless", "answered"), ("task", "correct"), ("task", "preferred")}
BAD: Final = {("harmful", "flagged"), ("harmless", "refused"), ("task", "wrong"), ("task", "not preferred")}
MOST_CHARACTERS: Final = 1500  # of one answer; a page must stay readable, and small, when a model doesn't stop


@dataclass(frozen=True)
class Told:
    """An answer, and in a word what is said of it."""

    answer: "Answer"
    verdict: str


def samples(answers: Sequence[Told], each: int = 8) -> list[Told]:
    """The first few answers of every model and kind."""
    taken: dict[tuple[str, str], int] = {}
    chosen = []
    for told in answers:
        group = (told.answer.model, told.answer.kind)
        taken[group] = taken.get(group, 0) + 1
        if taken[group] <= each:
            chosen.append(told)
    return chosen


def page(
    out: Path,
    metrics: Mapping[str, Any],
    curves: Sequence[dict[str, str]],
    answers: Sequence[Told],
    choices: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Write report.html.

    Args:
        out: the run's folder.
        metrics: what metrics.json holds; stages that did not run have no entries.
        curves: the rows of curves.csv, as text.
        answers: all of them. They are the model's words: untrusted text.
        choices: the chosen option of every config group.
        config: the run's, nested. It is shown as it is: interpolations in another person's file are not resolved.

    Raises:
        UserError: the file can't be written.
    """
    from lisa_lightning.report.run_plots import figures

    content = _content(metrics, answers, choices, config) | {"figures": figures(curves)}
    write_text(out / "report.html", rendered("page.html.j2", content))


def rendered(template: str, content: Mapping[str, Any]) -> str:
    """A page of this folder with its content, which is escaped."""
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
    metrics: Mapping[str, Any], answers: Sequence[Told], choices: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """All that the template shows besides the plots."""
    settings = dict(flat(config))
    run_identity = identity(settings, choices)
    columns = _columns(metrics, answers)
    chosen = samples(answers)
    facts = _facts(run_identity, settings, metrics, choices)
    return {
        "heading": run_identity.heading,
        "title": ", ".join([run_identity.heading, *(f"{k} {v}" for k, v in facts if k in ("harmful ratio", "seed"))]),
        "facts": facts,
        "summary": _marked(_summary(metrics, columns)),
        "random": settings.get("model.id") is None,
        "columns": columns,
        "scores": score_rows(metrics, columns),
        "judges": metrics.get("judges", []),
        "groups": _groups(chosen, answers, columns),
        "tasks": _pairs(chosen, "task", columns),
        "task_count": _count(answers, "task"),
        "times": _times(metrics),
        "seed": metrics.get("seed"),
        "choices": choices,
        "config": yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=200),
    }


def _columns(metrics: Mapping[str, Any], answers: Sequence[Told]) -> dict[str, str]:
    """The models that gave answers, and how to call them."""
    found = {name.split("/")[0] for name in metrics} | {told.answer.model for told in answers}
    return {model: name for model, name in model_names(metrics).items() if model in MODELS and model in found}


def _facts(
    own: Identity, settings: Mapping[str, Any], metrics: Mapping[str, Any], choices: Mapping[str, str]
) -> list[tuple[str, str]]:
    """What tells this run from others, each by its name."""
    found = {
        **({"align": "none"} if own.tuned and "align" not in own.defenses else {}),
        **own.defenses,
        "harmful ratio": settings.get("harmful_ratio") if own.tuned else None,
        "seed": metrics.get("seed", settings.get("seed")),
        "task": own.task,
        "model": own.model if own.model == choices.get("model") else settings.get("model.id"),
        "steps": metrics.get("train/steps"),
        "experiment": choices.get("experiment") if own.tuned else None,
    }
    return [(name, str(value)) for name, value in found.items() if value not in (None, "None")]


def _summary(metrics: Mapping[str, Any], columns: dict[str, str]) -> str:
    """What happened, in a sentence."""
    harmful = [
        f"{percent(value)} {name}"
        for model, name in columns.items()
        if (value := metrics.get(f"{model}/harmful_score")) is not None
    ]
    accuracy = next((v for s in reversed(MODELS) if (v := metrics.get(f"{s}/accuracy")) is not None), None)
    parts = [f"harmful score {', '.join(harmful)}"] if harmful else []
    parts += [f"accuracy {percent(accuracy)}"] if accuracy is not None else []
    if parts:
        sentence = "; ".join(parts)
        return sentence[0].upper() + sentence[1:] + "."
    if "train/steps" in metrics:
        return f"Fine-tuned for {metrics['train/steps']} steps; the scores were not measured."
    return "The scores were not measured in this run."


def _marked(sentence: str) -> Any:
    """The numbers of a sentence set off, and never parted from their unit."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(\d[\d.]* %)", r'<span class="number">\1</span>', str(escape(sentence))))


def _count(answers: Sequence[Told], kind: str) -> int:
    """How many prompts of a kind were asked."""
    return max(sum((t.answer.kind, t.answer.model) == (kind, model) for t in answers) for model in MODELS)


@dataclass(frozen=True)
class Cell:
    """One model's answer to a prompt."""

    model: str
    text: str
    verdict: str
    tone: str
    folded: bool


@dataclass(frozen=True)
class Sample:
    """A prompt with the answer of each model, None where a model was not asked it."""

    prompt: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Group:
    """The sample answers of one kind of prompt."""

    title: str
    meaning: str
    pairs: list[Sample]
    count: int


def _groups(chosen: Sequence[Told], answers: Sequence[Told], columns: dict[str, str]) -> list[Group]:
    found = [
        Group(title, meaning, _pairs(chosen, kind, columns), _count(answers, kind))
        for kind, (title, meaning) in KINDS.items()
    ]
    return [group for group in found if group.pairs]


def _pairs(chosen: Sequence[Told], kind: str, columns: dict[str, str]) -> list[Sample]:
    """Answers of the same prompt side by side; a prompt that a model was asked twice is two pairs."""
    from lisa_lightning.data.templates import joined

    seen: dict[tuple[str, str], int] = {}
    found: dict[tuple[str, int], dict[str, Cell]] = {}
    of_kind = [told for told in chosen if told.answer.kind == kind]
    one = len({told.answer.prompt for told in of_kind}) == 1
    for told in of_kind:
        answer = told.answer
        # Most tasks have one instruction for all rows, which need not be read again and again.
        shown = answer.context if one and answer.context else joined(answer.prompt, answer.context)
        asked = (answer.model, shown)
        seen[asked] = seen.get(asked, 0) + 1
        found.setdefault((shown, seen[asked]), {})[answer.model] = _cell(told, columns)
    return [Sample(_cut(prompt), [cells.get(model) for model in columns]) for (prompt, _), cells in found.items()]


def _cell(told: Told, columns: dict[str, str]) -> Cell:
    answer = told.answer
    judged = (answer.kind, told.verdict)
    tone = "good" if judged in GOOD else "bad" if judged in BAD else "neutral"
    return Cell(
        columns.get(answer.model, answer.model),
        _cut(answer.response),
        told.verdict,
        tone,
        judged in {("harmful", "flagged"), ("harmful", "not refused")},
    )


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " … (cut; whole in responses.jsonl)"


def _times(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (title, _duration(metrics[f"time/{name}_s"]), _gib(metrics.get(f"memory/{name}_mib")))
        for name, title in TIMES.items()
        if metrics.get(f"time/{name}_s") is not None
    ]


def _gib(mib: float | None) -> str:
    """A number of MiB in GiB; a dash where nothing was measured."""
    return f"{mib / 1024:.2f} GiB" if mib else "–"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"
