"""Files of a run's folder: `read_config` and `read_metrics`, and `seal`, which makes later changes detectable.

A folder may come from another person or from a damaged disk. So its content is data: nothing in it is resolved,
imported or trusted. A file that no run can have written raises a `UserError` with its name and a fix.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from lisa_lightning.runtime.errors import UserError, first_line, printable
from lisa_lightning.runtime.files import read_json, read_text, write_text
from lisa_lightning.runtime.integrity import find_damage, fingerprint

CONFIG: Final = "config.yaml"
METRICS: Final = "metrics.json"
CHOICES: Final = "choices.json"
CURVES: Final = "curves.csv"
RESPONSES: Final = "responses.jsonl"
JUDGED: Final = "judged.jsonl"
TOKEN_KL: Final = "token_kl.csv"
FAILED: Final = "failed.json"
ADAPTER: Final = "adapter"
"""Folder of the adapter, with a seal of its own."""
MODEL: Final = "model"
"""Folder of a fully fine-tuned model, with a seal of its own."""
SEAL: Final = "checksums.json"
SEALED: Final = (CONFIG, CHOICES, METRICS, CURVES, RESPONSES, JUDGED, TOKEN_KL)
"""Files whose size and hash SEAL records at the end of a run or a judging."""
REPEAT_FIX: Final = "delete it and repeat the run's command with resume=true"


HALF_PAIR: Final = re.compile(r"\\u[dD]")
"""Escape of half a surrogate pair, as in a path whose name is no text."""


def _load_yaml(text: str) -> Any:
    """Return the plain values of a YAML text, without tags. A few aliases may expand to gigabytes, and are refused."""
    # The parser in C is 20 times as fast, and a sweep may have thousands of configs. It reads no half surrogate pair.
    loader: Any = yaml.SafeLoader if HALF_PAIR.search(text) else getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=loader)):
        raise yaml.YAMLError("it holds an alias (*name)")
    return yaml.load(text, Loader=loader)


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any] | None:
    """Read the config that a run wrote, as plain values. Interpolations stay text.

    Returns:
        The config, or None if the folder has no such file.

    Raises:
        UserError: if the file is no YAML mapping.
    """
    path = folder / name
    if not path.exists():
        return None
    try:
        config = _load_yaml(read_text(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read ({printable(first_line(error))[:200]}). Fix: {REPEAT_FIX}") from error
    if not isinstance(config, dict) or not config:
        raise UserError(f"{path} holds no config. Fix: {REPEAT_FIX}")
    return {str(key): value for key, value in config.items()}


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return the metrics in metrics.json, or {} if there is no such file.

    Raises:
        UserError: if the file is broken, or a value has another type than a run writes.
    """
    metrics = read_json(folder / METRICS, REPEAT_FIX)
    for name, value in metrics.items():
        if not _is_metric(name, value):
            raise UserError(
                f"{folder / METRICS}: {printable(name)[:80]} has a value that no run writes. Fix: {REPEAT_FIX}"
            )
    return metrics


def _is_metric(name: str, value: Any) -> bool:
    """Return whether a value has the type of a metric with this name: rates, times and counts have a `/` in it."""
    if "/" in name:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name in ("judges", "variants"):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return isinstance(value, str | int)


def read_choices(folder: Path) -> dict[str, str]:
    """Return the chosen option of every config group, or {} if choices.json is absent.

    Raises:
        UserError: if the file is broken.
    """
    choices = read_json(folder / CHOICES, REPEAT_FIX)
    if not all(isinstance(choice, str) for choice in choices.values()):
        raise UserError(f"{folder / CHOICES} is no mapping of config groups to names. Fix: {REPEAT_FIX}")
    return choices


def result_folder(folder: Path) -> Path | None:
    """Return the folder with a run's adapter or its fully fine-tuned model, None if there is neither."""
    # In a foreign folder, a link could lead to any folder.
    results = (folder / name for name in (MODEL, ADAPTER))
    return next((result for result in results if result.is_dir() and not result.is_symlink()), None)


def is_complete(metrics: Mapping[str, Any]) -> bool:
    """Return whether `metrics`, from metrics.json, are those of a finished run."""
    return "time/total_s" in metrics


def seal(folder: Path) -> None:
    """Record size and hash of the folder's files, so that `refuse_changed` can detect later damage."""
    write_text(folder / SEAL, json.dumps(fingerprint(folder, SEALED), indent=1))


def unseal(folder: Path) -> None:
    """Delete the record, as needed before files of the folder are written."""
    (folder / SEAL).unlink(missing_ok=True)


def refuse_changed(folder: Path) -> None:
    """Check the files of a finished run against its seal. A folder without a seal passes.

    Raises:
        UserError: if a file has been changed, removed or added since.
    """
    recorded = read_json(folder / SEAL, f"delete {SEAL} if you trust the files next to it")
    if recorded and (damage := find_damage(folder, recorded, SEALED)):
        raise UserError(
            f"{folder}: {damage} since the run ended. Fix: restore the file; or {REPEAT_FIX}, which writes it again; "
            f"or delete {SEAL} if the change is yours"
        )
