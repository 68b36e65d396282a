"""Further Lightning loggers of a run, from the config group `logger`: `stage_loggers`."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger

from lisa_lightning.config.instances import load_class
from lisa_lightning.runtime.errors import UserError, first_line, printable


def stage_loggers(sections: Mapping[str, Any], out: Path, stage: str) -> list[Logger]:
    """Return the configured loggers of a stage.

    Args:
        sections: name -> `_target_` and arguments.
        out: the output folder, where a logger saves unless its section has another `save_dir`.
        stage: finetune or align; version or run name of a logger without its own.

    Raises:
        UserError: if a logger cannot be created, as without the package that it needs.
    """
    loggers = []
    for name, section in sections.items():
        accepted = inspect.signature(load_class(section["_target_"], f"logger.{name}")).parameters
        label = "version" if "version" in accepted else "run_name"
        defaults = {"save_dir": str(out), label: stage}
        arguments = {key: value for key, value in defaults.items() if key in accepted and key not in section}
        try:
            loggers.append(instantiate(dict(section), **arguments))
        except Exception as error:
            cause = error.__cause__ or error
            raise UserError(
                f"logger.{name}: {printable(first_line(cause))[:200]}. Fix: install what it needs, or leave it out"
            ) from error
    return loggers
