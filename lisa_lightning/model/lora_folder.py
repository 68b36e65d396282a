"""A LoRA adapter in the folder of a foreign program or person, read as data. Start at `read_lora`.

Peft would import a module that adapter_config.json names, and load pickled weights. So only the numbers of a plain LoRA
adapter are read.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lisa_lightning.config.settings import Lora
from lisa_lightning.model.base_model import ADAPTER_CONFIG, reraise_load_errors
from lisa_lightning.model.factors import PREFIX
from lisa_lightning.model.lora import lora_scaling, set_base_model_name, tied_embeddings
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import read_json
from lisa_lightning.runtime.integrity import fingerprint

WEIGHTS: Final = "adapter_model.safetensors"
PICKLED_WEIGHTS: Final = "adapter_model.bin"
READ_KEYS: Final = (
    *("base_model_name_or_path", "r", "lora_alpha", "peft_type", "task_type", "fan_in_fan_out", "use_rslora"),
    "init_lora_weights",
)
"""Keys of adapter_config.json that are read."""
IGNORED_KEYS: Final = (
    *("peft_version", "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "revision"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
)
"""Keys that do not change what a trained adapter adds to the weights. The names of its weights are its modules."""
PLAIN_INITS: Final = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model unchanged."""
FACTOR: Final = re.compile(re.escape(PREFIX) + r"([\w.]+)\.lora_(?:[AB]\.weight|embedding_[AB])")
"""Pattern of the name of a weight in a file. Its group is the module."""


@dataclass(frozen=True)
class LoraAdapter:
    """A plain LoRA adapter, read from files that may be foreign."""

    folder: Path
    base: str | None
    """Name or folder of its base model, as its config has it. It is only compared."""
    r: int
    alpha: float
    """Its update is scaled by alpha/r."""
    fan_in_fan_out: bool
    """True if the adapted layers store transposed weights, such as those of GPT-2."""
    weights: Mapping[str, Tensor]
    """Factors by their name in the file."""
    content: str
    """Hash of the content of its files."""

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules."""
        return sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in self.weights})

    def lora(self, dropout: float) -> Lora:
        """Return the settings of a new adapter with the same shapes and alpha/r.

        Args:
            dropout: dropout of the new adapter.
        """
        return Lora(r=self.r, alpha=self.alpha, dropout=dropout, targets=self.modules)

    def peft_config(self) -> LoraConfig:
        """Return peft's config, which has nothing from the file but checked numbers and names."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]
            target_modules=self.modules,
            fan_in_fan_out=self.fan_in_fan_out,
            task_type="CAUSAL_LM",
        )


def read_lora(folder: Path, error_prefix: str, fix: str) -> LoraAdapter:
    """Read a plain LoRA adapter. rsLoRA becomes a plain adapter with the same update.

    Args:
        folder: folder in peft's format.
        error_prefix: beginning of error messages, such as `adapter=FOLDER`.
        fix: advice in error messages.

    Raises:
        UserError: if the folder lacks safetensors weights or a config, or these are not those of a plain LoRA adapter.
    """
    config, file = folder / ADAPTER_CONFIG, folder / WEIGHTS
    if not file.is_file() and (folder / PICKLED_WEIGHTS).exists():
        raise UserError(
            f"{error_prefix}: its weights are pickled ({PICKLED_WEIGHTS}), which are never loaded. Fix: if you trust "
            f"them, load the adapter with peft and save it by model.save_pretrained(FOLDER), which writes {WEIGHTS}"
        )
    if not config.is_file() or not file.is_file():
        raise UserError(
            f"{error_prefix}: it is no folder with {ADAPTER_CONFIG} and {WEIGHTS}. Fix: name the folder of an adapter "
            "that peft has saved"
        )
    settings = read_json(config, fix)
    refuse_special(error_prefix, settings, fix)
    with reraise_load_errors(error_prefix):
        weights = load_file(file)
    r, alpha = settings["r"], float(settings["lora_alpha"])
    _refuse_unfit_weights(error_prefix, weights, r, fix)
    return LoraAdapter(
        folder,
        settings.get("base_model_name_or_path"),
        r,
        r * lora_scaling(r, alpha, rslora=True) if settings.get("use_rslora") else alpha,
        bool(settings.get("fan_in_fan_out")),
        weights,
        short_hash(fingerprint(folder, [ADAPTER_CONFIG, WEIGHTS])),
    )


