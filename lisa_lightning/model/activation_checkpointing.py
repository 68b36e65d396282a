"""Layers whose activations are computed again in the backward pass: `checkpoint_activations`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lisa_lightning.model.hooks import Recomputation
from lisa_lightning.runtime.errors import UserError


def checkpoint_activations(model: Any) -> None:
    """Let decoder layers save only their inputs, and compute the rest again in the backward pass.

    Results are equal, since dropout masks and changed outputs are repeated. Passes in evaluation mode are unaffected.

    Args:
        model: a causal language model of transformers, with its LoRA layers.

    Raises:
        UserError: if the architecture does not support it.
    """
    options = {"use_reentrant": False, "context_fn": _contexts}
    try:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    except ValueError as error:
        raise UserError(
            f"trainer.activation_checkpointing=true: {type(model).__name__} does not support it. "
            "Fix: trainer.activation_checkpointing=false"
        ) from error


def _contexts() -> tuple[AbstractContextManager[None], Recomputation]:
    """Return the contexts of a layer's forward pass and of its repetition."""
    return nullcontext(), Recomputation()
