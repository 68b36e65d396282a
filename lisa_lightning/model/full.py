"""A model whose weights are all trained: `load_trainable` and `save_full`."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from lisa_lightning.model.lora import load, load_tokenizer


def load_trainable(folder: Path, attention: str) -> PreTrainedModel:
    """Load the model in a folder for full-parameter fine-tuning, in training mode and in float32.

    A step of AdamW is often smaller than half a unit in the last place of bfloat16, and would be lost. Weights that the
    model ties stay one tensor.

    Args:
        folder: folder with safetensors weights.
        attention: attention implementation of transformers.

    Raises:
        UserError: as in `load`.
    """
    model = load(folder, "float32", attention).requires_grad_(True)
    # Models arrive in evaluation mode, where dropout and gradient checkpointing are silently off.
    model.train()
    return model


def save_full(model: PreTrainedModel, dtype: str, tokenizer_folder: Path, out: Path) -> None:
    """Save a model and its tokenizer as plain transformers loads them. The model is converted in place.

    Args:
        model: the trained model.
        dtype: data type of the saved weights, which is that of the served model.
        tokenizer_folder: folder of the model that was trained.
        out: folder to write.
    """
    model.to(getattr(torch, dtype)).save_pretrained(out)
    load_tokenizer(tokenizer_folder).save_pretrained(out)
