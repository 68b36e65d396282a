"""Identity of a run: `result_settings` returns the settings that its results depend on."""

from collections.abc import Mapping
from typing import Any, Final

from lisa_lightning.config.validate import flat
from lisa_lightning.runtime.errors import UserError

BOOKKEEPING_SECTIONS: Final = ("resume", "cache_dir", "wandb", "checkpoint", "logger")
"""Sections that do not change a result. They may differ between a finished run and a requested one."""
BOOKKEEPING_TRAINER_KEYS: Final = (
    *("trainer.timeout_min", "trainer.max_time", "trainer.detect_anomaly", "trainer.profiler"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.shard"),
    "trainer.activation_checkpointing",
)
"""Trainer arguments that do not change a result."""
BOOKKEEPING_ENGINE_KEYS: Final = tuple(
    f"engine.{key}" for key in ("api_key_variable", "concurrency", "retries", "timeout_s", "start_timeout_s")
)
"""Keys of an engine that do not change an answer."""
RESUMABLE_SECTIONS: Final = ("stages", "judge", "responses")
"""Sections in which a run and its resumption may differ: further stages and judges add results."""


def is_bookkeeping(key: str) -> bool:
    """Return whether a key does not change a result."""
    section = key.partition(".")[0].partition("/")[0]
    if key.startswith("sweep."):
        # The objective of a search chooses its runs, and changes none of them.
        return True
    return key in (*BOOKKEEPING_TRAINER_KEYS, *BOOKKEEPING_ENGINE_KEYS) or section in ("hydra", *BOOKKEEPING_SECTIONS)


def result_settings(config: Mapping[Any, Any], resumable: bool = False) -> dict[str, Any]:
    """Return the settings that determine a result, by key with dots.

    Args:
        config: the nested config.
        resumable: whether to leave out what may differ between a run and its resumption.
    """
    excluded = RESUMABLE_SECTIONS if resumable else ()
    settings = {key: value for key, value in flat(config) if not is_bookkeeping(key)}
    return {key: value for key, value in settings.items() if key.partition(".")[0] not in excluded}


def refuse_other_run(stored: Mapping[Any, Any], requested: Mapping[Any, Any]) -> None:
    """Check that stored files are of the requested run.

    Args:
        stored: nested settings of the run that wrote the files.
        requested: nested settings of this run.

    Raises:
        UserError: if a setting differs, with the first three that do.
    """
    old, new = dict(flat(stored)), dict(flat(requested))
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {old.get(key)} stored, {new.get(key)} requested" for key in differing[:3])
        raise UserError(
            f"The output folder is of another run ({shown}). "
            "Fix: set another hydra.run.dir; if a sweep chose the folder, delete it"
        )
