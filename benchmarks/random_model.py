"""Random models of a footprint's shapes: `model_of`."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from benchmarks.footprint import Shape


def model_of(shape: Shape, dtype: str = "bfloat16", name: str = "") -> Any:
    """Return a random model of this shape, frozen as `lisa_lightning.model.lora.load` leaves it."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "tie_word_embeddings": shape.tied,
    }
    gated: dict[str, Any] = sizes | {"intermediate_size": shape.intermediate, "num_key_value_heads": shape.kv_heads}
    gated |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    attention = "eager" if shape.family == "gemma2" else "sdpa"
    config: Any
    if shape.family == "opt":
        positions: dict[str, Any] = {
            "max_position_embeddings": shape.positions - 2,
            "word_embed_proj_dim": shape.hidden,
        }
        config = OPTConfig(**sizes, **positions, ffn_dim=shape.intermediate)
    elif shape.family == "qwen2":
        config = Qwen2Config(**gated)
    elif shape.family == "gemma2":
        config = Gemma2Config(**gated, head_dim=shape.head_dim)
    elif shape.family == "qwen3":
        config = Qwen3Config(**gated, head_dim=shape.head_dim)
    elif shape.family == "gemma3":
        config = Gemma3TextConfig(**gated, head_dim=shape.head_dim)
    elif "smollm3" in name:
        config = SmolLM3Config(**gated)
    elif "mistral" in name:
        config = MistralConfig(**gated, head_dim=shape.head_dim)
    else:
        config = LlamaConfig(**gated, head_dim=shape.head_dim)
    return AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation=attention
    ).requires_grad_(False)
