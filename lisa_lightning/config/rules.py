"""Allowed values of the config keys: `RULES` has a test for each key, and a description for error messages."""

import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lisa_lightning.config.fields import (
    Check,
    field_checks,
)
from lisa_lightning.config.settings import SECTIONS, SETS, RowSet, TrainerSettings
from lisa_lightning.runtime.errors import UserError, printable

MAX_QUOTED_CHARS = 120
"""Maximum number of characters of a value in an error message."""
SET_RULES = field_checks(RowSet)
"""Rules of a set of a source, which is a file or a hub data set."""
LOCAL_SET_KEYS = ("path", "header", "columns", "labels", "where", "skip", "take")
"""Keys that every set has. The other keys belong to a hub data set."""
RULES: dict[str, Check] = {
    **{
        f"{section}.{name}".removeprefix("."): check
        for section, kind in SECTIONS.items()
        for name, check in field_checks(kind).items()
    },
    "judge.linear.rows": (lambda v: isinstance(v, DictConfig), "a mapping with path and more"),
    "judge.linear.rows.path": (lambda v: isinstance(v, str), "the path of a file"),
    **{f"judge.linear.rows.{key}": SET_RULES[key] for key in LOCAL_SET_KEYS if key != "path"},
    **{f"source.{name}": (lambda v: isinstance(v, DictConfig), "a mapping with path and more") for name in SETS},
}
TRAINER_ALTERNATIVES = {
    "accumulate_grad_batches": "optim.accumulate",
    "gradient_clip_val": "optim.clip",
    "gradient_clip_algorithm": "optim.clip",
    "max_steps": "optim.steps",
    "max_epochs": "optim.epochs",
    "min_steps": "optim.steps",
    "min_epochs": "optim.epochs",
    "val_check_interval": "evaluate.every",
    "check_val_every_n_epoch": "evaluate.every",
    "limit_val_batches": "evaluate.curve_rows",
    "limit_train_batches": "optim.steps",
    "overfit_batches": "data.n",
    "fast_dev_run": "experiment=smoke",
    "log_every_n_steps": "logger, which gets every step",
    "enable_checkpointing": "checkpoint.every",
    "default_root_dir": "hydra.run.dir",
    "logger": "logger=csv, tensorboard or mlflow",
    "callbacks": "callbacks=NAME",
    "ckpt_path": "resume=true",
}
"""Trainer argument that manual optimization rules out -> the config key to use instead."""
TRAINER_KEYS = tuple(TrainerSettings.__pydantic_fields__)  # type: ignore[attr-defined]


def not_allowed(key: str, value: Any, allowed: str) -> UserError:
    """Return the error for a wrong value of a key.

    Args:
        key: the key, with dots.
        value: its wrong value.
        allowed: description of the allowed values.
    """
    return UserError(f"{key}={quoted(value)} is not allowed; it must be {allowed}")


def quoted(value: Any) -> str:
    """Return a value for an error message: shortened, and without the parts of a URL that may be secret.

    These parts are the password, the query and the fragment.
    """
    text = str(OmegaConf.to_container(value)) if isinstance(value, ListConfig | DictConfig) else str(value)
    text = re.sub(r"(\w+://)\S*(?=@)|\S*:\S*(?=@)", r"\1...", text)
    text = re.sub(r"(?<=[?#])\S+", "...", text) if "://" in text else text
    text = printable(text)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."
