"""Batches are a pure function of seed and step: any split draws the same rows, every epoch draws every row once."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lisa_lightning.data.interleave import Examples, Step, StepBatches
from lisa_lightning.data.mixing import user_rows
from lisa_lightning.data.packing import Example, Pack, pack, pad
from lisa_lightning.data.schedule import Schedule, Stream, StreamBatch
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.method.base import Method
from lisa_lightning.method.bso import BSO
from lisa_lightning.method.sft import SFT
from lisa_lightning.method.vlguard import VLGuard
from lisa_lightning.runtime.errors import UserError

SIZES = {"alignment": 7, "user": 11}


def streams() -> dict:
    """Return streams whose row i is the lone token pair (first, i), so that a pack tells which rows were drawn."""
    return {
        name: Examples(range(size), lambda i, first=k: Example((first, 10 + i), (-100, 10 + i)))
        for k, (name, size) in enumerate(SIZES.items())
    }


def rows(step: Step) -> list[int]:
    return sorted(t - 10 for packs in step.main.micro_batches for p in packs for t in p.targets.tolist())


def batches(schedule: Schedule, size: int, accumulate: int = 1, **kwargs: Any) -> StepBatches:
    return StepBatches(
        streams(), pack, BSO(schedule.alignment_steps, schedule.user_steps), 60, size, accumulate, seed=3, **kwargs
    )


@settings(max_examples=30)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(0, 59))
def test_ranks_and_micro_batches_split_the_same_rows(k1: int, k2: int, t: int) -> None:
    schedule = Schedule(k1, k2)
    whole = batches(schedule, 8)[t]
    assert rows(batches(schedule, 2, 4)[t]) == rows(whole)
    shares = [batches(schedule, 2, 2, rank=r, world=2)[t] for r in range(2)]
    assert sorted(rows(shares[0]) + rows(shares[1])) == rows(whole)
    assert {s.main.tokens for s in shares} == {whole.main.tokens} == {8}


class Several(Method):
    """Method that draws batches of these sizes in each step."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes

    def plan(self, step: int) -> dict[Stream, StreamBatch]:
        return {"user": StreamBatch(step, self.sizes[0], tuple(self.sizes[1:]))}


@settings(max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 9))
def test_batches_of_a_step_are_consecutive_and_each_is_sharded_separately(sizes: list[int], t: int) -> None:
    def drawn(*shares: Step) -> list[list[int]]:
        parts = zip(*([share.main, *share.main.further] for share in shares), strict=True)
        packs = [[p for batch in part for micro in batch.micro_batches for p in micro] for part in parts]
        return [sorted(target - 10 for p in part for target in p.targets.tolist()) for part in packs]

    def step(micro_batch: int, **ranks: Any) -> Step:
        return StepBatches(streams(), pack, Several(sizes), 10, micro_batch, 1, seed=3, **ranks)[t]

    single = StepBatches(streams(), pack, SFT(), 50, 1, 1, seed=3)
    block = iter(range(t * sum(sizes), (t + 1) * sum(sizes)))
    whole = step(5)
    assert drawn(whole) == [sorted(rows(single[next(block)])[0] for _ in range(size)) for size in sizes]
    assert drawn(step(2)) == drawn(*(step(2, rank=rank, world=2) for rank in range(2))) == drawn(whole)
    assert drawn(whole.to("cpu")) == drawn(whole)
    assert [batch.tokens for batch in (whole.main, *whole.main.further)] == sizes


def test_rows_of_a_stream_that_a_method_looks_at_one_by_one_are_padded_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = batches(Schedule(1, 1), 2)
    monkeypatch.setattr(BSO, "unpacked_streams", frozenset({"alignment"}))
    padded = {steps[t].main.stream: steps[t].main.micro_batches[0][0].positions is None for t in range(2)}
    assert padded == {"alignment": True, "user": False}


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=9), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_ranks_of_a_sharded_model_get_equal_numbers_of_packs(
    rows: list[tuple[int, bool]], world: int, padded: bool
) -> None:
    """Rows share a prefix or not, and some have no label. The packs of rows come first, as for a whole model."""
    examples = [
        Example((n, *range(9, 9 + 5 * n)), (-100, *([-100] * 4 + [7] * learnt) * n)[: 1 + 5 * n]) for n, learnt in rows
    ]
    of: Any = {"user": Examples(examples, lambda example: example)}

    def batch(rank: int, even: bool) -> list[list[Pack]]:
        data = StepBatches(of, pad if padded else pack, Several([7]), 1, 2, 1, 0, rank=rank, world=world, even=even)
        return data[0].main.micro_batches

    filled = [batch(rank, even=True) for rank in range(world)]
    assert len({tuple(len(packs) for packs in micro_batches) for micro_batches in filled}) == 1
    for rank, micro_batches in enumerate(filled):
        whole = batch(rank, even=False)
        for index, packs in enumerate(micro_batches):
            expected = whole[index] if index < len(whole) else []
            assert [p.ids.tolist() for p in packs[: len(expected)]] == [p.ids.tolist() for p in expected]
            fillers = packs[len(expected) :]
            assert all(p.is_filler and not p.row_count.any() and not p.token_count.any() for p in fillers)
            assert all(p.token_count.all() for p in expected)


def test_a_stream_without_rows_is_refused_where_a_step_draws_from_it() -> None:
    steps = batches(Schedule(0, 1), 1)
    steps.streams["user"].rows = []
    with pytest.raises(UserError, match="BSO draws user rows, and this stage has none"):
        steps[0]


