"""The completion loss of all methods: `completion_loss`, and `choose_packing`, which checks a model for packed tries.

The loss divided by the number of supervised tokens equals the `labels=` loss of the model on the padded batch. The same
holds for the gradients.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lisa_lightning.data.packing import Example, Pack, Packing, pack, pad
from lisa_lightning.model.hooks import attention_window, skip_forward
from lisa_lightning.runtime.errors import first_line

log = logging.getLogger(__name__)
# The rows are in the order of a trie, so that their logits are in the same order as the padded ones.
_PROBE_IDS = ((5, 6, 7, 8, 9), (5, 6, 9, 7, 5, 8))
PROBE = [Example(ids, ids) for ids in _PROBE_IDS]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative error of a token's logits on a trie, by data type of the model."""


@cache
def _decoder_output() -> type[Any]:
    """Return the class of a decoder's output with nothing but hidden states.

    It is defined on first use, because importing transformers takes seconds and methods are also imported only for
    their settings.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class HiddenStates(BaseModelOutputWithPast):
        """Hidden states. Every other attribute that a head may read is None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return dataclass(HiddenStates)


def completion_loss(model: Any, packs: Sequence[Pack]) -> Tensor:
    """Return the sum, not the mean, of the cross-entropies of all supervised tokens, as a scalar of at least float32.

    Every module of the model is called as usual, so hooks work. With dropout, a token that rows share has one mask for
    all of them.

    Args:
        model: a causal language model of `transformers`, with its LoRA layers.
        packs: at least one pack.
    """
    return torch.stack([_cross_entropies(model, p, "sum") for p in packs]).sum()


def token_losses(model: Any, packs: Sequence[Pack]) -> Tensor:
    """Return the cross-entropies [S], of at least float32, of all supervised tokens, in the order of `packs`."""
    return torch.cat([_cross_entropies(model, p, "none") for p in packs])


def row_losses(model: Any, packs: Sequence[Pack]) -> tuple[Tensor, Tensor]:
    """Return the summed loss of each row with labels, and its number of labels.

    Returns:
        Two tensors [R], in the order of the rows.
    """
    _, row, label_counts = torch.cat([p.row_index for p in packs]).unique(return_inverse=True, return_counts=True)
    losses = token_losses(model, packs)
    return losses.new_zeros(len(label_counts)).index_add(0, row, losses), label_counts


def _cross_entropies(model: Any, packed: Pack, reduction: str) -> Tensor:
    logits = logits_at(model, packed, packed.logit_positions)
    # Logits of half precision are too coarse for the loss.
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise, packed.targets, reduction=reduction)


def label_logits(model: Any, packs: Sequence[Pack]) -> Tensor:
    """Return the logits [S, V] at the positions that predict a label, in the order of `packs`."""
    return torch.cat([logits_at(model, packed, packed.logit_positions) for packed in packs])


def all_logits(model: Any, packs: Sequence[Pack]) -> Tensor:
    """Return the logits [R, T, V] of a single pack of padded rows."""
    (packed,) = packs
    return forward(model, packed, 0).logits


def unembed(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits [N, V] of final hidden states [N, H].

    The model computes them, because some models scale or cap the output of their head.
    """
    with skip_forward([model.get_decoder()], _decoder_output()(last_hidden_state=hidden[None])):
        return model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)).logits[0]


def logits_at(model: Any, packed: Pack, logit_positions: Tensor) -> Tensor:
    """Return the logits [S, V] of the tokens at flat positions [S]. Almost no other token is unembedded.

    Args:
        model: a causal language model of `transformers`.
        packed: a pack.
        logit_positions: [S] positions as in `Pack.logit_positions`.
    """
    # A trie is one row, so that a position is a column.
    columns, flat_index = logit_positions, None
    if packed.positions is None:
        width = packed.ids.shape[1]
        columns, column_index = (logit_positions % width).unique(return_inverse=True)
        flat_index = logit_positions // width * len(columns) + column_index
    logits = forward(model, packed, columns).logits
    assert logits.shape[1] == len(columns), "a model without logits_to_keep"
    return logits[0] if flat_index is None else logits.flatten(0, 1)[flat_index]


def forward(model: Any, packed: Pack, logits_to_keep: Tensor | int, **output_options: bool) -> Any:
    """Return the output of `model` for the tokens of a pack.

    Args:
        model: a causal language model of `transformers`.
        packed: a pack.
        logits_to_keep: columns [C] whose tokens are unembedded, or the number of last columns; 0 for all.
        **output_options: options of `transformers` for further outputs, such as `output_hidden_states`.
    """
    if packed.positions is None:
        inputs = {"attention_mask": packed.mask.long()}
    else:
        dtype = model.get_input_embeddings().weight.dtype
        blocked = torch.zeros(packed.mask.shape, dtype=dtype, device=packed.mask.device)
        blocked.masked_fill_(~packed.mask, torch.finfo(dtype).min)
        inputs = {"attention_mask": blocked, "position_ids": packed.positions}
    with _kept_rng(packed.ids.device) if packed.is_filler else nullcontext():
        return model(input_ids=packed.ids, use_cache=False, logits_to_keep=logits_to_keep, **inputs, **output_options)


def _kept_rng(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores the state of the random numbers, so that a filler changes no dropout mask."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def choose_packing(model: Any, max_length: int) -> Packing:
    """Return `pack` if packed tries give the loss of the padded batch, else `pad`.

    Both are compared on a few tokens, because neither the name of an architecture nor its attention is a reliable sign.

    Args:
        model: a causal language model of `transformers`.
        max_length: largest length of an example in tokens. The mask of a trie can't represent a shorter attention
            window.
    """
    window = attention_window(model)
    is_short = window is not None and max_length > window
    reason = f"rows may be longer than its attention window of {window} tokens" if is_short else _packing_error(model)
    is_rank_zero = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if reason and is_rank_zero:
        log.warning("%s can't share prefixes (%s): rows are padded instead.", type(model).__name__, reason)
    return pad if reason else pack


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, for any device."""
    is_available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if is_available else nullcontext()


@torch.no_grad()
def _packing_error(model: Any) -> str:
    """Return why `model` cannot compute on a packed trie, or "" if its logits match the padded batch."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        padded, trie = (packing(PROBE)[0].to(device) for packing in (pad, pack))
        # The tolerance is for the data type of the model, not of autocast.
        with no_autocast(device):
            padded_logits = model(input_ids=padded.ids, attention_mask=padded.mask.long(), use_cache=False).logits
            expected = padded_logits.flatten(0, 1)[padded.logit_positions]
            try:
                actual = logits_at(model, trie, trie.logit_positions)
            # An architecture may fail in any way on a mask that it does not support.
            except Exception as error:
                return f"{type(error).__name__}: {first_line(error)}"
    finally:
        model.train(training)
    error = float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    return "" if error <= TOLERANCE[model.dtype] else f"its logits would be {100 * error:.1g} % off"
