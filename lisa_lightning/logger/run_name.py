"""What a run is, for all that names it: the defenses of the stages that run, the model, the task."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from lisa_lightning.config.paths import CONF
from lisa_lightning.config.requirements import defending

MODELS: Final = CONF / "model"
PLAIN: Final = "sft"  # how a provider aligns who does no more than that: it goes without saying


@dataclass(frozen=True)
class Identity:
    """What tells a run from others, beside its numbers."""

    defenses: Mapping[str, str]
    """Config group -> its choice, of those that defend in the stages that run, in their order."""
    model: str
    task: str

    @property
    def tuned(self) -> bool:
        """Whether it fine-tunes a model, or asks one as it is."""
        return "method" in self.defenses

    @property
    def words(self) -> list[str]:
        """What it does, in the words of the config; never none."""
        said = [choice for group, choice in self.defenses.items() if (group, choice) != ("align", PLAIN)]
        if self.tuned:
            return said if "align" in self.defenses else ["no_align", *said]
        return ["align", *said] if "align" in self.defenses else ["evaluate"]

    @property
    def heading(self) -> str:
        """The same for people."""
        if self.tuned:
            return f"{' + '.join(self.words)} on {self.task}"
        by = " + ".join(self.defenses.values())
        return f"{self.model} aligned by {by}" if by else f"{self.model} as it is"


def identity(config: Mapping[str, Any], choices: Mapping[str, str]) -> Identity:
    """What the run of a config is.

    Args:
        config: key with dots -> value.
        choices: config group -> the chosen file.
    """
    defenses = {group: choices.get(group, "?") for group in defending(config)}
    return Identity(defenses, _model(config.get("model.id"), choices.get("model", "?")), choices.get("task", "?"))


def _model(id: Any, choice: str) -> str:
    """The choice's name while the id is its own, else the last part of the id, a hub's or a folder."""
    return choice if id is None or id == _own_id(choice) else Path(str(id)).name or str(id)


@cache
def _own_id(choice: str) -> Any:
    # A name out of somebody else's choices.json must not lead to another folder.
    file = MODELS / f"{choice}.yaml"
    return OmegaConf.select(OmegaConf.load(file), "id") if Path(choice).name == choice and file.exists() else None
