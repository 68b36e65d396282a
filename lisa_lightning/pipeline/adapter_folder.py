"""The adapter in a run's folder: `complete_adapter` makes it portable, `read_adapter` reads a foreign one as data.

A run's folder may come from another person. Peft would import a module that adapter_config.json names, and load pickled
weights. So only the numbers of a plain LoRA adapter are read from its files.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lisa_lightning.model.base_model import ADAPTER_CONFIG, locate_weights, reraise_load_errors, wheel_license
from lisa_lightning.model.factors import PREFIX
from lisa_lightning.model.lora import DEFAULT_CACHE, load_tokenizer
from lisa_lightning.report.model_card import CARD, read_terms, write_adapter_card
from lisa_lightning.runtime.cache import RECORD, cache_folder, short_hash
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import read_json, write_text
from lisa_lightning.runtime.integrity import find_damage, fingerprint, visible_files
from lisa_lightning.runtime.run_files import ADAPTER, SEAL

WEIGHTS: Final = "adapter_model.safetensors"
FIX: Final = "repeat the run's command with resume=true, which makes it again"
CACHED_MODELS: Final = ("align", "models")
"""Folders of a cache that hold whole models."""
READ_KEYS: Final = ("base_model_name_or_path", "r", "lora_alpha", "peft_type", "task_type", "fan_in_fan_out")
"""Keys of adapter_config.json that are read."""
IGNORED_KEYS: Final = (
    *("peft_version", "inference_mode", "init_lora_weights", "lora_dropout", "target_modules", "revision"),
    *("megatron_core", "qalora_group_size"),
)
"""Keys that do not change what a trained adapter adds to the weights."""


def complete_adapter(run: Path, base: Path, model_id: str | None) -> None:
    """Add the tokenizer, a model card and a seal to the adapter in a run's folder.

    The card gets its scores later, by `write_adapter_card`.

    Args:
        run: folder of the run, with config.yaml and choices.json.
        base: folder of the base model.
        model_id: config key `model.id`.

    Raises:
        UserError: if a file can't be written.
    """
    adapter = run / ADAPTER
    # The run's own tokenizer would save the padding of its last batch.
    load_tokenizer(base).save_pretrained(adapter)
    write_adapter_card(run, {}, _base_terms(base, model_id))
    write_text(adapter / SEAL, json.dumps(fingerprint(adapter, _sealed(adapter)), indent=1))


def _base_terms(base: Path, model_id: str | None) -> dict[str, str]:
    """Return license and revision of the base model, as far as its folder or its package states them."""
    terms = {key: value for key, value in read_terms(base).items() if key.startswith("license")}
    if not terms and (stated := wheel_license(model_id)) is not None:
        terms = {"license": stated}
    # The hub's cache names the folder of a model after its commit.
    return terms | ({"base_model_revision": base.name} if base.parent.name == "snapshots" else {})


def _sealed(adapter: Path) -> list[str]:
    """Return the files of an adapter that stay unchanged when its run is judged again."""
    return [name for name in visible_files(adapter) if name not in (CARD, SEAL)]


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter, read from files that may be foreign."""

    folder: Path
    base: str
    """Folder of its base model, as its config names it."""
    r: int
    alpha: float
    fan_in_fan_out: bool
    """True if the adapted layers store transposed weights, such as those of GPT-2."""
    weights: Mapping[str, Tensor]


def read_adapter(run: Path) -> Adapter:
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
    recorded = read_json(folder / SEAL, FIX)
    if recorded and (damage := find_damage(folder, recorded, _sealed(folder))):
        raise UserError(f"{folder}: {damage} since the run. Fix: restore the file, or {FIX}")
    settings = read_json(files[0], FIX)
    _refuse_special(files[0], settings)
    with reraise_load_errors(f"The adapter in {folder}"):
        weights = load_file(files[1])
    r = settings["r"]
    if not weights or any(r != w.shape[0] for name, w in weights.items() if re.search(r"\.lora_(embedding_)?A", name)):
        raise UserError(f"{files[1]}: its weights are not those of an adapter of rank {r}. Fix: {FIX}")
    base, alpha = settings["base_model_name_or_path"], float(settings["lora_alpha"])
    return Adapter(folder, base, r, alpha, bool(settings.get("fan_in_fan_out")), weights)


