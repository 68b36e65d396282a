"""LoRA around a causal language model: load, attach, merge, save."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lisa_lightning.model.base_model import load_whole, loading
from lisa_lightning.model.frozen_linear import multiply_by_onednn
from lisa_lightning.runtime.errors import UserError, first_line
from lisa_lightning.runtime.files import write_text

PREFIX = "base_model.model."
"""What peft puts before a module's own name."""


def load(folder: Path, dtype: str, attention: str = "sdpa", quantize: str | None = None) -> PreTrainedModel:
    """The causal language model in `folder`, frozen, its products made fast, on the CPU (Lightning moves it).

    Args:
        dtype: of the weights: float32, bfloat16 or float16.
        attention: transformers' implementation of it: sdpa, eager, flash_attention_2.
        quantize: `nf4` for QLoRA's 4-bit weights, on the GPU at once.

    Raises:
        UserError: `quantize` where there is no GPU or no bitsandbytes; it can't be loaded, or not without code of its
            own, or lacks weights.
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
    model = load_whole(f"The model in {folder}", AutoModelForCausalLM, folder, **options).requires_grad_(False)
    multiply_by_onednn(model)
    return model


def refuse_quantization() -> None:
    """Raises UserError where 4-bit weights can't be had."""
    if not torch.cuda.is_available():
        raise UserError("model.quantize=nf4 needs an NVIDIA GPU, and this machine shows none; use model.quantize=null")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantize=nf4 needs bitsandbytes: pip install -e '.[quant]'")


def load_tokenizer(folder: Path, at: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model.

    Raises:
        UserError, which begins with `at`: it can't be loaded, or not without code of its own.
    """
    with loading(at or f"The tokenizer in {folder}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def attach(model: PreTrainedModel, lora: Any, seed: int, key: str = "lora") -> PeftModel:
    """A fresh LoRA adapter (factors in float32) on the frozen model, in training mode.

    Args:
        lora: r, alpha, dropout and targets (conf/config.yaml; "all-linear" or module names).
        seed: determines the initial factors.
        key: where the config has them.

    Raises:
        UserError: a target matches no module, or one whose weights another module has too.
    """
    torch.manual_seed(seed)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    for target in [] if targets == "all-linear" else [targets] if isinstance(targets, str) else targets:
        _refuse_absent(model, target, key)
        _refuse_tied(model, target, key)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
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


def attach_saved(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """The model with a saved adapter that goes on being trained."""
    net = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    net.train()
    return net


def _refuse_absent(model: torch.nn.Module, target: str, key: str) -> None:
    """Raises UserError if no module's name is `target` or ends in `.target`."""
    names = [name for name, _ in model.named_modules() if name]
    if not any(_is(name, target) for name in names):
        there = sorted({n.rpartition(".")[2] for n in names} - set(map(str, range(1000))))
        raise UserError(f"{key}.targets: the model has no module '{target}'; there are: {', '.join(there)}")


def _refuse_tied(model: Any, target: str, key: str) -> None:
    """Raises UserError if `target` is an embedding that is input and output in one."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    if ends[0].weight is ends[1].weight and any(_is(name, target) for name in names):
        raise UserError(
            f"{key}.targets: {' and '.join(names)} are one matrix in this model, and to merge an adapter of "
            f"{target} would change both; leave it out"
        )


def _is(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def modules(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The adapted modules, by their names in the model without adapter: the names of their A and B among `names`."""
    return {
        name.partition(".lora_A.")[0].removeprefix(PREFIX): (name, name.replace(".lora_A.", ".lora_B."))
        for name in names
        if ".lora_A." in name
    }


def attention_window(model: Any) -> int | None:
    """Tokens that the model's narrowest layer looks back at most, None where all see everything."""
    config = model.config.get_text_config()
    names = ("sliding_window", "attention_chunk_size", "window_size")
    found = [getattr(config, name, None) for name in names]
    return min((w for w in found if isinstance(w, int)), default=None)


def trainable(net: torch.nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name, in a fixed order."""
    return {name: w for name, w in net.named_parameters() if w.requires_grad}


def save_merged(net: PeftModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Save the model with the adapter folded in, and the tokenizer."""
    net.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


def save_adapter(net: PeftModel, base: str, out: Path) -> None:
    """Save the adapter as plain `peft` loads it, its config naming `base`; equal adapters give equal bytes."""
    net.peft_config["default"].base_model_name_or_path = base
    net.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)  # an empty model card
    name_base(out, base)


def name_base(adapter: Path, base: str) -> None:
    """Have a saved adapter's config name the folder of its base model."""
    config = adapter / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()  # a set inside peft, in an order that differs from process to process
    write_text(config, json.dumps(settings, indent=2, sort_keys=True))
