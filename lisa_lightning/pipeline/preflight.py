"""Dry run on a model without weights, so that misfits are refused before long computations. Start at `preflight`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lisa_lightning.config.settings import Lora, RunSettings
from lisa_lightning.data.encoding import Encoder, prompt_length
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.method.base import Method
from lisa_lightning.model.alignment_delta import Delta, refuse_other_layers
from lisa_lightning.model.base_model import reraise_load_errors
from lisa_lightning.model.factors import modules, trainable
from lisa_lightning.model.lora import attach, load_tokenizer
from lisa_lightning.model.lora_folder import attach_empty
from lisa_lightning.model.text_part import text_config
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.pipeline.stage_sequence import Defenses, Inputs
from lisa_lightning.pipeline.stages.supplied import Supplied, refuse_other_base
from lisa_lightning.runtime.errors import UserError

MAX_PROMPT_TOKENS = 2**17
"""Maximum number of tokens of a prompt if the model's config has no limit."""

HeldOut = tuple[str, str, int, list[tuple[str, str]]]
"""Name of a set, key and value of its answers' length, and pairs of prompt and context."""


def preflight(base: Path, inputs: Inputs) -> None:
    """Check that a run fits the base model, or the aligned model that the user supplies.

    Args:
        base: the folder of the base model.
        inputs: inputs of the stages. They are not changed.

    Raises:
        UserError: if one of these holds:

            - The model lacks modules that an adapter or a defense needs.
            - Its tokenizer has tokens without an embedding.
            - Its tokenizer does not fit a template or a system prompt.
            - Rows or prompts are longer than its maximum length.
            - `data.max_length` cuts off all answers of a set.
            - An adapter that the user supplies belongs on another model.
    """
    settings, defenses, supplied = inputs.settings, inputs.defenses, inputs.supplied
    served = base if supplied is None else supplied.served_folder(base)
    model = _meta_model(served, settings)
    tokenizer = load_tokenizer(served)
    positions = max_positions(model.config)
    _refuse_larger_tokenizer(served, tokenizer, model)
    if {"curate", "align", "finetune"} & {*settings.stages} or (supplied is not None and defenses.repair is not None):
        if positions is not None and settings.data.max_length > positions:
            raise UserError(
                f"data.max_length={settings.data.max_length} is more than the {positions} positions of the model in "
                f"{served}. Fix: data.max_length={positions} or less"
            )
        _refuse_cut_off_answers(tokenizer, settings, _training_sets(defenses, inputs.rows, inputs.user))
    if "evaluate" in settings.stages or (defenses.method is not None and settings.evaluate.every):
        for prompting in (inputs.prompting, *(variant.prompting for variant in inputs.variants.values())):
            held_out = _held_out_prompts(settings, inputs.rows, inputs.kl_rows)
            _refuse_long_prompts(tokenizer, positions or MAX_PROMPT_TOKENS, held_out, prompting)
    if supplied is not None:
        _try_supplied(base, settings, defenses, supplied)
    else:
        _try_defenses(base, settings, defenses)


def max_positions(config: Any) -> int | None:
    """Return the maximum length of a model in tokens; None if its config has no limit."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def _meta_model(base: Path, settings: RunSettings) -> PreTrainedModel:
    """Return the model without weights."""
    error_prefix = f"The model in {base}"
    config = text_config(error_prefix, base)
    with reraise_load_errors(error_prefix), torch.device("meta"):
        options = {"attn_implementation": settings.model.attention, "trust_remote_code": False}
        return AutoModelForCausalLM.from_config(config, **options).requires_grad_(False)


def _refuse_larger_tokenizer(base: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise UserError if the tokenizer has tokens without an embedding."""
    embeddings: Any = model.get_input_embeddings()
    tokens, embedded = max(tokenizer.get_vocab().values(), default=-1) + 1, len(embeddings.weight)
    if tokens > embedded:
        raise UserError(
            f"The tokenizer in {base} has {tokens} tokens, and the model embeddings for {embedded}. Fix: "
            "model.resize_token_embeddings(len(tokenizer)) and save it again, or save the tokenizer that belongs to it"
        )