def refuse_special(error_prefix: str, settings: Mapping[str, Any], fix: str) -> None:
    """Check that the settings of an adapter are those of a plain LoRA adapter.

    Args:
        error_prefix: beginning of error messages.
        settings: content of adapter_config.json. It may be foreign.
        fix: advice in error messages.

    Raises:
        UserError: for a wrong value, or a key that changes what the adapter adds to the weights.
    """
    r, base = settings.get("r"), settings.get("base_model_name_or_path")
    alpha: Any = settings.get("lora_alpha")
    checks = {
        "peft_type": settings.get("peft_type") == "LORA",
        "task_type": settings.get("task_type") in ("CAUSAL_LM", None),
        "r": type(r) is int and r > 0,
        "lora_alpha": type(alpha) in (int, float) and 0 < alpha < math.inf,
        "base_model_name_or_path": base is None or isinstance(base, str),
        "init_lora_weights": settings.get("init_lora_weights") in PLAIN_INITS,
    }
    defaults = LoraConfig().to_dict()
    special = [key for key, passes in checks.items() if not passes]
    special += [
        key
        for key, value in settings.items()
        if key not in (*READ_KEYS, *IGNORED_KEYS) and value and value != defaults.get(key)
    ]
    if special:
        shown = f"{printable(special[0])[:80]}={printable(str(settings.get(special[0])))[:80]}"
        raise UserError(f"{error_prefix}: {shown} is not that of a plain LoRA adapter. Fix: {fix}")


def _refuse_unfit_weights(error_prefix: str, weights: Mapping[str, Tensor], r: int, fix: str) -> None:
    """Raise UserError if the weights are not pairs of finite factors of rank r."""
    problem = None if weights else "it has no weights"
    for name, weight in weights.items():
        axis = 0 if re.search(r"\.lora_(embedding_)?A", name) else 1
        if FACTOR.fullmatch(name) is None:
            problem = f"{printable(name)[:120]} is no factor of a plain LoRA adapter"
        elif weight.ndim != 2 or weight.shape[axis] != r:
            problem = f"{name} has the shape {tuple(weight.shape)}, which is not of rank {r}"
        elif not weight.is_floating_point() or not bool(torch.isfinite(weight).all()):
            problem = f"{name} has values that are not finite numbers"
        elif _partner(name) not in weights:
            problem = f"{name} has no {_partner(name)}"
    if problem is not None:
        raise UserError(f"{error_prefix}: {problem}. Fix: {fix}")


def _partner(name: str) -> str:
    """Return the name of the other factor of the same module."""
    head, sign, tail = name.rpartition(".lora_")
    return head + sign + (tail.replace("A", "B") if "A" in tail else tail.replace("B", "A"))


def attach_empty(model: PreTrainedModel, adapter: LoraAdapter, error_prefix: str, fix: str) -> PeftModel:
    """Attach an adapter of the same modules and rank to a model without weights, and check that it fits.

    Args:
        model: the model on the meta device.
        adapter: the adapter.
        error_prefix: beginning of error messages, such as `adapter=FOLDER`.
        fix: advice in error messages.

    Raises:
        UserError: if the model lacks a module of the adapter, has it in another shape, or shares its weights.
    """
    if tied := sorted({*tied_embeddings(model)} & {*adapter.modules}):
        raise UserError(
            f"{error_prefix}: {tied[0]} shares its matrix with the other embedding of the model, and merging its "
            f"adapter would change both. Fix: {fix}"
        )
    with reraise_load_errors(error_prefix), torch.device("meta"):
        net = get_peft_model(model, adapter.peft_config())
    assert isinstance(net, PeftModel)
    expected = {name: tuple(w.shape) for name, w in get_peft_model_state_dict(net, save_embedding_layers=False).items()}
    shapes = {name: tuple(w.shape) for name, w in adapter.weights.items()}
    if differing := sorted(shapes.items() ^ expected.items()):
        name, _ = differing[0]
        sizes = f"{shapes.get(name, 'absent')} in the adapter, {expected.get(name, 'absent')} in the model"
        raise UserError(f"{error_prefix}: it does not fit its model ({name}: {sizes}). Fix: {fix}")
    return net


def attach_adapter(model: PreTrainedModel, adapter: LoraAdapter) -> PeftModel:
    """Attach an adapter to the model that it belongs on.

    Raises:
        UserError: if the adapter does not fit the model.
    """
    with reraise_load_errors(f"The adapter in {adapter.folder}"):
        net = get_peft_model(model, adapter.peft_config())
        result = set_peft_model_state_dict(net, dict(adapter.weights))
        if differing := [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]:
            raise UserError(f"The adapter in {adapter.folder} does not fit its model ({printable(differing[0])[:200]})")
    assert isinstance(net, PeftModel)
    return net


def save_plain(adapter: LoraAdapter, base: Path, out: Path) -> None:
    """Save an adapter in float32 with a config of our own, so that peft can load it.

    Args:
        adapter: the adapter.
        base: folder of the model that it belongs on.
        out: folder to write.
    """
    adapter.peft_config().save_pretrained(str(out))
    set_base_model_name(out, str(base))
    factors = {name: weight.float().contiguous() for name, weight in adapter.weights.items()}
    save_file(factors, out / WEIGHTS, metadata={"format": "pt"})
