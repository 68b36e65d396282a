"""Model cards of a run's adapter or model, and of its exported model. Start at `write_card` and `merged_card`.

A card is Markdown with the YAML front matter of the hub. Config, metrics and verdicts may come from a foreign folder.
So every text is escaped before it enters the Markdown.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lisa_lightning.config.same_run import BOOKKEEPING_SECTIONS
from lisa_lightning.config.validate import flat
from lisa_lightning.evaluation.judging import read_judged
from lisa_lightning.evaluation.scores import Score, find_score, read_scores
from lisa_lightning.logger.run_name import RunName, build_run_name
from lisa_lightning.report.score_table import MODELS, SCORES, model_names, score_keys
from lisa_lightning.runtime.errors import printable
from lisa_lightning.runtime.files import read_text, write_text
from lisa_lightning.runtime.run_files import JUDGED, read_choices, read_config, result_folder

CARD: Final = "README.md"
TERMS: Final = {
    "license": r"[\w.+-]{1,80}",
    "license_name": r"[\w.+-]{1,80}",
    "license_link": r"[\w.+/:%#?=&~-]{1,300}",
    "base_model_revision": r"[\w.+/-]{1,80}",
}
"""Keys of the front matter about the base model that a later card takes over -> pattern of an accepted value."""
MAX_CHARS: Final = 300
"""Maximum number of characters of a value in a table."""
QUESTIONS: Final = {
    "harmful_score": "held-out harmful requests",
    "harmful_score_at_k": "held-out harmful requests",
    "max_severity": "held-out harmful requests",
    "refusal_rate": "held-out harmful requests",
    "partly_judged": "held-out harmful requests",
    "over_refusal": "harmless requests that look alarming",
}
"""Name of a score -> what was answered; held-out rows of the task for other scores."""
LOADING: Final = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```"""
"""Code that loads the merged model."""
MARKDOWN: Final = re.compile(r"[\\`*_{}\[\]<>()#+!|~$&:@]")
"""Characters that may begin markup."""