def _training_sets(defenses: Defenses, rows: Rows, user: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """Return the rows that the stages of a run train on, by stream."""
    methods = [method for method in (defenses.align, defenses.method) if method is not None]
    requirements = {
        requirement
        for defense in (*methods, defenses.repair)
        if defense is not None
        for requirement in defense.requirements
    }
    drawn = {stream for method in methods for step in _state_steps(method) for stream in method.plan(step)}
    # A method may add rows with a secret system prompt, which must not be lost while other rows remain.
    sets: dict[str, Sequence[Row]] = {"user": [], "alignment": [], "defender": []}
    if defenses.method is not None:
        sets["user"] = [row for row in user if row.system == user[0].system]
        sets["marked"] = [row for row in user if row.system != user[0].system]
    if defenses.align or "alignment" in drawn or defenses.repair:
        sets["alignment"] = rows.alignment
    if "defender_rows" in requirements:
        sets["defender"] = rows.defender
    return sets


def _state_steps(method: Method) -> set[int]:
    """Return steps that cover all states: the first step, and the possible first steps of the other state."""
    return {0, method.schedule.alignment_steps, method.schedule.user_steps}


def _refuse_cut_off_answers(
    tokenizer: PreTrainedTokenizerBase, settings: RunSettings, sets: Mapping[str, Sequence[Row]]
) -> None:
    """Raise UserError if `data.max_length` cuts off the answers of all rows of a set."""
    limit, template = settings.data.max_length, settings.model.template
    encoder = Encoder(tokenizer, template, limit, settings.data.tokenization)
    # This call also refuses an unsuitable tokenizer or template.
    encoder(Row("a", "", "b"))
    for name, rows in sets.items():
        if rows and not any(encoder(row).supervised for row in rows):
            shortest = min(
                prompt_length(tokenizer, template, row.instruction, row.context, MAX_PROMPT_TOKENS, row.system)
                for row in rows
            )
            raise UserError(
                f"data.max_length={limit} cuts off the whole answer of all {len(rows)} {name} rows, whose shortest "
                f"prompt takes {shortest} tokens, so there is nothing to learn. Fix: data.max_length above {shortest}"
            )


def _refuse_long_prompts(
    tokenizer: PreTrainedTokenizerBase, positions: int, held_out: Iterable[HeldOut], prompting: Prompting
) -> None:
    """Raise UserError for a held-out prompt that exceeds the model's maximum length together with its answer.

    System prompt, prefix, prefill and wrapper are parts of a prompt.
    """
    # This call also refuses an unsuitable template. A longer prompt could contain the system prompt by chance.
    prompting.encode(tokenizer, "a")
    added = [
        *(["system prompt", "prefix"] if prompting.system_prompt else []),
        *(["prefill"] if prompting.prefill else []),
        *(["wrapper"] if prompting.wrapper else []),
    ]
    shorter = f"shorten its {' and '.join(added)}, " if added else ""
    prefill = len(prompting.encode_prefill(tokenizer))
    for name, key, new_tokens, questions in held_out:
        for number, (request, context) in enumerate(questions, 1):
            instruction = request if name in ("test", "harmful") else prompting.wrap(request)
            length = len(prompting.encode(tokenizer, instruction, context, positions + 1))
            length += 0 if name == "test" else prefill
            if length + new_tokens - 1 > positions:
                tokens = f"more than {positions}" if length > positions else f"{length}"
                raise UserError(
                    f"source.{name}, prompt {number} of the evaluation: it takes {tokens} tokens and its answer up to "
                    f"{key}={new_tokens}, more than the {positions} positions of the model. Fix: leave it out "
                    f"(source.{name}.where, skip or take), set a smaller {key}, {shorter}or choose another model"
                )


def _held_out_prompts(settings: RunSettings, rows: Rows, kl_rows: Sequence[Row]) -> Iterator[HeldOut]:
    """Yield for each held-out set its name, key and value of its answers' length, and pairs of prompt and context."""
    safety = ("evaluate.max_new_tokens", settings.evaluate.max_new_tokens)
    for section, sets in (("harmful_prompts", rows.harmful_prompts), ("harmless_prompts", rows.harmless_prompts)):
        for name, prompts in sets.items():
            yield f"{section}.{name}".removesuffix("."), *safety, [(prompt, "") for prompt in prompts]
    yield "harmful", *safety, [(row.instruction, row.context) for row in kl_rows]
    test = [(row.instruction, row.context) for row in rows.test]
    yield "test", "task.max_new_tokens", settings.task.max_new_tokens, test


def _try_defenses(base: Path, settings: RunSettings, defenses: Defenses) -> None:
    """Attach the adapters to a model without weights, and initialize the defenses on it."""
    deltas: dict[str, Delta] = {}
    if defenses.align is not None:
        net = _meta_peft_model(base, settings, settings.align.lora, "align.lora")
        _init_method(defenses.align, net, {})
        deltas = dict.fromkeys(modules(trainable(net)), Delta(torch.ones(1, 1)))
    if defenses.method is not None:
        continued = defenses.align is not None and settings.model.adapters == "continued"
        lora, key = (settings.align.lora, "align.lora") if continued else (settings.lora, "lora")
        if lora is None:
            net = _meta_model(base, settings).requires_grad_(True)
        else:
            net = _meta_peft_model(base, settings, lora, key)
        _init_method(defenses.method, net, deltas)
        if defenses.repair is not None:
            defenses.repair.check(net, deltas)


def _try_supplied(base: Path, settings: RunSettings, defenses: Defenses, supplied: Supplied) -> None:
    """Attach the supplied adapters to models without weights, and check that the adapter can be repaired."""
    refuse_other_base(settings, supplied, base)
    served = _meta_model(supplied.served_folder(base), settings)
    net = attach_empty(served, supplied.adapter, f"adapter={settings.adapter}", "name the model that it was trained on")
    initial = _meta_model(base, settings)
    if settings.evaluate.kl_rows:
        _refuse_other_vocabulary(served, initial)
    changed = []
    if supplied.alignment is not None:
        error_prefix, fix = f"aligned={settings.aligned}", "set model.id to the model that it was trained on"
        aligned = attach_empty(initial, supplied.alignment, error_prefix, fix)
        changed = list(modules(trainable(aligned)))
    elif supplied.aligned_folder is not None:
        changed = list(modules(trainable(net)))
        refuse_other_layers(net, initial, changed)
    if defenses.repair is not None:
        defenses.repair.check(net, dict.fromkeys(changed, Delta(torch.ones(1, 1))))


def _refuse_other_vocabulary(served: PreTrainedModel, initial: PreTrainedModel) -> None:
    """Raise UserError if two models have other numbers of tokens, so that no divergence between them is defined."""
    models: list[Any] = [served, initial]
    tokens = [len(model.get_input_embeddings().weight) for model in models]
    if tokens[0] != tokens[1]:
        raise UserError(
            f"evaluate.kl_rows: the aligned model has {tokens[0]} tokens and model.id {tokens[1]}, which leaves no "
            "divergence between them. Fix: evaluate.kl_rows=0, or set model.id to the model that was aligned"
        )


def _meta_peft_model(base: Path, settings: RunSettings, lora: Lora, key: str) -> PeftModel:
    """Return a model without weights that has the adapter of a config section, and check the adapter's rank."""
    model = _meta_model(base, settings)
    with torch.device("meta"):
        net = attach(model, lora, 0, key)
    factors = trainable(net)
    max_rank = max(min(factors[a].shape[1], len(factors[b])) for a, b in modules(factors).values())
    if lora.r > max_rank:
        raise UserError(f"{key}.r={lora.r} is above the rank of every adapted matrix. Fix: {key}.r={max_rank} or less")
    return net


def _init_method(method: Method, net: Any, deltas: dict[str, Delta]) -> None:
    method.init(Backprop(net, lambda *_: iter(()), lambda: deltas))
