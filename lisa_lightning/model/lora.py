"""A causal language model with a LoRA adapter: `load_lora_model`, or `load` and `attach`; merge and save both."""

import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lisa_lightning.config.instances import parse
from lisa_lightning.config.settings import Lora, ModelSettings
from lisa_lightning.model.base_model import base_model, load_pretrained, reraise_load_errors
from lisa_lightning.model.factors import Factors, modules, trainable
from lisa_lightning.model.frozen_linear import use_onednn
from lisa_lightning.model.text_part import GEMMA3_NAMES, text_config
from lisa_lightning.runtime.cache import cache_folder
from lisa_lightning.runtime.errors import UserError, first_line
from lisa_lightning.runtime.files import write_text
from lisa_lightning.runtime.ranks import OneRank

DTYPES: Final = ("float32", "bfloat16", "float16")
"""Data types of frozen weights."""
DEFAULT_CACHE: Final = "~/.cache/lisa_lightning"
"""Cache folder without LISA_CACHE, as in conf/config.yaml."""


def load(folder: Path, dtype: str, attention: str = "sdpa", quantize: str | None = None) -> PreTrainedModel:
    """Load the causal language model in a folder, frozen, on the CPU. Lightning moves it to the device.

    Frozen linear layers are computed with oneDNN where that is faster.

    Args:
        folder: folder with safetensors weights.
        dtype: data type of the weights: float32, bfloat16 or float16.
        attention: attention implementation of transformers: sdpa, eager or flash_attention_2.
        quantize: `nf4` loads QLoRA's 4-bit weights directly onto the GPU; None loads `dtype`.

    Raises:
        UserError: if the model can't be loaded, needs custom code or lacks weights, or if `quantize` is set without an
            NVIDIA GPU or without bitsandbytes.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if quantize is not None:
        refuse_quantization()
        from transformers import BitsAndBytesConfig

        options["device_map"] = {"": torch.cuda.current_device()}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    error_prefix = f"The model in {folder}"
    config = text_config(error_prefix, folder)
    if config.model_type == "gemma3_text":
        options |= {"config": config, "key_mapping": GEMMA3_NAMES}
    model = load_pretrained(error_prefix, AutoModelForCausalLM, folder, **options).requires_grad_(False)
    use_onednn(model)
    return model


def refuse_quantization() -> None:
    """Raise UserError if this machine has no NVIDIA GPU or no bitsandbytes, which 4-bit weights need."""
    if not torch.cuda.is_available():
        raise UserError("model.quantize=nf4: it needs an NVIDIA GPU, and none is visible. Fix: use model.quantize=null")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantize=nf4: it needs bitsandbytes. Fix: pip install -e '.[quant]'")


def load_tokenizer(folder: Path, error_prefix: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model in a folder.

    Args:
        folder: folder of the model.
        error_prefix: beginning of error messages; None names the folder.

    Raises:
        UserError: if the tokenizer can't be loaded, or needs custom code.
    """
    with reraise_load_errors(error_prefix or f"The tokenizer in {folder}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def attach(model: PreTrainedModel, lora: Lora, seed: int, key: str = "lora") -> PeftModel:
    """Attach a new LoRA adapter with float32 factors, and return the model in training mode.

    Args:
        model: a frozen model.
        lora: settings of the adapter.
        seed: seed of the initial factors.
        key: config key of `lora`, for error messages.

    Raises:
        UserError: if a target matches no module, or a module that shares its weights with another one.
    """
    torch.manual_seed(seed)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    for target in [] if targets == "all-linear" else [targets] if isinstance(targets, str) else targets:
        _refuse_absent(model, target, key)
        _refuse_tied(model, target, key)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=_whole(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        net = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"{key}.targets={targets}: {first_line(error)}") from error
    # Models arrive in evaluation mode, where dropout and gradient checkpointing are silently off.
    net.train()
    return net


def load_lora_model(
    model: str | Path,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
    dtype: str = "float32",
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a model on the CPU with a new LoRA adapter, and its tokenizer.

    Code from a model's repository is never run.

    Args:
        model: hub id, or folder with safetensors weights and a tokenizer.
        r: rank of the adapter.
        alpha: the update is scaled by alpha/r.
        dropout: dropout of the adapter's input, 0 to below 1.
        target_modules: "all-linear", or names of modules.
        seed: seed of the initial factors. The global seed is unchanged.
        dtype: data type of the frozen weights: float32, bfloat16 or float16. The factors are float32.

    Returns:
        The model in training mode, and the tokenizer.

    Raises:
        UserError: if the model can't be found, fetched or loaded; it needs custom code; a setting does not fit it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: it must be one of {', '.join(DTYPES)}")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    lora = parse(Lora, {"r": r, "alpha": alpha, "dropout": dropout, "targets": targets}, "lora")
    cache = cache_folder(os.environ.get("LISA_CACHE", DEFAULT_CACHE))
    folder, _ = base_model(OneRank(), ModelSettings(id=str(model)), cache)
    tokenizer = load_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        net = attach(load(folder, dtype), lora, seed)
    # A saved adapter names the model as the user does, rather than a folder of the cache.
    net.peft_config["default"].base_model_name_or_path = str(model)
    return net, tokenizer


def attach_saved(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Attach a saved adapter for further training, and return the model in training mode."""
    net = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    net.train()
    return net


@torch.no_grad()
def replace_adapter(net: PeftModel, factors: Factors) -> PeftModel:
    """Return the model with an adapter of these factors and unchanged alpha/r.

    Args:
        net: a model with an adapter. It must not be used afterwards.
        factors: A and B of every module, all of one rank. If their names or shapes are not those of the model's
            adapter, a new adapter replaces it.
    """
    shapes = {name: weight.shape for name, weight in trainable(net).items()}
    if {name: value.shape for name, value in factors.items()} != shapes:
        net = _attach_of_other_shape(net, factors)
    weights = trainable(net)
    for name, value in factors.items():
        weights[name].copy_(value)
    return net


def _attach_of_other_shape(net: PeftModel, factors: Factors) -> PeftModel:
    """Replace a model's adapter by one of the factors' rank and modules, in training mode, with the same alpha/r."""
    replaced: Any = net.peft_config["default"]
    rank = next(len(factors[a]) for a, _ in modules(factors).values())
    alpha = lora_scaling(replaced.r, replaced.lora_alpha, replaced.use_rslora) * rank
    config = LoraConfig(r=rank, lora_alpha=_whole(alpha), target_modules=list(modules(factors)), task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        new = get_peft_model(net.unload(), config)
    # Peft takes the name from the folder that was loaded.
    new.peft_config["default"].base_model_name_or_path = replaced.base_model_name_or_path
    new.train()
    return new


def _whole(alpha: float) -> Any:
    """Return alpha as a whole number if it is one, so that the saved config has 16 rather than 16.0."""
    return int(alpha) if alpha % 1 == 0 else alpha


def _refuse_absent(model: torch.nn.Module, target: str, key: str) -> None:
    """Raise UserError if no module's name is `target` or ends in `.target`."""
    names = [name for name, _ in model.named_modules() if name]
    if not any(_matches(name, target) for name in names):
        choices = sorted({n.rpartition(".")[2] for n in names} - set(map(str, range(1000))))
        raise UserError(f"{key}.targets: the model has no module '{target}'. Fix: choose from {', '.join(choices)}")


def _refuse_tied(model: Any, target: str, key: str) -> None:
    """Raise UserError if `target` is an embedding whose weights are tied to the other embedding."""
    names = tied_embeddings(model)
    if any(_matches(name, target) for name in names):
        raise UserError(
            f"{key}.targets: {' and '.join(names)} are one matrix in this model, and merging an adapter of {target} "
            f"would change both. Fix: remove {target}"
        )


def tied_embeddings(model: Any) -> list[str]:
    """Return the names of input and output embeddings that are one matrix; [] if they are two."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    if embeddings[0].weight is not embeddings[1].weight:
        return []
    return [name for name, module in model.named_modules() if any(module is e for e in embeddings)]


def _matches(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def lora_scaling(r: int, alpha: float, rslora: bool) -> float:
    """Return the factor of an adapter's update: alpha/r, or alpha/sqrt(r) of rsLoRA (Kalajdzievski 2023).

    Args:
        r: rank.
        alpha: peft's `lora_alpha`.
        rslora: peft's `use_rslora`.
    """
    return alpha / (math.sqrt(r) if rslora else r)


def save_merged(net: PeftModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Merge the adapter into the model, and save the result with its tokenizer."""
    net.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


def save_adapter(net: PeftModel, base: str, out: Path) -> None:
    """Save the adapter in peft's format. Equal adapters are saved as equal bytes.

    Args:
        net: a model with an adapter.
        base: folder of the base model, stored in the adapter's config.
        out: folder to write.
    """
    net.peft_config["default"].base_model_name_or_path = base
    net.save_pretrained(str(out))
    # Peft writes an empty model card.
    (out / "README.md").unlink(missing_ok=True)
    set_base_model_name(out, base)


def set_base_model_name(adapter: Path, base: str) -> None:
    """Store the folder of the base model in a saved adapter's config."""
    config = adapter / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    if isinstance(settings["target_modules"], list):
        # Peft holds a set, whose order differs between processes.
        settings["target_modules"].sort()
    write_text(config, json.dumps(settings, indent=2, sort_keys=True))
