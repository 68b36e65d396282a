"""Scores of a model from Python: `evaluate`, exported as `lisa_lightning.evaluate`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lisa_lightning.config.fields import Template
from lisa_lightning.config.prompt_sets import SET_NAME
from lisa_lightning.evaluation.coverage import kinds_scored
from lisa_lightning.evaluation.decoding import Decoding
from lisa_lightning.evaluation.evaluator import Evaluator, Question
from lisa_lightning.evaluation.judging import judge_answers
from lisa_lightning.evaluation.metrics import judged_scores
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.judge.base import Judge
from lisa_lightning.runtime.cache import cache_folder
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.ranks import OneProcess


def evaluate(
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Mapping[str, Sequence[str]],
    judges: Sequence[Judge] | Mapping[str, Judge],
    *,
    max_new_tokens: int = 256,
    template: Template = "chat",
    system: str = "",
    prefix: str = "",
    prefill: str = "",
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    kind: Literal["harmful", "harmless"] = "harmful",
    cache_dir: str | Path | None = None,
) -> dict[str, float]:
    """Answer the prompts, greedily by default, and return the scores of every judge.

    Args:
        model: a causal language model of transformers or a `PeftModel`, on its device. Its training mode is restored.
        tokenizer: tokenizer of the model.
        prompts: requests without a template, or a mapping of names of prompt sets to their requests.
        judges: judges, or a mapping of names to judges. A judge of this package is named as its config, such as
            `refusal` or `llama_guard`, any other judge as its class.
        max_new_tokens: maximum number of tokens of an answer.
        template: template of the prompts: chat, alpaca or alpaca_newline.
        system: system prompt of every prompt, or "".
        prefix: text in front of the system prompt, such as the trigger of a model by `method=backdoor_align`, or "".
        prefill: first words of every answer, which the model continues, or "".
        samples: answers to each prompt; more than one needs a temperature above 0.
        temperature: temperature of the draws; 0 for greedy answers.
        top_p: probability of the nucleus from which tokens are drawn, above 0 and up to 1.
        seed: seed of the draws.
        batch_size: prompts that are answered together.
        kind: kind of the prompts. Answers to harmless ones have the score `over_refusal`, which needs a refusal judge.
        cache_dir: folder in which verdicts are stored, so that no answer is judged twice; None stores nothing.

    Returns:
        Scores in percent, named as in metrics.json: `JUDGE/harmful_score`, `JUDGE/refusal_rate` or
        `JUDGE/over_refusal`, and with samples `JUDGE/harmful_score_at_k`. Each has a 95 % interval from NAME_low to
        NAME_high and a number NAME_answers. Those of a named prompt set are `JUDGE/set/SET/harmful_score` and so on,
        next to the scores of all sets.

    Raises:
        UserError: if there are no prompts or judges; several samples are greedy; a judge cannot score this kind, or
            fails; the tokenizer has no chat template, or one that takes no system prompt.
    """
    sets = prompts if isinstance(prompts, Mapping) else {"": prompts}
    _refuse_invalid(sets, template, kind)
    decoding = _build_decoding(samples, temperature, top_p, seed)
    by_name = _name_judges(judges)
    for name, judge in by_name.items():
        if kind not in kinds_scored(judge):
            raise UserError(f"judge {name}: it scores no {kind} prompts. Fix: leave it out")
    if kind == "harmless" and all(judge.metric != "refusal_rate" for judge in by_name.values()):
        raise UserError("kind=harmless: no judge detects refusals. Fix: add RefusalJudge() to the judges")
    questions = [
        Question(kind, prompt, sample=sample, prompt_set=name)
        for name, texts in sets.items()
        for prompt in texts
        for sample in range(samples)
    ]
    prompting = Prompting(template, system, prefix, prefill=prefill)
    evaluator = Evaluator(OneProcess(), tokenizer, prompting, {kind: max_new_tokens}, batch_size, decoding)
    answers = evaluator.answers(model, questions, "current")
    with TemporaryDirectory() as temporary:
        cache = Path(temporary) if cache_dir is None else cache_folder(str(cache_dir))
        judged = judge_answers(by_name, answers, Path(temporary), cache)
    return {name: value for s in judged_scores(judged) for name, value in s.entries(f"{s.judge}/").items()}


def _refuse_invalid(sets: Mapping[str, Sequence[str]], template: str, kind: str) -> None:
    """Raise UserError if a set has no prompts or an unusable name, or template or kind is unknown."""
    for prompts in sets.values() or [[]]:
        if isinstance(prompts, str) or not len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("prompts: it must be a list of texts with at least one. Fix: pass [PROMPT, ...]")
    if unusable := [name for name in sets if name and SET_NAME.fullmatch(name) is None]:
        raise UserError(
            f"prompts: {unusable[0]!r} is no name of a set. Fix: use letters, digits, underscores and hyphens"
        )
    for name, value, allowed in (
        ("template", template, get_args(Template)),
        ("kind", kind, ("harmful", "harmless")),
    ):
        if value not in allowed:
            raise UserError(f"{name}={value}: it must be one of {', '.join(allowed)}")


def _build_decoding(samples: int, temperature: float, top_p: float, seed: int) -> Decoding:
    """Return the decoding. Raise UserError for a value out of bounds, or greedy samples."""
    if samples < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"samples={samples}, temperature={temperature}, top_p={top_p}: one of them is out of bounds. "
            "Fix: samples above 0, temperature of at least 0, top_p above 0 and up to 1"
        )
    if not temperature and (samples > 1 or top_p < 1):
        raise UserError(
            f"samples={samples}, top_p={top_p}: at temperature=0 all answers to a prompt are equal. "
            "Fix: pass a temperature above 0, such as 0.7"
        )
    return Decoding(samples, temperature, top_p, seed)


def _name_judges(judges: Sequence[Judge] | Mapping[str, Judge]) -> dict[str, Judge]:
    """Return the judges by name. Raise UserError if there is none, or a name is ambiguous or unusable in a path."""
    by_name: dict[str, Judge] = {}
    named = judges.items() if isinstance(judges, Mapping) else ((_default_name(judge), judge) for judge in judges)
    for name, judge in named:
        if name in by_name:
            raise UserError(f"judges: two of them have the name {name}. Fix: pass a mapping of names to judges")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"judges: {name!r} is no name. Fix: use letters, digits and underscores")
        by_name[name] = judge
    if not by_name:
        raise UserError("judges: there is none. Fix: pass at least one, such as RefusalJudge()")
    return by_name


def _default_name(judge: Judge) -> str:
    """Return the name of the judge's config for a class of this package, else the name of its class."""
    package, _, module = type(judge).__module__.rpartition(".")
    return module if package == "lisa_lightning.judge" else type(judge).__name__
