"""Requirements of defenses on the config. Start at `check_requirements`."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal, Protocol

from lisa_lightning.config.optim import Optim
from lisa_lightning.config.settings import RunSettings
from lisa_lightning.runtime.errors import UserError

Requirement = Literal[
    "adapter",
    "defender_rows",
    "alignment_update",
    "alignment_adapter",
    "stacked_adapters",
    "single_micro_batch",
    "repair_without_reference",
    "whole_model",
]
"""Requirement of a defense on the config:

- adapter: a LoRA adapter to train, `lora` that is not null
- defender_rows: the provider's harmful rows, `source.defender`
- alignment_update: the update that the stage align makes to the model
- alignment_adapter: that update as an adapter, which has low rank
- stacked_adapters: a separate fine-tuning adapter on the aligned model
- single_micro_batch: all rows of each batch of a step in one micro-batch of one process
- repair_without_reference: no repair that compares the adapter with a reference of rank `lora.r`
- whole_model: a model that one rank can hold, not `trainer.shard`
"""


class Defense(Protocol):
    """A selector, a method, a repair, or an attack, which has requirements too."""

    @property
    def requirements(self) -> Set[Requirement]:
        """Requirements on the config."""
        ...


def active_defenses(config: Mapping[str, Any]) -> list[str]:
    """Return the config groups whose defense runs, in the order of the stages.

    Args:
        config: key with dots -> value. It may be invalid.
    """
    value = config.get("stages")
    stages = value if isinstance(value, list) else []
    sections = {s for s in ("curate", "align.method", "repair") if any(key.startswith(f"{s}.") for key in config)}
    align = "align" in stages and "align.method" in sections
    has_adapter = "finetune" in stages or config.get("adapter") is not None
    active = {
        "curate": align and "curate" in stages and "curate" in sections,
        "align": align,
        "method": "finetune" in stages,
        "repair": has_adapter and "repair" in stages and "repair" in sections,
    }
    return [group for group, runs in active.items() if runs]


def check_requirements(
    defenses: Mapping[str, Defense], choices: Mapping[str, str], settings: RunSettings, processes: int
) -> None:
    """Check that the config meets the requirements of the defenses.

    Args:
        defenses: config group -> defense of the stages that run, or attack.
        choices: config group -> chosen option.
        settings: the settings of the run.
        processes: number of processes, among which the rows of a step are sharded.

    Raises:
        UserError: if a requirement is not met, with the setting that meets it.
    """
    if "curate" in settings.stages and choices["curate"] != "none" and "curate" not in defenses:
        raise UserError(
            f"curate={choices['curate']}: selects rows for stage align, which does not run. "
            "Fix: run stage align (not align=none)"
        )
    if "repair" in settings.stages and choices["repair"] != "none" and "repair" not in defenses:
        raise UserError(
            f"repair={choices['repair']}: repairs the adapter of stage finetune, which does not run. "
            "Fix: add finetune to stages, or set adapter=FOLDER"
        )
    if "method" in defenses and "align" not in defenses and settings.model.adapters == "continued":
        raise UserError(
            "model.adapters=continued: continues the adapter of stage align, which does not run. "
            "Fix: run stage align (not align=none), or set model.adapters=stacked for a fresh adapter"
        )
    if settings.lora is None:
        _require_adapter(defenses, choices)
    if settings.trainer.shard:
        _check_shards(defenses, choices, settings, processes)
    if settings.adapter is not None:
        _check_alignment_update(defenses, choices, settings.aligned)
    defender = settings.source["defender"]
    for group, defense in defenses.items():
        choice = f"{group}={choices[group]}"
        if "defender_rows" in defense.requirements and defender.path is None and defender.hub is None:
            raise UserError(
                f"{choice}: needs defender rows, and source.defender has none. "
                "Fix: set source.defender.path to a file with prompt and response"
            )
        is_unknown = "align" not in defenses or settings.model.adapters == "continued"
        if "alignment_update" in defense.requirements and settings.adapter is None and is_unknown:
            raise UserError(
                f"{choice}: needs the alignment update. "
                f"Fix: run stage align (not align=none) with model.adapters=stacked (now {settings.model.adapters})"
            )
        is_continued = settings.adapter is None and settings.model.adapters == "continued"
        if "stacked_adapters" in defense.requirements and is_continued:
            raise UserError(
                f"{choice}: needs a separate adapter on the aligned model. "
                "Fix: set model.adapters=stacked (now continued)"
            )
        if "repair_without_reference" in defense.requirements and "repair" in defenses and settings.reference:
            raise UserError(
                f"{choice}: saves an adapter of another rank than lora.r, and repair={choices['repair']} compares it "
                "with a reference of that rank. Fix: choose another repair"
            )
        if "single_micro_batch" in defense.requirements:
            key, optim = ("align.optim", settings.align.optim) if group == "align" else ("optim", settings.optim)
            _require_single_micro_batch(choice, defense, key, optim, processes)


def _check_shards(
    defenses: Mapping[str, Defense], choices: Mapping[str, str], settings: RunSettings, processes: int
) -> None:
    """Raise UserError if a part of the run can't work with a sharded model."""
    whole = {f"{group}={choices[group]}": "whole_model" in d.requirements for group, d in defenses.items()}
    if "evaluate" in settings.stages:
        whole |= {
            "evaluate.kl_rows": settings.evaluate.kl_rows > 0,
            "evaluate.lm_eval": bool(settings.evaluate.lm_eval),
        }
    reasons = [
        f"{name} runs the whole model on one rank. Fix: leave it out" for name, applies in whole.items() if applies
    ]
    if processes == 1:
        reasons.append("there is one process, and nothing to shard over. Fix: trainer.devices=2 or more")
    if settings.model.quantize is not None:
        reasons.append("4-bit weights (model.quantize) can't be sharded. Fix: model.quantize=null")
    if settings.lora is None and "finetune" in settings.stages:
        reasons.append("lora=null trains the weights that would be sharded. Fix: leave lora=null out")
    if reasons:
        raise UserError(f"trainer.shard=true: {reasons[0]}, or trainer.shard=false")


