"""Repair of an adapter in memory from Python: `repair`, exported as `lisa_lightning.repair`."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lisa_lightning.config.fields import Template
from lisa_lightning.data.encoding import Encoder, iter_padded
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row, as_row
from lisa_lightning.model.alignment_delta import Delta, alignment_factors, dense_deltas, low_rank_deltas
from lisa_lightning.model.factors import Factors, modules, on_device
from lisa_lightning.model.lora import lora_scaling, replace_adapter
from lisa_lightning.model.lora_folder import read_lora, refuse_special
from lisa_lightning.repair.base import Repair, RepairInputs
from lisa_lightning.runtime.errors import UserError

AnyRow = Row | Mapping[str, Any]


def repair(
    model: PeftModel,
    repair: Repair,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    alignment: Sequence[AnyRow] = (),
    defender: Sequence[AnyRow] = (),
    base: PreTrainedModel | None = None,
    alignment_adapter: str | Path | None = None,
    reference: PeftModel | None = None,
    template: Template = "chat",
    max_length: int = 256,
    batch_size: int = 48,
) -> PeftModel:
    """Repair the LoRA adapter of a model in memory.

    Only those arguments are needed that the repair reads; `RepairInputs` describes them. A missing one is an error.

    Args:
        model: the aligned model with the finished adapter, on its device. Its adapter is plain LoRA named `default`.
        repair: the repair, such as `Antidote()`.
        tokenizer: tokenizer of the model, for a repair that reads rows.
        alignment: alignment rows, for `NLSR`.
        defender: harmful rows of the provider, for `Antidote`.
        base: the model before alignment, for `SafeLoRA` and `SafeMerge`.
        alignment_adapter: folder of the alignment adapter on that model, instead of `base`. `TaskArithmetic` needs it.
        reference: a safe adapter on the same model with the same shapes and alpha/r, for `NLSR` and `SafeMerge`.
        template: template of the rows: chat, alpaca or alpaca_newline.
        max_length: maximum number of tokens of a row; the rest is truncated.
        batch_size: rows that are padded together.

    Returns:
        The model with the repaired adapter, in the training mode of `model`. It is `model` itself, unless the repair
        changes the adapter's rank or modules. Then `model` must not be used afterwards.

    Raises:
        UserError: if the adapter is no plain LoRA adapter, or the repair lacks an argument or can't repair the adapter.
    """
    _refuse_other_adapters(model, "model")
    config: Any = model.peft_config["default"]
    device = next(model.parameters()).device
    states = {name: weight.requires_grad for name, weight in model.named_parameters() if ".lora_" in name}
    encoder = None if tokenizer is None else Encoder(tokenizer, template, max_length)
    streams: dict[Stream, Sequence[AnyRow]] = {"alignment": alignment, "defender": defender}

    def rows(stream: Stream) -> Iterable[Pack]:
        if encoder is None or not streams[stream]:
            raise _missing(repair, "tokenizer" if encoder is None else stream)
        return iter_padded([as_row(row) for row in streams[stream]], encoder, batch_size)

    @cache
    def deltas() -> dict[str, Delta]:
        if alignment_adapter is not None:
            updates = low_rank_deltas(_checked(alignment_adapter))
        elif base is not None:
            updates = dense_deltas(model, base, modules(states))
        else:
            raise _missing(repair, "base")
        return {name: delta.to(device) for name, delta in updates.items()}

    def alignment_update() -> Factors:
        if alignment_adapter is None:
            raise _missing(repair, "alignment_adapter")
        scaling = lora_scaling(config.r, config.lora_alpha, config.use_rslora)
        return on_device(device, alignment_factors(_checked(alignment_adapter), scaling))

    def reference_factors() -> Factors:
        if reference is None:
            raise _missing(repair, "reference")
        _refuse_other_adapters(reference, "reference")
        return on_device(device, _factors(reference))

    # An adapter that was loaded for inference is frozen, and repairs know factors by their gradients.
    _set_trainable(model, dict.fromkeys(states, True))
    training = model.training
    try:
        repair.check(model, deltas() if "alignment_update" in repair.requirements else {})
        inputs = RepairInputs(_factors(model), lambda: model, rows, deltas, alignment_update, reference_factors)
        repaired = replace_adapter(model, repair.repair(inputs).factors)
    finally:
        _set_trainable(model, states)
    return repaired.train(training)


def _refuse_other_adapters(model: Any, argument: str) -> None:
    """Raise UserError if an argument is no model with one unmerged plain LoRA adapter."""
    if not isinstance(model, PeftModel) or list(model.peft_config) != ["default"]:
        raise UserError(f"{argument}: it is no PeftModel with one adapter named default. Fix: pass such a model")
    settings = model.peft_config["default"].to_dict() | {"task_type": "CAUSAL_LM"}
    refuse_special(argument, settings, "pass a model with a plain LoRA adapter (no DoRA, no rank_pattern)")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise UserError(f"{argument}: its adapter is merged. Fix: call model.unmerge_adapter() first")


def _missing(repair: Repair, argument: str) -> UserError:
    """Return the error for an argument that a repair needs."""
    return UserError(f"{type(repair).__name__}: it needs the argument {argument}. Fix: pass {argument}=...")


def _checked(folder: str | Path) -> Path:
    """Return the folder of an adapter. Raise UserError if it is not that of a plain LoRA adapter."""
    path = Path(folder).expanduser()
    read_lora(path, f"alignment_adapter={folder}", "name the folder of a plain LoRA adapter")
    return path


def _factors(model: PeftModel) -> Factors:
    """Return the factors of a model's adapter."""
    return {name: weight.detach() for name, weight in model.named_parameters() if ".lora_" in name}


def _set_trainable(model: PeftModel, states: Mapping[str, bool]) -> None:
    for name, weight in model.named_parameters():
        if name in states:
            weight.requires_grad_(states[name])
