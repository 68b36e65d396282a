"""LoRA around a causal language model: load, attach, merge, save."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lisa_lightning.cpu import multiply_by_onednn
from lisa_lightning.errors import UserError


def load(folder: Path, dtype: str) -> PreTrainedModel:
    """The causal language model in `folder`, frozen, its products made fast, on the CPU (Lightning moves it)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).requires_grad_(False)
    multiply_by_onednn(model)
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model."""
    return AutoTokenizer.from_pretrained(folder)


def attach(model: PreTrainedModel, lora: Any, seed: int) -> PeftModel:
    """A fresh LoRA adapter (factors in float32) on the frozen model, in training mode.

    Args:
        lora: r, alpha, dropout and targets (conf/config.yaml; "all-linear" or module names).
        seed: determines the initial factors.
    """
    torch.manual_seed(seed)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
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
        raise UserError(f"lora.targets={targets}: the model has no such modules ({error})") from error
    # Models arrive in evaluation mode, where dropout and gradient checkpointing are silently off.
    net.train()
    return net


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
    """Fold the adapter into the weights it adapts (in their own precision) and save model and tokenizer."""
    net.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)


def save_adapter(net: PeftModel, base: str, out: Path) -> None:
    """Save the adapter as plain `peft` loads it, its config naming `base`; equal adapters give equal bytes."""
    net.peft_config["default"].base_model_name_or_path = base
    net.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)  # an empty model card
    config = out / "adapter_config.json"
    settings = json.loads(config.read_text())
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()  # a set inside peft, in an order that differs from process to process
    config.write_text(json.dumps(settings, indent=2, sort_keys=True))
