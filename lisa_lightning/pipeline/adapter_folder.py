"""The adapter or model in a run's folder: `complete_result` makes it portable, `read_adapter` and `read_model` read it.

A run's folder may come from another person, so that it is read as data.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub.constants import HF_HUB_CACHE

from lisa_lightning.model.base_model import ADAPTER_CONFIG, locate_weights, wheel_license
from lisa_lightning.model.lora import DEFAULT_CACHE, load_tokenizer
from lisa_lightning.model.lora_folder import WEIGHTS, LoraAdapter, read_lora
from lisa_lightning.report.model_card import CARD, read_terms, write_card
from lisa_lightning.runtime.cache import RECORD, cache_folder, short_hash
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import read_json, write_text
from lisa_lightning.runtime.integrity import find_damage, fingerprint, visible_files
from lisa_lightning.runtime.run_files import ADAPTER, MODEL, SEAL, result_folder

FIX: Final = "repeat the run's command with resume=true, which makes it again"
CACHED_MODELS: Final = ("align", "aligned", "models")
"""Folders of a cache that hold whole models."""


def complete_result(run: Path, base: Path, model_id: str | None) -> None:
    """Add the tokenizer, a model card and a seal to the adapter or the fully fine-tuned model in a run's folder.

    The card gets its scores later, by `write_card`.

    Args:
        run: folder of the run, with config.yaml and choices.json.
        base: folder of the base model.
        model_id: config key `model.id`.

    Raises:
        UserError: if a file can't be written.
    """
    folder = result_folder(run)
    assert folder is not None
    # The run's own tokenizer would save the padding of its last batch.
    load_tokenizer(base).save_pretrained(folder)
    write_card(run, {}, _base_terms(base, model_id))
    write_text(folder / SEAL, json.dumps(fingerprint(folder, _sealed(folder)), indent=1))


def _base_terms(base: Path, model_id: str | None) -> dict[str, str]:
    """Return license and revision of the base model, as far as its folder or its package states them."""
    terms = {key: value for key, value in read_terms(base).items() if key.startswith("license")}
    if not terms and (stated := wheel_license(model_id)) is not None:
        terms = {"license": stated}
    # The hub's cache names the folder of a model after its commit.
    return terms | ({"base_model_revision": base.name} if base.parent.name == "snapshots" else {})


def _sealed(folder: Path) -> list[str]:
    """Return the files of an adapter or a model that stay unchanged when its run is judged again."""
    return [name for name in visible_files(folder) if name not in (CARD, SEAL)]


def read_adapter(run: Path) -> LoraAdapter:
    """Read the adapter of a run.

    Raises:
        UserError: if there is no adapter, a file has changed since the run, or the adapter is no plain LoRA adapter.
    """
    folder = run / ADAPTER
    files = [folder / ADAPTER_CONFIG, folder / WEIGHTS]
    if not folder.is_dir() or folder.is_symlink() or not all(f.is_file() and not f.is_symlink() for f in files):
        raise UserError(
            f"{run} has no adapter with {ADAPTER_CONFIG} and {WEIGHTS}. Fix: name a run with stage finetune"
        )
    _refuse_changed(folder)
    return read_lora(folder, f"The adapter in {folder}", FIX)


def read_model(run: Path) -> Path:
    """Return the folder of a run's fully fine-tuned model.

    Raises:
        UserError: if there is none, it is incomplete, or a file has changed since the run.
    """
    folder = run / MODEL
    if not folder.is_dir() or any(path.is_symlink() for path in (folder, *folder.rglob("*"))):
        raise UserError(f"{run} has no model of full-parameter fine-tuning, or a link in it. Fix: {FIX}")
    _refuse_changed(folder)
    return locate_weights(f"The model in {folder}", str(folder), None)[0]


def _refuse_changed(folder: Path) -> None:
    """Raise UserError if a file of an adapter or a model differs from its seal."""
    recorded = read_json(folder / SEAL, FIX)
    if recorded and (damage := find_damage(folder, recorded, _sealed(folder))):
        raise UserError(f"{folder}: {damage} since the run. Fix: restore the file, or {FIX}")


def locate_base(run: Path, config: Mapping[str, Any], adapter: LoraAdapter) -> Path:
    """Return the folder of the model that an adapter belongs on.

    The path in adapter_config.json is data. It must be one of these; nothing is downloaded:
        - A result of a cache. Its folder is named after the hash of its inputs, and its files have the recorded hashes.
          If the cache was moved, the folder of the same name in the current cache (LISA_CACHE) is used.
        - The local folder that `model.id` or `aligned` of the run names, or a snapshot of it in the hub's cache. Runs
          name it if they don't align, or continue the alignment adapter.

    So a foreign run can't have another model of this machine exported. Weights that someone plants as a cached result
    are no more dangerous than a planted adapter: they are safetensors, and custom code is never run.

    Args:
        run: folder of the run.
        config: the nested config of the run.
        adapter: the adapter.

    Raises:
        UserError: if the model is missing, damaged, incomplete or not among these.
    """
    named = Path(adapter.base or "")
    moved = cache_folder(os.environ.get("LISA_CACHE", DEFAULT_CACHE)) / named.parent.name / named.name
    for folder in (named, moved):
        if _is_cached_model(folder):
            _refuse_damaged(run, folder)
            break
    else:
        if not _is_configured_model(named, config):
            raise UserError(
                f"{run}: the model under its adapter, {printable(str(named))[:200]}, is no model of a cache, nor "
                f"model.id or aligned of the run. It may have been removed. Fix: {FIX}"
            )
        folder = named
    return locate_weights(f"{run}: the model under its adapter, {folder}", str(folder), None)[0]


def _is_cached_model(folder: Path) -> bool:
    """Return whether a folder is a model in a cache: it is named after the hash of the key in its record."""
    if not re.fullmatch("[0-9a-f]{16}", folder.name) or folder.parent.name not in CACHED_MODELS:
        return False
    return folder.is_absolute() and short_hash(read_json(folder / RECORD, FIX).get("key")) == folder.name


def _refuse_damaged(run: Path, folder: Path) -> None:
    """Raise UserError if a file of a cached folder differs from its record."""
    files = [name for name in visible_files(folder) if name != RECORD]
    if damage := find_damage(folder, read_json(folder / RECORD, FIX).get("files"), files):
        raise UserError(f"{run}: the model under its adapter is damaged ({folder}: {damage}). Fix: {FIX}")


def _is_configured_model(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a folder is the one that `model.id` or `aligned` names, or a snapshot of it in the hub's cache."""
    section = config.get("model")
    names = (section.get("id") if isinstance(section, dict) else None, config.get("aligned"))
    return folder.is_absolute() and any(isinstance(name, str) and _is_model_of(folder, name) for name in names)


def _is_model_of(folder: Path, model_id: str) -> bool:
    """Return whether a folder is the one that a name is the path of, or a snapshot of a hub id."""
    snapshots = Path(HF_HUB_CACHE).absolute() / f"models--{model_id.replace('/', '--')}" / "snapshots"
    try:
        return folder.is_dir() and folder in (Path(model_id).expanduser().absolute(), snapshots / folder.name)
    except (OSError, RuntimeError, ValueError):
        # A name that is too long, holds a NUL, or begins with an unknown `~user` names no folder.
        return False
