"""Batched greedy generation with a shared prompt prefix computed once and finished rows leaving the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from lisa_lightning.data.templates import MARKER
from lisa_lightning.model.lora import attention_window


def batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of prompts in batches of at most `size`, prompts of similar length together."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    return [order[i : i + size] for i in range(0, len(order), size)]


class Stop:
    """Whether an answer is over: at an end token, or at a second `### Response:`, where the papers cut it too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: Any = None) -> None:
        config = getattr(model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)  # chat models may end a turn by another token than a text
        eos: Any = tokenizer.eos_token_id
        self.ends = {eos, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.tokenizer = tokenizer

    def __call__(self, answer: Sequence[int]) -> bool:
        """For a row's tokens so far, the newest last."""
        if answer[-1] in self.ends:
            return True
        # The last tokens alone are decoded: a marker ends in a colon and is never longer than its letters.
        return ":" in self.text(answer[-1:]) and MARKER in self.text(answer[-len(MARKER) - 1 :])

    def text(self, ids: Sequence[int]) -> str:
        """The words of these tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """The greedy continuations of one batch of prompts, each up to and with the token at which `stop` held.

    Args:
        model: a `transformers` causal language model in evaluation mode.
        prompts: token ids, none empty, of any lengths.
        stop: whether a row is finished, asked after each of its tokens.
    """
    device = model.get_input_embeddings().weight.device
    # A window slides by place in the batch, which padding behind a shared prefix would put off.
    prefix = _shared_prefix(prompts) if attention_window(model) is None else 0
    cache = DynamicCache(config=model.config)
    if prefix:
        model(input_ids=torch.tensor([prompts[0][:prefix]], device=device), past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    inputs, mask = _left_padded([list(p[prefix:]) for p in prompts], device)
    mask = torch.cat([mask.new_ones(len(prompts), prefix), mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, prefix:]

    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = logits.argmax(dim=-1)
        for row, token in zip(alive, chosen.tolist(), strict=True):
            answers[row].append(token)
        going = [i for i, row in enumerate(alive) if not stop(answers[row])]
        if not going:
            break
        if len(going) < len(alive):
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
            alive = [alive[i] for i in going]
        inputs = chosen[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
    return answers


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning that leaves every prompt a token of its own."""
    limit = min(map(len, prompts)) - 1
    differs = (i for i in range(limit) if len({p[i] for p in prompts}) > 1)
    return next(differs, limit)


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask
