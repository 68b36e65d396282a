"""Speed of answering held-out prompts, compared with one prompt at a time. Start at `measure`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks import reference
from benchmarks.setting import Result, Rows, ratio
from lisa_lightning.data.templates import encode_prompt
from lisa_lightning.evaluation.generate import batches, generate
from lisa_lightning.model.lora import load

REPETITIONS = 5
"""Repetitions, each of half a minute."""
NEVER = -1
"""End token that no answer has, so that all answers have the same length."""
DECISIVE = 4
"""New tokens that determine the strict rule of SST-2."""
PUBLISHED_LIMIT = 200
"""New tokens that the official scripts generate on SST-2."""


def answers(model: Any, prompts: Sequence[list[int]], size: int, max_new_tokens: int, end: int) -> list[list[int]]:
    """Return answers as the evaluator generates them, in batches of prompts of similar length.

    Args:
        model: model in evaluation mode.
        prompts: token ids.
        size: prompts per batch.
        max_new_tokens: largest length of an answer.
        end: end token, which answers are returned without.
    """
    completions: list[list[int]] = [[]] * len(prompts)
    for indices in batches(prompts, size):
        batch = generate(model, [prompts[i] for i in indices], max_new_tokens, lambda ids: ids[-1] == end)
        for i, ids in zip(indices, batch, strict=True):
            completions[i] = ids[:-1] if ids[-1] == end else ids
    return completions


def measure(folder: Path, rows: Rows) -> list[Result]:
    """Compare times per prompt. The reference answers a few prompts per repetition, ours all of them."""
    ours, theirs = load(folder, "float32").eval(), reference.model(folder).eval()
    harmful = [encode_prompt(rows.tokenizer, "alpaca", p) for p in rows.harmful[:64]]
    sst2 = [encode_prompt(rows.tokenizer, "alpaca", row.instruction, row.context) for row in rows.test[:300]]
    end: Any = rows.tokenizer.eos_token_id

    long = _compare(
        harmful,
        lambda ps: answers(ours, ps, 64, 128, NEVER),
        [_Reference(5.0, 1, lambda p: reference.answer(theirs, p, 128, None))],
    )
    short = _compare(
        sst2,
        lambda ps: answers(ours, ps, 48, DECISIVE, end),
        [
            _Reference(12.0, 2, lambda p: reference.answer(theirs, p, PUBLISHED_LIMIT, end)[:DECISIVE]),
            _Reference(12.0, 6, lambda p: reference.answer(theirs, p, DECISIVE, end)),
        ],
    )
    what = "SST-2 accuracy on 300 rows"
    decisive = f"ours the {DECISIVE} that decide the strict rule"
    return [
        ratio("harmful score: 64 prompts, 128 new tokens", *long[0]),
        ratio(f"{what}, the reference generating up to {PUBLISHED_LIMIT} tokens as published, {decisive}", *short[0]),
        ratio(f"{what}, both generating up to {DECISIVE} tokens", *short[1]),
    ]


@dataclass(frozen=True, slots=True)
class _Reference:
    """A reference that answers one prompt at a time."""

    target: float
    """Speed-up over it that is aimed at."""
    sample: int
    """Prompts per repetition."""
    answer: Callable[[list[int]], list[int]]


def _compare(
    prompts: Sequence[list[int]], ours: Callable[[Sequence[list[int]]], list[list[int]]], theirs: Sequence[_Reference]
) -> list[tuple[list[float], float, str]]:
    """Return speed-ups, target and note for each reference, measured in turn with ours."""
    ours(prompts[:8])
    theirs[0].answer(prompts[0])
    speeds: list[list[tuple[float, float]]] = [[] for _ in theirs]
    same = [0] * len(theirs)
    for i in range(REPETITIONS):
        started = perf_counter()
        ours_answers = ours(prompts)
        fast = (perf_counter() - started) / len(prompts)
        for k, form in enumerate(theirs):
            indices = range(i * form.sample, (i + 1) * form.sample)
            started = perf_counter()
            expected = [form.answer(prompts[index]) for index in indices]
            speeds[k].append((fast, (perf_counter() - started) / form.sample))
            same[k] += sum(ours_answers[index] == ids for index, ids in zip(indices, expected, strict=True))
    results = []
    for form, pairs, equal in zip(theirs, speeds, same, strict=True):
        fast, slow = (1000 * median(s) for s in zip(*pairs, strict=True))
        note = f"{fast:.0f} ms a prompt against {slow:.0f}; {equal} of {REPETITIONS * form.sample} answers the same"
        results.append(([slow / fast for fast, slow in pairs], form.target, note))
    return results