def _require_adapter(defenses: Mapping[str, Defense], choices: Mapping[str, str]) -> None:
    """Raise UserError if a defense needs the adapter of fine-tuning, which full-parameter fine-tuning does not have."""
    method = defenses.get("method")
    if method is not None and "adapter" in method.requirements:
        raise UserError(
            f"method={choices['method']}: works on the factors of a LoRA adapter, and lora=null trains all weights. "
            "Fix: leave lora=null out, or choose a method for any weights, as sft, lisa, ewc, kl or vlguard"
        )
    if "repair" in defenses:
        raise UserError(
            f"repair={choices['repair']}: repairs a LoRA adapter, and lora=null trains all weights. "
            "Fix: leave lora=null out, or repair=none"
        )


def _check_alignment_update(defenses: Mapping[str, Defense], choices: Mapping[str, str], aligned: str | None) -> None:
    """Raise UserError if a repair needs more of the alignment update than config key `aligned` supplies."""
    for group, defense in defenses.items():
        choice = f"{group}={choices[group]}"
        if "alignment_update" in defense.requirements and aligned is None:
            raise UserError(
                f"{choice}: it needs the alignment update. Fix: aligned=FOLDER, the aligned model or its adapter, and "
                "model.id=ID, the model before alignment"
            )
        if "alignment_adapter" in defense.requirements and not is_adapter_folder(aligned):
            raise UserError(
                f"{choice}: it needs the alignment update as an adapter, and aligned={aligned} is none. "
                "Fix: aligned=FOLDER of the alignment adapter, or choose another repair"
            )


def is_adapter_folder(name: str | None) -> bool:
    """Return whether a name is the path of a folder that holds an adapter in peft's format."""
    try:
        return name is not None and (Path(name).expanduser() / "adapter_config.json").is_file()
    except (OSError, RuntimeError, ValueError):
        # A name that is too long, holds a NUL, or begins with an unknown `~user` names no folder.
        return False


def _require_single_micro_batch(choice: str, defense: Any, key: str, optim: Optim, processes: int) -> None:
    """Raise UserError if a batch of a step is split.

    Args:
        choice: the defense as GROUP=NAME.
        defense: a method with the requirement.
        key: config section of `optim`.
        optim: settings of its optimizer.
        processes: number of processes.
    """
    if optim.accumulate * processes > 1:
        raise UserError(
            f"{choice}: needs all rows of a step in one micro-batch. "
            f"Fix: {key}.accumulate=1 (now {optim.accumulate}) and one process (now {processes})"
        )
    largest = max(size or 0 for draw in defense.plan(0).values() for size in (draw.size, *draw.further))
    if largest > optim.batch_size:
        raise UserError(
            f"{choice}: needs all rows of a batch in one micro-batch, and has batches of {largest} rows. "
            f"Fix: {key}.batch_size={largest} or more (now {optim.batch_size})"
        )
