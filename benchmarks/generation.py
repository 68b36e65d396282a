"""How fast held-out prompts are answered, against one prompt at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks import reference
from benchmarks.setting import Result, Rows, ratio
from lisa_lightning.data.templates import encode_prompt
from lisa_lightning.evaluate.generate import batches, generate
from lisa_lightning.model.lora import load

REPETITIONS = 5  # of half a minute each
NEVER = -1  # no token ends an answer, so that all have the same length
DECISIVE = 4  # new tokens after which the strict rule of SST-2 can tell
PUBLISHED_LIMIT = 200  # new tokens that the official scripts ask for on SST-2


def answers(model: Any, prompts: Sequence[list[int]], size: int, max_new_tokens: int, end: int) -> list[list[int]]:
    """All prompts as the evaluator asks them: batches of similar length."""
    found: list[list[int]] = [[]] * len(prompts)
    for chosen in batches(prompts, size):
        batch = generate(model, [prompts[i] for i in chosen], max_new_tokens, lambda ids: ids[-1] == end)
        for i, ids in zip(chosen, batch, strict=True):
            found[i] = ids[:-1] if ids[-1] == end else ids
    return found


def measure(folder: Path, rows: Rows) -> list[Result]:
    """The reference answers a few prompts a repetition, ours all; times are compared per prompt."""
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
    """A form of one prompt at a time: how many times as fast we mean to be, prompts a repetition, and how."""

    target: float
    sample: int
    answer: Callable[[list[int]], list[int]]


def _compare(
    prompts: Sequence[list[int]], ours: Callable[[Sequence[list[int]]], list[list[int]]], theirs: Sequence[_Reference]
) -> list[tuple[list[float], float, str]]:
    """Each of `theirs`: its seconds a prompt over those of `ours`, in turn; and how many answers are the same."""
    ours(prompts[:8])
    theirs[0].answer(prompts[0])
    speeds: list[list[tuple[float, float]]] = [[] for _ in theirs]
    same = [0] * len(theirs)
    for i in range(REPETITIONS):
        started = perf_counter()
        found = ours(prompts)
        fast = (perf_counter() - started) / len(prompts)
        for k, form in enumerate(theirs):
            chosen = range(i * form.sample, (i + 1) * form.sample)
            started = perf_counter()
            wanted = [form.answer(prompts[c]) for c in chosen]
            speeds[k].append((fast, (perf_counter() - started) / form.sample))
            same[k] += sum(found[c] == w for c, w in zip(chosen, wanted, strict=True))
    results = []
    for form, pairs, equal in zip(theirs, speeds, same, strict=True):
        fast, slow = (1000 * median(s) for s in zip(*pairs, strict=True))
        note = f"{fast:.0f} ms a prompt against {slow:.0f}; {equal} of {REPETITIONS * form.sample} answers the same"
        results.append(([slow / fast for fast, slow in pairs], form.target, note))
    return results
