"""The completion loss of all methods, and whether a model can take it on packed tries.

Divided by the number of supervised tokens it equals the model's own `labels=` loss on the padded batch, and so do its
gradients.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from lisa_lightning.data.packing import Example, Pack, Packing, pack, pad
from lisa_lightning.model.hooks import skipped
from lisa_lightning.model.lora import attention_window
from lisa_lightning.runtime.errors import first_line

log = logging.getLogger(__name__)
_ROWS = ((5, 6, 7, 8, 9), (5, 6, 9, 7, 5, 8))  # in a trie's order, which is that of their logits
PROBE = [Example(ids, ids) for ids in _ROWS]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class _Decoded(BaseModelOutputWithPast):
    """A decoder's hidden states; what else a head may pass on is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def completion_loss(model: Any, packs: Sequence[Pack]) -> Tensor:
    """Sum (not mean) of the cross entropies of all supervised tokens of `packs`, in float32.

    Every module of the model runs in it as usual, so that hooks see what they would see elsewhere. With dropout, a
    token that rows share draws one mask for all of them.

    Args:
        model: a `transformers` causal language model, its LoRA layers in place.
        packs: at least one.
    """
    return torch.stack([_entropies(model, p, "sum") for p in packs]).sum()


def token_losses(model: Any, packs: Sequence[Pack]) -> Tensor:
    """[S] cross entropies of all supervised tokens of `packs`, in their order, in float32."""
    return torch.cat([_entropies(model, p, "none") for p in packs])


def row_losses(model: Any, packs: Sequence[Pack]) -> tuple[Tensor, Tensor]:
    """[R] the summed loss of each row that has labels, in the rows' order, and [R] how many it has."""
    _, row, labels = torch.cat([p.rows for p in packs]).unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(labels), device=row.device).index_add(0, row, token_losses(model, packs)), labels


def _entropies(model: Any, packed: Pack, reduction: str) -> Tensor:
    return F.cross_entropy(logits_at(model, packed, packed.predictors).float(), packed.targets, reduction=reduction)


def unembed(model: Any, hidden: Tensor) -> Tensor:
    """[N, V] logits of final hidden states [N, H], by the model itself: some scale or cap what their head gives."""
    with skipped([model.get_decoder()], _Decoded(last_hidden_state=hidden[None])):
        return model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)).logits[0]


def logits_at(model: Any, packed: Pack, predictors: Tensor) -> Tensor:
    """[S, V] behind the tokens at `predictors` [S], as in a pack; hardly any other position is unembedded."""
    columns, at = predictors, None  # of a trie, which is one row
    if packed.positions is None:
        width = packed.ids.shape[1]
        columns, of = (predictors % width).unique(return_inverse=True)
        at = predictors // width * len(columns) + of
    logits = forward(model, packed, columns).logits
    assert logits.shape[1] == len(columns), "a model that knows no logits_to_keep"
    return logits[0] if at is None else logits.flatten(0, 1)[at]


def forward(model: Any, packed: Pack, kept: Tensor | int, **asked: bool) -> Any:
    """What `model` makes of a pack's tokens.

    Args:
        kept: the columns [C] whose tokens are unembedded, or how many of the last; 0 for all.
        asked: what else it shall give, as `transformers` calls it.
    """
    if packed.positions is None:
        told = {"attention_mask": packed.mask.long()}
    else:
        dtype = model.get_input_embeddings().weight.dtype
        blocked = torch.zeros(packed.mask.shape, dtype=dtype, device=packed.mask.device)
        blocked.masked_fill_(~packed.mask, torch.finfo(dtype).min)
        told = {"attention_mask": blocked, "position_ids": packed.positions}
    return model(input_ids=packed.ids, use_cache=False, logits_to_keep=kept, **told, **asked)


def choose_packing(model: Any, max_length: int) -> Packing:
    """How to pack examples for `model`: as tries where that gives the model's own loss, else as padded rows.

    Told by trying both on a few tokens, since neither an architecture's name nor its attention tells it reliably.

    Args:
        max_length: of an example, tokens; an attention window that is shorter can't be kept by a trie's mask.
    """
    window = attention_window(model)
    narrow = window is not None and max_length > window
    reason = f"rows may be longer than its attention window of {window} tokens" if narrow else _difference(model)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if reason and first:
        log.warning("%s can't share prefixes (%s): rows are padded instead.", type(model).__name__, reason)
    return pad if reason else pack


def unmixed(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast within, on any device."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@torch.no_grad()
def _difference(model: Any) -> str:
    """What is wrong with the logits on a trie, empty where nothing is."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        padded, trie = (packing(PROBE)[0].to(device) for packing in (pad, pack))
        with unmixed(device):  # the tolerance is that of the model's own type
            whole = model(input_ids=padded.ids, attention_mask=padded.mask.long(), use_cache=False).logits
            wanted = whole.flatten(0, 1)[padded.predictors]
            try:
                found = logits_at(model, trie, trie.predictors)
            except Exception as error:  # whatever an architecture makes of a mask that it doesn't know
                return f"{type(error).__name__}: {first_line(error)}"
    finally:
        model.train(training)
    error = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
    return "" if error <= TOLERANCE[model.dtype] else f"its logits would be {100 * error:.1g} % off"