def _refuse_special(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError if the settings of an adapter are not those of a plain LoRA adapter."""
    r, alpha = settings.get("r"), settings.get("lora_alpha")
    checks = {
        "peft_type": settings.get("peft_type") == "LORA",
        "task_type": settings.get("task_type") == "CAUSAL_LM",
        "r": type(r) is int and r > 0,
        "lora_alpha": isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha),
        "base_model_name_or_path": isinstance(settings.get("base_model_name_or_path"), str),
    }
    defaults = LoraConfig().to_dict()
    special = [key for key, passes in checks.items() if not passes]
    special += [
        key
        for key, value in settings.items()
        if key not in (*READ_KEYS, *IGNORED_KEYS) and value and value != defaults.get(key)
    ]
    if special:
        raise UserError(f"{path}: {printable(special[0])[:80]} has a value that no run writes. Fix: {FIX}")


def locate_base(run: Path, config: Mapping[str, Any], adapter: Adapter) -> Path:
    """Return the folder of the model that an adapter belongs on.

    The path in adapter_config.json is data. It must be one of these; nothing is downloaded:
        - A result of a cache. Its folder is named after the hash of its inputs, and its files have the recorded hashes.
          If the cache was moved, the folder of the same name in the current cache (LISA_CACHE) is used.
        - The local folder that `model.id` of the run names, or a snapshot of `model.id` in the hub's cache. Runs name
          it if they don't align, or continue the alignment adapter.

    So a foreign run can't have another model of this machine exported. Weights that someone plants as a cached result
    are no more dangerous than a planted adapter: they are safetensors, and custom code is never run.

    Args:
        run: folder of the run.
        config: the nested config of the run.
        adapter: the adapter.

    Raises:
        UserError: if the model is missing, damaged, incomplete or not among these.
    """
    named = Path(adapter.base)
    moved = cache_folder(os.environ.get("LISA_CACHE", DEFAULT_CACHE)) / named.parent.name / named.name
    for folder in (named, moved):
        if _is_cached_model(folder):
            _refuse_damaged(run, folder)
            break
    else:
        if not _is_configured_model(named, config):
            raise UserError(
                f"{run}: the model under its adapter, {printable(adapter.base)[:200]}, is no model of a cache, nor "
                f"model.id of the run. It may have been removed. Fix: {FIX}"
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
    """Return whether a folder is the one that `model.id` names, or a snapshot of it in the hub's cache."""
    section = config.get("model")
    model_id = section.get("id") if isinstance(section, dict) else None
    if not isinstance(model_id, str) or not folder.is_absolute():
        return False
    snapshots = Path(HF_HUB_CACHE).absolute() / f"models--{model_id.replace('/', '--')}" / "snapshots"
    try:
        return folder.is_dir() and folder in (Path(model_id).expanduser().absolute(), snapshots / folder.name)
    except (OSError, RuntimeError, ValueError):
        # A name that is too long, holds a NUL, or begins with an unknown `~user` names no folder.
        return False


def attach_adapter(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """Attach an adapter to the model that it belongs on.

    Raises:
        UserError: if the adapter does not fit the model.
    """
    names = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in adapter.weights})
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=names,
        fan_in_fan_out=adapter.fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    with reraise_load_errors(f"The adapter in {adapter.folder}"):
        net = get_peft_model(model, config)
        result = set_peft_model_state_dict(net, dict(adapter.weights))
        if differing := [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]:
            raise UserError(f"The adapter in {adapter.folder} does not fit its model ({printable(differing[0])[:200]})")
    assert isinstance(net, PeftModel)
    return net
