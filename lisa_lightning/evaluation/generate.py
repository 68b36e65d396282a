"""Batched generation (`generate`). A shared prompt prefix is computed once; finished rows leave the batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from lisa_lightning.data.templates import MARKER
from lisa_lightning.model.hooks import attention_window
from lisa_lightning.model.sharding import is_sharded


def batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Return the indices of prompts in batches of at most `size`, prompts of similar length together.

    Args:
        prompts: token ids of each prompt.
        size: maximum number of prompts per batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    return [order[i : i + size] for i in range(0, len(order), size)]


class Stop:
    """Stopping criterion: an end token, or a second `### Response:`, at which the papers truncate an answer too.

    Args:
        tokenizer: tokenizer of the model.
        model: model whose generation config has further end tokens; None for the tokenizer's alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: Any = None) -> None:
        config = getattr(model, "generation_config", None)
        # Chat models may have different end tokens for turns and texts.
        ends = getattr(config, "eos_token_id", None)
        eos: Any = tokenizer.eos_token_id
        self.ends = {eos, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.tokenizer = tokenizer

    def __call__(self, answer: Sequence[int]) -> bool:
        """Return True if an answer is complete.

        Args:
            answer: ids of its tokens, the newest last.
        """
        if answer[-1] in self.ends:
            return True
        # Only the last tokens are decoded: a marker ends in a colon and has at most as many tokens as letters.
        return ":" in self.text(answer[-1:]) and MARKER in self.text(answer[-len(MARKER) - 1 :])

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of these tokens, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def most_probable(logits: Tensor, _rows: Sequence[int]) -> Tensor:
    """Return the most probable token of each row, for greedy generation.

    Args:
        logits: logits of the next token, rows x vocabulary.
    """
    return logits.argmax(dim=-1)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Callable[[Sequence[int]], bool],
    choose: Callable[[Tensor, Sequence[int]], Tensor] = most_probable,
) -> list[list[int]]:
    """Return the continuations of a batch of prompts.

    Args:
        model: a `transformers` causal language model in evaluation mode. If it is sharded, all ranks must call this at
            the same time, one without prompts too.
        prompts: token ids of each prompt, of any length above 0.
        max_new_tokens: maximum number of tokens of a continuation.
        stop: returns True if a continuation is complete; called after each of its tokens.
        choose: returns the next token of each unfinished row, from its logits and the indices of these rows.

    Returns:
        Token ids of each continuation, including the token at which `stop` returned True.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    passes = _continue(model, prompts, max_new_tokens, stop, choose, answers)
    if is_sharded(model):
        _pass_together(model, passes)
    for _ in passes:
        pass
    return answers


def _pass_together(model: Any, passes: Iterator[None]) -> None:
    """Make the passes of all ranks at the same time, since each gathers weights from all of them.

    A rank that has made its passes makes others of one token until all have.

    Args:
        model: the sharded model.
        passes: yields before each pass of this rank.
    """
    device = model.get_input_embeddings().weight.device
    is_pending = True
    while is_pending:
        # The pass that was announced before runs now.
        has_pass = next(passes, passes) is None
        pending = torch.tensor(float(has_pass), device=device)
        torch.distributed.all_reduce(pending)
        is_pending = bool(pending)
        if is_pending and not has_pass:
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False, logits_to_keep=1)


def _continue(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Callable[[Sequence[int]], bool],
    choose: Callable[[Tensor, Sequence[int]], Tensor],
    answers: list[list[int]],
) -> Iterator[None]:
    """Append the continuations of a batch of prompts to `answers`, and yield before each forward pass."""
    if not prompts:
        return
    device = model.get_input_embeddings().weight.device
    # A sliding window counts columns of the batch, which padding after a shared prefix would shift.
    prefix = _shared_prefix(prompts) if attention_window(model) is None else 0
    cache = DynamicCache(config=model.config)
    if prefix:
        yield
        model(input_ids=torch.tensor([prompts[0][:prefix]], device=device), past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    inputs, mask = _left_padded([list(p[prefix:]) for p in prompts], device)
    mask = torch.cat([mask.new_ones(len(prompts), prefix), mask], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, prefix:]

    active = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        yield
        logits = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = choose(logits, active)
        for row, token in zip(active, tokens.tolist(), strict=True):
            answers[row].append(token)
        unfinished = [i for i, row in enumerate(active) if not stop(answers[row])]
        if not unfinished:
            break
        if len(unfinished) < len(active):
            index = torch.tensor(unfinished, device=device)
            cache.batch_select_indices(index)
            tokens, mask, positions = tokens[index], mask[index], positions[index]
            active = [active[i] for i in unfinished]
        inputs = tokens[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common prefix that leaves at least one token of every prompt."""
    limit = min(map(len, prompts)) - 1
    differs = (i for i in range(limit) if len({p[i] for p in prompts}) > 1)
    return next(differs, limit)


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask
