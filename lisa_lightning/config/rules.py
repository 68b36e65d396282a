"""Allowed values of the config keys: `RULES` has a test for each key, and a description for error messages."""

import re
from typing import Annotated, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import Field

from lisa_lightning.config.fields import (
    Check,
    Count,
    NonNegative,
    OpenShare,
    Positive,
    Words,
    check_of,
    field_checks,
)
from lisa_lightning.config.settings import SECTIONS, SETS, RowSet, TrainerSettings
from lisa_lightning.runtime.errors import UserError, printable


def _is_filled(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_public_url(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"https?://[^{PRIVATE_CHARACTERS}\s]+", value) is not None


MAX_QUOTED_CHARS = 120
"""Maximum number of characters of a value in an error message."""


def _optional(check: Check) -> Check:
    return (lambda v: v is None or check[0](v), f"{check[1]}, or null")


def _one_of(*values: str) -> Check:
    return (lambda v: v in values, " or ".join(values))


TEXT: Check = (_is_filled, "a name")
PHRASE: Check = (_is_filled, "a text")
SET_RULES = field_checks(RowSet)
"""Rules of a set of a source, which is a file or a hub data set."""
LOCAL_SET_KEYS = ("path", "header", "columns", "labels", "where", "skip", "take")
"""Keys that every set has. The other keys belong to a hub data set."""
PRIVATE_CHARACTERS = "@?#"
"""Characters that start a password, a query or a fragment of a URL. Messages, files and folder names must not contain
these parts."""
ENDPOINT_RULES: dict[str, Check] = {
    "model": TEXT,
    "base_url": _optional(
        (_is_public_url, "http(s)://... without @, ? and #; an address with a password belongs into OPENAI_BASE_URL")
    ),
    "rubric": PHRASE,
    "usd_per_million_input": check_of(NonNegative),
    "usd_per_million_output": check_of(NonNegative),
    "max_cost_usd": check_of(Positive),
    "max_output_tokens": check_of(Count),
    "concurrency": check_of(Annotated[int, Field(gt=0, le=1024)]),
    "retries": check_of(Annotated[int, Field(ge=0, le=100)]),
    "timeout_s": check_of(Annotated[float, Field(gt=0, le=86400)]),
    "temperature": _optional(check_of(Annotated[float, Field(ge=0, le=2)])),
}
ID: Check = (_is_filled, "a hub id or a folder")
STRING: Check = (lambda v: isinstance(v, str), "a text")
DTYPE = _one_of("float32", "bfloat16", "float16")
JUDGES: dict[str, dict[str, Check]] = {
    "moderation": {
        "id": ID,
        "revision": _optional(TEXT),
        "dtype": DTYPE,
        "text": PHRASE,
        "max_length": check_of(Count),
        "threshold": check_of(OpenShare),
        "harmful_labels": _optional((lambda v: isinstance(v, ListConfig) and len(v) > 0, "a list of labels")),
        "batch_size": check_of(Count),
    },
    "llama_guard": {
        "id": ID,
        "revision": _optional(TEXT),
        "dtype": DTYPE,
        "before": STRING,
        "safe": TEXT,
        "unsafe": TEXT,
        "max_length": check_of(Count),
    },
    "openai": ENDPOINT_RULES | {"flag_from": check_of(Annotated[int, Field(ge=2, le=5), Words("2, 3, 4 or 5")])},
    "win_rate": ENDPOINT_RULES,
    "linear": {
        "rows": (lambda v: isinstance(v, DictConfig), "a mapping with path and more"),
        "rows.path": (lambda v: isinstance(v, str), "the path of a file"),
        **{f"rows.{key}": SET_RULES[key] for key in ("header", "columns", "labels", "where", "skip", "take")},
    },
}
RULES: dict[str, Check] = {
    **{
        f"{section}.{name}".removeprefix("."): check
        for section, kind in SECTIONS.items()
        for name, check in field_checks(kind).items()
    },
    **{f"judge.{name}.{key}": rule for name, rules in JUDGES.items() for key, rule in rules.items()},
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