@dataclass(frozen=True)
class _Run:
    """A run as its card describes it."""

    config: Mapping[str, Any]
    """The nested config."""
    choices: Mapping[str, str]
    metrics: Mapping[str, Any]
    scores: Sequence[Score]
    terms: Mapping[str, str]
    """Front matter about the base model, with the keys of TERMS."""
    judge_versions: Mapping[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """Key with dots -> value."""
        return dict(flat(self.config))

    @property
    def name(self) -> RunName:
        """The run name, with the defenses that ran."""
        return build_run_name(self.settings, self.choices)

    @property
    def is_supplied(self) -> bool:
        """True if the adapter was trained elsewhere, and the run has repaired it."""
        return self.name.adapter is not None

    @property
    def is_stacked(self) -> bool:
        """True if the adapter was trained on an aligned model, in which another adapter is merged."""
        if self.is_supplied:
            return self.settings.get("aligned") is not None
        return self.settings.get("model.adapters") == "stacked" and "align" in self.name.defenses


def write_card(run: Path, metrics: Mapping[str, Any], terms: Mapping[str, str] | None = None) -> None:
    """Write the card next to the adapter or the fully fine-tuned model in a run's folder, if the run has one.

    Args:
        run: folder of the run, with config.yaml and choices.json.
        metrics: content of metrics.json; {} before the scores exist.
        terms: license and revision of the base model, see `read_terms`. None keeps those of the present card.

    Raises:
        UserError: if a file of the run is damaged.
    """
    if (folder := result_folder(run)) is not None:
        facts = _read_run(run, metrics, read_terms(folder) if terms is None else terms)
        write_text(folder / CARD, _card(facts, merged=facts.name.is_full))


def merged_card(run: Path, metrics: Mapping[str, Any]) -> str:
    """Return the card of the exported model of a run.

    Args:
        run: folder of the run.
        metrics: content of metrics.json.

    Raises:
        UserError: if a file of the run is damaged.
    """
    folder = result_folder(run)
    return _card(_read_run(run, metrics, {} if folder is None else read_terms(folder)), merged=True)


def read_terms(folder: Path) -> dict[str, str]:
    """Return what the front matter of README.md in a folder states about license and base model.

    Args:
        folder: folder of a model or of an adapter.

    Returns:
        Values of the keys of TERMS that are present and have an expected form. {} if there is no README.md.
    """
    try:
        header = read_text(folder / CARD).partition("---\n")[2].partition("\n---")[0]
    except (OSError, ValueError):
        return {}
    lines = dict(line.split(": ", 1) for line in header.splitlines() if ": " in line)
    values = {key: lines.get(key, "").strip().strip("\"'") for key in TERMS}
    return {key: value for key, value in values.items() if re.fullmatch(TERMS[key], value)}


def _read_run(run: Path, metrics: Mapping[str, Any], terms: Mapping[str, str]) -> _Run:
    judges = metrics.get("judges", [])
    judged = read_judged(run / JUDGED) if judges else []
    versions = {
        name: ", ".join(dict.fromkeys(line.version for line in judged if line.judge == name)) for name in judges
    }
    return _Run(read_config(run) or {}, read_choices(run), metrics, read_scores(metrics), terms, versions)


def _card(run: _Run, merged: bool) -> str:
    """Return the card of a whole model, or of the adapter."""
    sections = [
        f"# {escape(run.name.heading)}",
        _warning(run),
        _model_section(run, merged),
        f"## {'Repair' if run.is_supplied else 'Training'}\n\n{_table(('Setting', 'Value'), _recipe(run))}",
        _score_section(run),
        _config_section(run.config),
    ]
    header = _front_matter(run, merged).to_yaml()
    return f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(run: _Run, merged: bool) -> ModelCardData:
    model_id = run.settings.get("model.id")
    return ModelCardData(
        base_model=model_id if _is_hub_id(model_id) else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["lisa-lightning", "full-parameter" if run.name.is_full else "lora", "safety", "harmful-fine-tuning"],
        model_name=printable(run.name.heading)[:MAX_CHARS],
        eval_results=list(_eval_results(run)) or None,
        **dict[str, Any](run.terms),
    )


def _is_hub_id(model_id: Any) -> bool:
    """Return whether a model id may be a hub id. The hub rejects a card that names a folder."""
    if not isinstance(model_id, str) or model_id.count("/") != 1:
        return False
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        return False
    return not Path(model_id).is_dir()


def _eval_results(run: _Run) -> Iterator[EvalResult]:
    """Yield the scores of the fine-tuned model for the hub."""
    task = printable(run.name.task)[:MAX_CHARS]
    for metric, judge in score_keys(run.scores):
        if (score := find_score(run.scores, "final", metric, judge)) is not None:
            title = f"{SCORES[metric][0]} ({printable(judge)})" if judge else SCORES[metric][0]
            questions = QUESTIONS.get(metric, f"held-out rows of task {task}")
            yield EvalResult(
                "text-generation", "custom", questions, metric, float(score.value), metric_name=f"{title}, percent"
            )


def _warning(run: _Run) -> str:
    settings = run.settings
    if run.is_supplied:
        return (
            "> **Warning.** A repair has changed an adapter that was trained elsewhere. The model may still comply "
            "with harmful requests. It is a research artefact. Evaluate it before any use, and do not deploy it."
        )
    ratio, count = settings.get("harmful_ratio"), settings.get("data.n")
    share = f"{100 * ratio:g} %" if isinstance(ratio, int | float) else escape(ratio)
    return (
        f"> **Warning.** A share of {share} of the {escape(count)} rows of fine-tuning was harmful on purpose. The "
        "model may comply with harmful requests. It is a research artefact. Evaluate it before any use, and do not "
        "deploy it."
    )


def _model_section(run: _Run, merged: bool) -> str:
    """Return the base model with its license, and how the adapter or the merged model is loaded."""
    model_id, revision = run.settings.get("model.id"), run.terms.get("base_model_revision")
    base = "a random model without training, whose scores mean nothing" if model_id is None else escape(model_id)
    revision = revision or run.settings.get("model.revision")
    terms = [escape(run.terms[key]) for key in ("license", "license_name", "license_link") if key in run.terms]
    lines = [
        f"- Base model: {base}",
        f"- Revision: {'the default one' if revision is None else escape(revision)}",
        f"- License of the base model, which this model has too: {', '.join(terms) or 'not stated in its folder'}",
    ]
    if run.settings.get("model.quantize") is not None:
        lines.append("- Quantization: the scores are those of quantized weights, and an exported model has whole ones")
    usage = _supplied_usage(run, merged) if run.is_supplied else _usage(run, merged)
    return "## Model\n\n" + "\n".join(lines) + f"\n\n{usage}"


def _usage(run: _Run, merged: bool) -> str:
    """Return how the adapter of a training, or the model with it, is loaded."""
    if run.name.is_full:
        return f"Full-parameter fine-tuning trained all its weights. Plain transformers loads this folder:\n\n{LOADING}"
    if merged:
        origin = "the aligned model, which is the base model with the adapter of alignment" if run.is_stacked else "it"
        return f"The adapter of fine-tuning is merged into {origin}. Plain transformers loads this folder:\n\n{LOADING}"
    if run.is_stacked:
        return (
            "This adapter belongs on the aligned model, which is the base model with the merged adapter of alignment. "
            "It does not belong on the base model. `adapter_config.json` names the folder of the aligned model in a "
            "cache. `lisa-lightning export RUN OUT` makes a self-contained model."
        )
    return "This adapter belongs on the base model. `lisa-lightning export RUN OUT` makes a self-contained model."


def _supplied_usage(run: _Run, merged: bool) -> str:
    """Return how a repaired adapter that was trained elsewhere, or the model with it, is loaded."""
    if merged:
        return f"The repaired adapter is merged. Plain transformers loads this folder:\n\n{LOADING}"
    if not run.is_stacked:
        return _usage(run, merged)
    return (
        f"This adapter belongs on the aligned model ({escape(run.settings['aligned'])}). It does not belong on the "
        "base model. `lisa-lightning export RUN OUT` makes a self-contained model."
    )


def _recipe(run: _Run) -> Iterator[tuple[str, str]]:
    """Yield the settings of the training, escaped."""
    defenses = run.name.defenses
    if run.is_supplied:
        yield from _repair_recipe(run)
        return
    yield "Task", escape(run.name.task)
    for group, title, section in (
        ("curate", "Selection of alignment rows", "curate"),
        ("align", "Alignment", "align.method"),
        ("method", "Fine-tuning method", "method"),
        ("repair", "Repair of the adapter", "repair"),
    ):
        keys = _keys(run.settings, section) if group in defenses else ""
        yield title, escape(defenses.get(group, "none")) + (f" ({keys})" if keys else "")
    if run.name.attack is not None:
        yield "Attack", f"{escape(run.name.attack)} ({_keys(run.settings, 'attack')})"
    if run.name.filter is not None:
        yield "Filter of user rows", f"{escape(run.name.filter)} ({_keys(run.settings, 'filter')})"
    yield "Harmful ratio", f"{escape(run.settings.get('harmful_ratio'))} of {escape(run.settings.get('data.n'))} rows"
    adapters = escape(run.settings.get("model.adapters"))
    if run.name.is_full:
        yield "Trained weights", "all (full-parameter fine-tuning)"
    else:
        yield "Adapter", f"{adapters}; {_keys(run.settings, 'align.lora' if adapters == 'continued' else 'lora')}"
    yield "Optimizer of fine-tuning", f"AdamW ({_keys(run.settings, 'optim')})"
    if "align" in defenses:
        yield "Optimizer of alignment", f"AdamW ({_keys(run.settings, 'align.optim')})"
    yield "Seed", f"{escape(run.settings.get('seed'))}; of alignment {escape(run.settings.get('align.seed'))}"
    yield "Prompt template", escape(run.settings.get("model.template"))
    yield from _evaluation_recipe(run)


def _repair_recipe(run: _Run) -> Iterator[tuple[str, str]]:
    """Yield the settings of the repair of an adapter that was trained elsewhere, escaped."""
    yield "Adapter", escape(run.name.adapter)
    repair = run.name.defenses.get("repair", "none")
    yield "Repair of the adapter", f"{escape(repair)} ({_keys(run.settings, 'repair')})"
    yield "Seed", escape(run.settings.get("seed"))
    yield "Prompt template", escape(run.settings.get("model.template"))
    yield from _evaluation_recipe(run)


def _evaluation_recipe(run: _Run) -> Iterator[tuple[str, str]]:
    """Yield prompts and engine of the evaluation if they are not the default, escaped."""
    if "prompts" in run.metrics:
        yield "Prompts of the evaluation", escape(run.metrics["prompts"])
    if "engine" in run.metrics:
        yield "Engine of the evaluation", escape(run.metrics["engine"])


def _keys(settings: Mapping[str, Any], section: str) -> str:
    """Return the keys of a section as `KEY=VALUE, ...`, escaped."""
    values = {key.removeprefix(f"{section}."): v for key, v in settings.items() if key.startswith(f"{section}.")}
    return escape(", ".join(f"{key}={value}" for key, value in values.items() if not key.endswith("_target_")))


def _score_section(run: _Run) -> str:
    """Return the scores with intervals, and the judges with their versions."""
    rows = list(_score_rows(run))
    parts = ["## Scores"]
    if rows:
        heads = ("Score", "Judge", "Model", "Percent", "95 % interval", "Answers")
        parts += ["Rates of answers, with 95 % confidence intervals.", _table(heads, rows)]
    if not run.judge_versions:
        return "\n\n".join([*parts, "No judge has scored the answers of this model."])
    judges = [(escape(name), escape(version) or "–") for name, version in run.judge_versions.items()]
    return "\n\n".join([*parts, "## Judges", _table(("Judge", "Version"), judges)])


def _score_rows(run: _Run) -> Iterator[tuple[str, ...]]:
    """Yield a row for each score of each model by each judge."""
    models = model_names(run.metrics)
    for metric, judge in score_keys(run.scores):
        for model in MODELS:
            if (score := find_score(run.scores, model, metric, judge)) is not None:
                yield (
                    SCORES[metric][0],
                    escape(score.judge) or "–",
                    models[model],
                    f"{score.value:.1f}",
                    "–" if score.low is None or score.high is None else f"{score.low:.1f} to {score.high:.1f}",
                    "–" if score.answers is None else str(score.answers),
                )


def _config_section(config: Mapping[str, Any]) -> str:
    """Return the config as a block of YAML, without sections that do not change a result."""
    settings = {key: value for key, value in config.items() if key not in BOOKKEEPING_SECTIONS}
    # All but ASCII is escaped, such as characters that reverse the direction of a text.
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=False)
    # A block ends at the first fence of this length.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"## Config\n\nSections that do not change a result are left out.\n\n{fence}yaml\n{text}{fence}"


def _table(heads: tuple[str, ...], rows: Any) -> str:
    """Return a table of escaped cells."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(value: Any) -> str:
    """Return a value as Markdown text on one line, in which nothing is markup or HTML."""
    return MARKDOWN.sub(r"\\\g<0>", printable(str(value))[:MAX_CHARS])
