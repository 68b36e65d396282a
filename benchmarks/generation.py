"""How fast held-out prompts are answered, against one prompt at a time."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks import reference
from benchmarks.setting import Result, Rows, ratio
from lisa_lightning.data.encoding import encode_prompt
from lisa_lightning.data.templates import alpaca
from lisa_lightning.evaluate.generate import batches, generate
from lisa_lightning.net import load
from lisa_lightning.tasks.sst2 import SST2

REPETITIONS = 5  # of half a minute each
NEVER = -1  # no token ends an answer, so that all have the same length
PUBLISHED_LIMIT = 200  # new tokens that the official scripts ask for on SST-2


def answers(model: Any, prompts: Sequence[list[int]], size: int, max_new_tokens: int, end: int) -> list[list[int]]:
    """All prompts as the evaluator asks them: batches of similar length."""
    found: list[list[int]] = [[]] * len(prompts)
    for chosen in batches(prompts, size):
        for i, ids in zip(chosen, generate(model, [prompts[i] for i in chosen], max_new_tokens, end), strict=True):
            found[i] = ids
    return found


def measure(folder: Path, rows: Rows) -> list[Result]:
    """The reference answers a few prompts a repetition, ours all; times are compared per prompt."""
    ours, theirs = load(folder, "float32").eval(), reference.model(folder).eval()
    harmful = [encode_prompt(rows.tokenizer, alpaca(p)) for p in rows.harmful[:64]]
    sst2 = [encode_prompt(rows.tokenizer, row.prompt) for row in rows.test[:300]]
    end: Any = rows.tokenizer.eos_token_id
    own_limit = SST2.max_new_tokens

    long = _ratios(
        harmful,
        1,
        lambda ps: answers(ours, ps, 64, 128, NEVER),
        lambda p: reference.answer(theirs, p, 128, None),
    )
    short = _ratios(
        sst2, 6, lambda ps: answers(ours, ps, 48, own_limit, end), lambda p: reference.answer(theirs, p, own_limit, end)
    )
    published = _ratios(
        sst2,
        1,
        lambda ps: answers(ours, ps, 48, own_limit, end),
        lambda p: reference.answer(theirs, p, PUBLISHED_LIMIT, end)[:own_limit],
    )
    return [
        ratio("harmful score: 64 prompts, 128 new tokens", long.ratios, 5.0, long.note),
        ratio(
            f"SST-2 accuracy on 300 rows, the reference generating up to {PUBLISHED_LIMIT} tokens as published, "
            f"ours the {own_limit} that decide the strict rule",
            published.ratios,
            12.0,
            published.note,
        ),
        ratio(f"SST-2 accuracy on 300 rows, both generating up to {own_limit} tokens", short.ratios, 12.0, short.note),
    ]


class _ratios:
    """Seconds a prompt of `theirs` over those of `ours`, in turn; and whether the answers are the same."""

    def __init__(self, prompts: Sequence[list[int]], sample: int, ours: Any, theirs: Any) -> None:
        ours(prompts[:8])
        theirs(prompts[0])
        self.ratios: list[float] = []
        same = total = 0
        milliseconds = []
        for i in range(REPETITIONS):
            chosen = list(range(i * sample, (i + 1) * sample))
            started = perf_counter()
            wanted = [theirs(prompts[c]) for c in chosen]
            slow = (perf_counter() - started) / sample
            started = perf_counter()
            found = ours(prompts)
            fast = (perf_counter() - started) / len(prompts)
            self.ratios.append(slow / fast)
            milliseconds.append((1000 * fast, 1000 * slow))
            same += sum(found[c] == w for c, w in zip(chosen, wanted, strict=True))
            total += sample
        ours_ms, theirs_ms = (median(m) for m in zip(*milliseconds, strict=True))
        self.note = (
            f"{ours_ms:.0f} ms a prompt against {theirs_ms:.0f}; "
            f"{same} of the {total} answers that the reference gave are the same"
        )
