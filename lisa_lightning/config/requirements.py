"""What each defense of a run needs beside its own rows and model, and the refusal where the config can't give it."""

from collections.abc import Mapping, Set
from typing import Any, Literal, Protocol

from omegaconf import OmegaConf

from lisa_lightning.runtime.errors import UserError

Need = Literal["defender rows", "aligned change", "stacked adapters", "undivided steps"]
"""Harmful rows of the provider's own (`source.defender`); what the stage align changed in the model; an adapter of
fine-tuning's own on the aligned model; a step's rows in one micro-batch of one process."""


class Defense(Protocol):
    """A choice of rows, a method or a repair."""

    @property
    def needs(self) -> Set[Need]:
        """What it can't do without."""
        ...


def defending(config: Mapping[str, Any]) -> list[str]:
    """The config groups whose choice defends in the stages that run, in the order of these.

    Args:
        config: key with dots -> value; may be a refused one.
    """
    found = config.get("stages")
    stages = found if isinstance(found, list) else []
    chosen = {p for p in ("curate", "align.method", "repair") if any(key.startswith(f"{p}.") for key in config)}
    align = "align" in stages and "align.method" in chosen
    there = {
        "curate": align and "curate" in stages and "curate" in chosen,
        "align": align,
        "method": "finetune" in stages,
        "repair": "finetune" in stages and "repair" in stages and "repair" in chosen,
    }
    return [group for group, defends in there.items() if defends]


def refuse_unmet(defenses: Mapping[str, Defense], choices: Mapping[str, str], cfg: Any, processes: int) -> None:
    """Refuse what the config can't give.

    Args:
        defenses: those of the stages that run, by config group.
        choices: config group -> what was chosen.
        processes: among which a step's rows are shared out.

    Raises:
        UserError: the choice, and what would give it what it needs.
    """
    if "curate" in cfg.stages and cfg.curate and "curate" not in defenses:
        raise UserError(
            f"curate={choices['curate']} chooses the rows to align on: it needs the stage align, with another choice "
            "than align=none"
        )
    if "repair" in cfg.stages and cfg.repair and "repair" not in defenses:
        raise UserError(f"repair={choices['repair']} repairs what fine-tuning made: it needs the stage finetune")
    if "method" in defenses and "align" not in defenses and cfg.model.adapters == "continued":
        raise UserError(
            "model.adapters=continued goes on with the adapter that aligning trained: it needs the stage align with "
            "another choice than align=none; model.adapters=stacked trains a fresh one"
        )
    defender = cfg.source.defender
    for group, defense in defenses.items():
        choice = f"{group}={choices[group]}"
        if "defender rows" in defense.needs and defender.path is None and defender.get("hub") is None:
            raise UserError(
                f"{choice} needs defender rows, and this source has none: "
                "give a file as source.defender.path, with prompt and response"
            )
        if "aligned change" in defense.needs and ("align" not in defenses or cfg.model.adapters == "continued"):
            raise UserError(
                f"{choice} holds on to what aligning changed, which is not told apart here: it needs the stage "
                f"align with another choice than align=none, and model.adapters=stacked (now {cfg.model.adapters})"
            )
        if "stacked adapters" in defense.needs and cfg.model.adapters == "continued":
            raise UserError(
                f"{choice} compares adapters on the aligned model: it needs model.adapters=stacked (now continued)"
            )
        optim = "align.optim" if group == "align" else "optim"
        micro_batches = OmegaConf.select(cfg, f"{optim}.accumulate", default=1)
        if "undivided steps" in defense.needs and micro_batches * processes > 1:
            raise UserError(
                f"{choice} looks at all rows of a step together here: it needs {optim}.accumulate=1 "
                f"(now {micro_batches}) and one process (now {processes})"
            )
