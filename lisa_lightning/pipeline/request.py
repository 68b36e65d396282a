"""The input of a run: `Request`, a config with its output folder and how it was composed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig


@dataclass(frozen=True)
class Request:
    """A run that is requested by the command, by a job of a sweep, or from Python."""

    cfg: DictConfig
    """Whole config, without Hydra's section; `config.validate.check` has accepted it."""
    out: Path
    """Output folder."""
    choices: Mapping[str, str]
    """Config group -> chosen option, without Hydra's groups."""
    overrides: Sequence[str] = ()
    """Overrides that the config was composed with."""
    job: str | None = None
    """Folder of the job within its sweep; None for a run without a sweep."""

    @classmethod
    def from_hydra(cls, cfg: DictConfig, hydra: Any, out: Path, job: str | None = None) -> "Request":
        """Return the request of a composed config.

        Args:
            cfg: the config without Hydra's section.
            hydra: Hydra's section of the composed config.
            out: output folder.
            job: folder of the job within its sweep.
        """
        choices = {name: str(choice) for name, choice in hydra.runtime.choices.items() if not name.startswith("hydra/")}
        return cls(cfg, out, choices, list(hydra.overrides.task), job)
