"""A dry run on the model's shape and the rows' lengths: what doesn't fit is refused before anything long begins."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lisa_lightning.data.encoding import encode, prompt_length
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.method.base import Method
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.base_model import loading
from lisa_lightning.model.lora import attach, load_tokenizer, modules, trainable
from lisa_lightning.objective.backprop import Passes
from lisa_lightning.repair.base import Repair
from lisa_lightning.runtime.errors import UserError

MAX_PROMPT = 2**17
"""Tokens of a prompt where the model's config names no limit."""


@dataclass(frozen=True)
class Fit:
    """The defenses of the stages that run, which remain as they are."""

    align: Method | None
    method: Method | None
    repair: Repair | None


def preflight(base: Path, cfg: DictConfig, defenses: Fit, rows: Rows, user: Sequence[Row]) -> None:
    """Try a run on a model without weights.

    Args:
        base: the folder of the base model.
        cfg: the whole config.
        rows: all sets of the source.
        user: the user's rows, harmful ones among them.

    Raises:
        UserError: if the model lacks what an adapter or a defense is about; its tokenizer doesn't fit it; rows or
            prompts are longer than it can read; no answer of a set is left within `data.max_length`.
    """
    model = _shape(base, cfg)
    tokenizer = load_tokenizer(base)
    positions = max_positions(model.config)
    _refuse_larger_tokenizer(base, tokenizer, model)
    if {"curate", "align", "finetune"} & {*cfg.stages}:
        if positions is not None and cfg.data.max_length > positions:
            raise UserError(
                f"data.max_length={cfg.data.max_length} is more than the {positions} positions of the model in {base}. "
                f"Fix: data.max_length={positions} or less"
            )
        _refuse_unlearnable(tokenizer, cfg, _trained(defenses, rows, user))
    if "evaluate" in cfg.stages or (defenses.method is not None and cfg.evaluate.every):
        _refuse_long_prompts(tokenizer, cfg, positions or MAX_PROMPT, rows)
    _try_defenses(base, cfg, defenses)


def max_positions(config: Any) -> int | None:
    """Return how many tokens a model can read, None where its config names no limit."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def _shape(base: Path, cfg: DictConfig) -> PreTrainedModel:
    """Return the model without weights."""
    with loading(f"The model in {base}"), torch.device("meta"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        options = {"attn_implementation": cfg.model.attention, "trust_remote_code": False}
        return AutoModelForCausalLM.from_config(config, **options).requires_grad_(False)


def _refuse_larger_tokenizer(base: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise UserError where the tokenizer has tokens that the model has no embedding for."""
    embeddings: Any = model.get_input_embeddings()
    tokens, known = max(tokenizer.get_vocab().values(), default=-1) + 1, len(embeddings.weight)
    if tokens > known:
        raise UserError(
            f"The tokenizer in {base} has {tokens} tokens, and the model embeddings for {known}. Fix: "
            "model.resize_token_embeddings(len(tokenizer)) and save it again, or save the tokenizer that belongs to it"
        )


def _trained(defenses: Fit, rows: Rows, user: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """Return the sets that the stages of a run train on."""
    methods = [method for method in (defenses.align, defenses.method) if method is not None]
    needs = {need for part in (*methods, defenses.repair) if part is not None for need in part.needs}
    drawn = {stream for method in methods for step in _one_of_each_state(method) for stream in method.draws(step)}
    sets: dict[str, Sequence[Row]] = {"user": user if defenses.method else [], "alignment": [], "defender": []}
    if defenses.align or "alignment" in drawn or defenses.repair:
        sets["alignment"] = rows.alignment
    if "defender rows" in needs:
        sets["defender"] = rows.defender
    return sets


def _one_of_each_state(method: Method) -> set[int]:
    """Return the first step, and those at which a state may follow on the first one."""
    return {0, method.schedule.alignment_steps, method.schedule.user_steps}


def _refuse_unlearnable(tokenizer: PreTrainedTokenizerBase, cfg: DictConfig, sets: Mapping[str, Sequence[Row]]) -> None:
    """Raise UserError where no row of a set keeps a token of its answer within `data.max_length`."""
    limit = cfg.data.max_length
    # A tokenizer or a template that lacks something is refused here too.
    encode(tokenizer, cfg.model.template, Row("a", "", "b"), limit)
    for name, rows in sets.items():
        if rows and not any(encode(tokenizer, cfg.model.template, row, limit).supervised for row in rows):
            shortest = min(
                prompt_length(tokenizer, cfg.model.template, row.instruction, row.context, MAX_PROMPT) for row in rows
            )
            raise UserError(
                f"data.max_length={limit} cuts off the whole answer of all {len(rows)} {name} rows, whose shortest "
                f"prompt takes {shortest} tokens, so there is nothing to learn. Fix: data.max_length above {shortest}"
            )


def _refuse_long_prompts(tokenizer: PreTrainedTokenizerBase, cfg: DictConfig, positions: int, rows: Rows) -> None:
    """Raise UserError for a held-out prompt that, with its answer, takes more than the model's positions."""
    for name, key, questions in _prompts(cfg, rows):
        new_tokens = OmegaConf.select(cfg, key)
        for number, (instruction, context) in enumerate(questions, 1):
            length = prompt_length(tokenizer, cfg.model.template, instruction, context, positions)
            if length + new_tokens - 1 > positions:
                more = "more than " if length > positions else ""
                taken = f"{more}{min(length, positions)}"
                raise UserError(
                    f"source.{name}, prompt {number} of those asked: it takes {taken} tokens and its answer up to "
                    f"{key}={new_tokens}, more than the {positions} positions of the model. Fix: leave it out "
                    f"(source.{name}.where, skip or take), a smaller {key}, or another model"
                )


def _prompts(cfg: DictConfig, rows: Rows) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield every held-out set: its name, the key of its answers' length, its prompts with their contexts."""
    yield "harmful_prompts", "evaluate.max_new_tokens", [(prompt, "") for prompt in rows.harmful_prompts]
    yield "harmless_prompts", "evaluate.max_new_tokens", [(prompt, "") for prompt in rows.harmless_prompts]
    yield "test", "task.max_new_tokens", [(row.instruction, row.context) for row in rows.test]


def _try_defenses(base: Path, cfg: DictConfig, defenses: Fit) -> None:
    """Attach the adapters to a model without weights, and let the defenses find there what they need."""
    deltas: dict[str, Delta] = {}
    if defenses.align is not None:
        net = _net(base, cfg, "align.lora")
        _prepared(defenses.align, net, {})
        deltas = dict.fromkeys(modules(trainable(net)), Delta(torch.ones(1, 1)))
    if defenses.method is not None:
        continued = defenses.align is not None and cfg.model.adapters == "continued"
        net = _net(base, cfg, "align.lora" if continued else "lora")
        _prepared(defenses.method, net, deltas)
        if defenses.repair is not None:
            defenses.repair.refuse(net, deltas)


def _net(base: Path, cfg: DictConfig, key: str) -> PeftModel:
    model = _shape(base, cfg)
    lora = OmegaConf.select(cfg, key)
    with torch.device("meta"):
        net = attach(model, lora, 0, key)
    factors = trainable(net)
    rank = max(min(factors[a].shape[1], len(factors[b])) for a, b in modules(factors).values())
    if lora.r > rank:
        raise UserError(f"{key}.r={lora.r} is above the rank of every adapted matrix. Fix: {key}.r={rank} or less")
    return net


def _prepared(method: Method, net: PeftModel, deltas: dict[str, Delta]) -> None:
    deepcopy(method).prepare(Passes(net, lambda stream, size: iter(()), lambda: deltas))
