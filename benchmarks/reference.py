"""A plain form of the published implementations, with which all benchmarks compare. Start at `step` and `answer`.

- Batches are padded to their longest row.
- The loss is that of `labels=`, over full logits.
- The penalty is a term of the loss, differentiated by autograd, with one norm per tensor.
- Generation handles one prompt at a time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from lisa_lightning.data.packing import IGNORED, Example


def model(folder: Path) -> Any:
    """Return the model as `transformers` loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(folder: Path, lora: Any) -> Any:
    """Return the model with a fresh adapter."""
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=lora.targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model(folder), config).train()


def loss(net: Any, rows: Sequence[Example]) -> Tensor:
    """Return the mean cross-entropy over supervised tokens."""
    ids = pad_sequence([torch.tensor(r.ids) for r in rows], batch_first=True, padding_value=0)
    labels = pad_sequence([torch.tensor(r.labels) for r in rows], batch_first=True, padding_value=IGNORED)
    mask = pad_sequence([torch.ones(len(r.ids), dtype=torch.long) for r in rows], batch_first=True)
    device = next(net.parameters()).device
    return net(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device), use_cache=False).loss


def penalty(weights: Sequence[Tensor], anchor: Sequence[Tensor], rho: float) -> Tensor:
    """Return rho/2 * ||w - anchor||^2."""
    total = torch.zeros((), device=weights[0].device)
    for w, a in zip(weights, anchor, strict=True):
        total = total + rho / 2 * torch.norm(w - a) ** 2
    return total


def step(
    net: Any, optimizer: Any, weights: Sequence[Tensor], anchor: Sequence[Tensor], rho: float, rows: Sequence[Example]
) -> float:
    """Make one step of Lisa, and return its loss."""
    optimizer.zero_grad()
    total = loss(net, rows) + penalty(weights, anchor, rho)
    total.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    return total.item()


@torch.no_grad()
def answer(plain: Any, prompt: Sequence[int], max_new_tokens: int, end: int | None) -> list[int]:
    """Return the greedy continuation of one prompt, without the end token."""
    ids = torch.tensor([list(prompt)], device=plain.device)
    out = plain.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=-1 if end is None else end,
        pad_token_id=0,
    )
    continuation = out[0, len(prompt) :].tolist()
    return continuation[:-1] if end is not None and continuation[-1] == end else continuation