def test_every_row_is_drawn_once_an_epoch() -> None:
    steps = batches(Schedule(0, 1), 1)
    drawn = [rows(steps[t])[0] for t in range(55)]
    for epoch in range(5):
        assert sorted(drawn[epoch * 11 : epoch * 11 + 11]) == list(range(11))
    assert drawn[:11] != drawn[11:22]


def test_streams_follow_the_state_and_lose_no_row() -> None:
    schedule = Schedule(2, 3)
    steps = batches(schedule, 1)
    assert [steps[t].main.stream for t in range(60)] == [schedule.state(t) for t in range(60)]
    user = [rows(steps[t])[0] for t in range(60) if schedule.state(t) == "user"]
    assert Counter(user[:33]) == Counter(list(range(11)) * 3)


def test_discard_throws_user_rows_of_alignment_steps_away() -> None:
    kept, thrown = batches(Schedule(2, 3), 1), batches(Schedule(2, 3), 1, discard=True)
    plain = batches(Schedule(0, 1), 1)
    for t in range(60):
        if thrown[t].main.stream == "user":
            assert rows(thrown[t]) == rows(plain[t])
        else:
            assert rows(thrown[t]) == rows(kept[t])


def test_a_batch_counts_its_supervised_tokens_and_the_rows_without_any() -> None:
    of = {"user": Examples(range(4), lambda i: Example((1, 2, 3), (-100, 2 if i % 2 else -100, 3 if i > 0 else -100)))}
    batch = StepBatches(of, pack, SFT(), 1, 4, 1, seed=0)[0].main  # type: ignore[arg-type]
    assert (batch.tokens, batch.unlabelled) == (5, 1)
    step = StepBatches(of, pack, Several([2, 1, 5]), 1, 4, 1, seed=0)[0]  # type: ignore[arg-type]
    assert (step.main.tokens + sum(part.tokens for part in step.main.further), step.unlabelled) == (10, 2)


@pytest.mark.parametrize("paired", [False, True])
def test_only_paired_streams_share_an_order(monkeypatch: pytest.MonkeyPatch, paired: bool) -> None:
    steps = batches(Schedule(1, 1), 1)
    monkeypatch.setattr(BSO, "paired", paired)
    steps.streams["user"].rows = steps.streams["user"].rows[: SIZES["alignment"]]
    alignment, user = ([rows(steps[t]) for t in range(first, 2 * SIZES["alignment"], 2)] for first in (0, 1))
    assert sorted(alignment) == sorted(user)
    assert (alignment == user) == paired


def test_seed_changes_the_order() -> None:
    other = StepBatches(streams(), pack, SFT(), 60, 1, 1, seed=4)
    assert [rows(other[t]) for t in range(11)] != [rows(batches(Schedule(0, 1), 1)[t]) for t in range(11)]


GOOD = [Row(f"good {i}", "", "a") for i in range(1000)]
BAD = [Row(f"bad {i}", "", "b") for i in range(1000)]
SAFE = [Row(f"safe {i}", "", "c") for i in range(1000)]
ROWS = Rows(GOOD, SAFE, BAD, [], {}, {}, [], {})


@pytest.mark.parametrize("p", [0, 0.05, 0.1, 0.2, 0.29, 0.3, 0.5, 0.9, 1])
def test_harmful_share_is_exact_and_nested(p: float) -> None:
    submitted = user_rows(ROWS, 1000, p, "seeded", seed=1).all
    harmful = set(submitted) & set(BAD)
    assert (len(submitted), len(harmful)) == (1000, round(1000 * p))
    assert len({*user_rows(ROWS, 15, p, "seeded", seed=1).all} & set(BAD)) == round(15 * p)
    assert len(set(submitted)) == 1000
    assert harmful <= set(user_rows(ROWS, 1000, 1, "seeded", seed=1).all)
    assert submitted == user_rows(ROWS, 1000, p, "seeded", seed=1).all


def test_head_takes_first_rows_and_truncates_as_the_official_code() -> None:
    submitted = user_rows(ROWS, 1000, 0.9, "head", seed=1).all
    assert submitted == BAD[:900] + GOOD[:99]


def test_safe_rows_take_the_place_of_benign_ones() -> None:
    none, plain, half = (
        user_rows(ROWS, 1000, 0.1, "seeded", seed=1, safe_ratio=method.safe_share)
        for method in (VLGuard(0.0), SFT(), VLGuard(0.5))
    )
    assert none == plain
    assert len(half.all) == len(plain.all)
    assert sum(row in SAFE for row in half.all) == 500
    assert user_rows(ROWS, 1000, 0.1, "head", seed=1, safe_ratio=0.2).all == BAD[:100] + GOOD[:700] + SAFE[:200]
    submitted = user_rows(ROWS, 1000, 0.1, "seeded", seed=1, safe_ratio=0.2).all
    assert [sum(row in rows for row in submitted) for rows in (BAD, GOOD, SAFE)] == [100, 700, 200]
    with pytest.raises(UserError, match=r"method\.safe_ratio=0\.95 and harmful_ratio=0\.1: together"):
        user_rows(ROWS, 1000, 0.1, "head", seed=1, safe_ratio=0.95)


def test_too_few_rows_are_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"data\.n=2000 .* needs 1800 task rows, and the source has 1000"):
        user_rows(ROWS, 2000, 0.1, "seeded", seed=1)
