"""Names of runs, derived from their defenses, model and task. Start at `build_run_name`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from lisa_lightning.config.paths import CONF
from lisa_lightning.config.requirements import active_defenses

MODELS: Final = CONF / "model"
PLAIN_ALIGNMENT: Final = "sft"
"""Alignment without a defense, which run names omit."""


@dataclass(frozen=True)
class RunName:
    """Name of a run: its choices, which distinguish it from other runs."""

    defenses: Mapping[str, str]
    """Config group -> chosen defense, for the stages that run, in their order."""
    model: str
    task: str
    adapter: str | None = None
    """Name of the adapter that the user supplies; None if the run trains one."""
    attack: str | None = None
    """Chosen attack; None without one."""
    filter: str | None = None
    """Chosen filter of the user's rows; None without one, or if nothing is fine-tuned."""
    is_full: bool = False
    """True if fine-tuning trains all weights instead of an adapter."""

    @property
    def evaluates_final(self) -> bool:
        """True if the run ends with another adapter than it begins with, by fine-tuning or by a repair."""
        return self.finetunes or "repair" in self.defenses

    @property
    def finetunes(self) -> bool:
        """True if the run fine-tunes a model."""
        return "method" in self.defenses

    @property
    def parts(self) -> list[str]:
        """The defenses and the attack as parts of a name, such as ["vaccine", "lisa"]; never empty."""
        return [*self._defense_parts, *([self.attack] if self.attack else [])]

    @property
    def _defense_parts(self) -> list[str]:
        if self.adapter is not None:
            return ["adapter", *self.defenses.values()]
        choices = [choice for group, choice in self.defenses.items() if (group, choice) != ("align", PLAIN_ALIGNMENT)]
        choices += [f"{self.filter}_filter"] if self.filter else []
        if self.finetunes:
            return choices if "align" in self.defenses else ["no_align", *choices]
        return ["align", *choices] if "align" in self.defenses else ["evaluate"]

    @property
    def heading(self) -> str:
        """The name as a heading of the report."""
        return f"{self._defense_heading} under {self.attack}" if self.attack else self._defense_heading

    @property
    def _defense_heading(self) -> str:
        if self.finetunes:
            return f"{' + '.join(self._defense_parts)} on {self.task}{' (full-parameter)' if self.is_full else ''}"
        defenses = " + ".join(self.defenses.values())
        if self.adapter is not None:
            return f"{self.adapter} repaired by {defenses}" if defenses else f"{self.adapter} as it is"
        return f"{self.model} aligned by {defenses}" if defenses else f"{self.model} as it is"


def build_run_name(config: Mapping[str, Any], choices: Mapping[str, str]) -> RunName:
    """Return the run name of a config.

    Args:
        config: key with dots -> value.
        choices: config group -> chosen option.
    """
    defenses = {group: choices.get(group, "?") for group in active_defenses(config)}
    model = _model_name(config.get("model.id"), choices.get("model", "?"))
    adapter = config.get("adapter")
    return RunName(
        defenses,
        model,
        choices.get("task", "?"),
        None if adapter is None else _last_parts(str(adapter)),
        _choice("attack", config, choices),
        _choice("filter", config, choices) if "method" in defenses else None,
        "method" in defenses and config.get("lora", "absent") is None,
    )


def _choice(group: str, config: Mapping[str, Any], choices: Mapping[str, str]) -> str | None:
    """Return the chosen option of a group whose option `none` has no keys; None for that option."""
    return choices.get(group, "?") if any(key.startswith(f"{group}.") for key in config) else None


def _last_parts(folder: str) -> str:
    """Return the end of an adapter's path. A run's adapter is the folder `adapter` in that of the run."""
    parts = Path(folder).parts
    return "/".join(parts[-2:] if parts[-1:] == ("adapter",) else parts[-1:]) or folder


def _model_name(id: Any, choice: str) -> str:
    """Return the chosen option if the id is its default, else the last part of the hub id or folder."""
    return choice if id is None or id == _default_id(choice) else Path(str(id)).name or str(id)


@cache
def _default_id(choice: str) -> Any:
    # The option may come from a foreign choices.json, and must not lead to another folder.
    file = MODELS / f"{choice}.yaml"
    return OmegaConf.select(OmegaConf.load(file), "id") if Path(choice).name == choice and file.exists() else None
