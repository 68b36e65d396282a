"""Batched generation against the library's own, one prompt at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_lightning.evaluate.generate import batches, generate, shard
from lisa_lightning.net import load

OPENING = [10, 11, 12, 13, 14]
PROMPTS = {
    "shared opening": [OPENING + r for r in ([20], [21, 22], [23, 24, 25, 26], [20, 21])],
    "nothing shared": [[20], [21, 22, 23], [30, 31]],
    "one is the other's opening": [[5, 6, 7], [5, 6, 7, 8, 9]],
    "equal": [[5, 6], [5, 6]],
    "one": [[9, 8, 7]],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_equals_one_at_a_time(tiny: Path, name: str) -> None:
    model = load(tiny, "float32").eval()
    torch.manual_seed(0)
    with torch.no_grad():  # sharpen, so that some rows end early and no near-tie decides
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    end = 0
    library: Any = model  # its stubs know no batch of ids
    alone = [
        library.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, pad_token_id=1, eos_token_id=end)[0]
        for p in PROMPTS[name]
    ]
    # The library keeps the end token.
    wanted = [[t for t in a[len(p) :].tolist() if t != end] for a, p in zip(alone, PROMPTS[name], strict=True)]
    ends = {w[3] for w in wanted if len(w) > 3}
    assert generate(model, PROMPTS[name], 12, end) == wanted
    for other in ends:  # ends in the middle of some rows
        cut = [w[: w.index(other)] if other in w else w for w in wanted]
        assert generate(model, PROMPTS[name], 12, other) == cut


def test_batches_hold_every_prompt_once_sorted_by_length() -> None:
    prompts = [[1] * n for n in (5, 1, 4, 2, 3)]
    assert batches(prompts, 2) == [[1, 3], [4, 2], [0]]


def test_shards_are_a_partition() -> None:
    items = list(range(7))
    assert sorted(i for r in range(3) for i, _ in shard(items, r, 3)) == items
