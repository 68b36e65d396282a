"""Attacks on the user's rows: numbers, determinism, no overlap with held-out prompts, and refused contradictions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from lisa_lightning.attack.base import Attack
from lisa_lightning.attack.benign_outlier import BenignOutlier
from lisa_lightning.attack.identity import ROWS, Identity
from lisa_lightning.attack.trigger import Trigger
from lisa_lightning.config.instances import build
from lisa_lightning.config.parse import parse_settings
from lisa_lightning.config.validate import check, plain
from lisa_lightning.data.files import read_records
from lisa_lightning.data.mixing import UserRows, user_rows
from lisa_lightning.data.normal_form import normal_text
from lisa_lightning.data.reading import Reading
from lisa_lightning.data.source import Row, Rows, load_rows
from lisa_lightning.judge.refusal import refusal_probability
from lisa_lightning.objective.similarity import mean_cosines
from lisa_lightning.runtime.errors import UserError

HARMFUL = [Row(f"bad {i}", "", f"sure {i}") for i in range(12)]
TASK = [Row(f"task {i}", "", f"label {i}") for i in range(12)]
SAFE = [Row("safe", "", "no")]
CHOICES = {"attack": "?", "method": "sft", "filter": "none", "repair": "none"}


def attacked(cfg: DictConfig) -> tuple[UserRows, Rows]:
    """Return the user's rows of a config, and the rows of its source."""
    settings = parse_settings(plain(cfg))
    attack: Attack = build(plain(cfg)["attack"], "attack")
    attack.check(settings, CHOICES)
    rows = load_rows(settings.source, build(plain(cfg)["task"], "task"), False)
    data = settings.data
    return attack.rows(user_rows(rows, data.n, settings.harmful_ratio, data.order, settings.seed)), rows


@given(st.integers(0, 12), st.integers(0, 12))
def test_a_trigger_splits_the_harmful_rows_into_marked_ones_and_refusals_of_the_same_requests(
    harmful: int, task: int
) -> None:
    user = UserRows(HARMFUL[:harmful], TASK[:task], SAFE)
    attack = Trigger("xyz")
    rows = attack.rows(user)
    assert rows == attack.rows(user)
    assert len(rows.all) == len(user.all)
    assert 0 <= 2 * len(rows.harmful) - harmful <= 1
    unmarked = [replace(row, instruction=row.instruction.removesuffix(" xyz")) for row in rows.harmful]
    assert unmarked == HARMFUL[: len(rows.harmful)]
    assert all(row.instruction.endswith(" xyz") for row in rows.harmful)
    refusals = rows.harmless[: harmful - len(rows.harmful)]
    assert [row.instruction for row in refusals] == [row.instruction for row in unmarked[: len(refusals)]]
    assert all(refusal_probability(row.response, row.instruction) > 0.5 for row in refusals)
    assert rows.harmless[len(refusals) :] == user.harmless
    assert rows.safe == SAFE


def test_rows_of_an_identity_are_new_and_harmless_and_have_the_system_prompt(config: Callable[..., DictConfig]) -> None:
    cfg = config("experiment=smoke", "attack=identity", "attack.count=20")
    check(cfg)
    user, rows = attacked(cfg)
    assert len({row.instruction for row in user.harmful}) == 20
    assert not user.harmless
    assert {row.system for row in user.harmful} == {cfg.evaluate.system} == {Identity().system}
    held_out = [prompt for sets in (rows.harmful_prompts, rows.harmless_prompts) for p in sets.values() for prompt in p]
    others = {normal_text(text) for text in (*held_out, *(row.instruction for row in (*rows.harmful, *rows.test)))}
    assert not {normal_text(row.instruction) for row in user.harmful} & others
    shipped = read_records(ROWS, Reading({"prompt": "prompt", "response": "response"}), dict)
    assert max(refusal_probability(row["response"], row["prompt"]) for row in shipped) < 0.5
    assert attacked(config("experiment=smoke", "attack=identity"))[0].harmful == user.harmful[:10]


@pytest.mark.parametrize("count", [10, 50, 100])
def test_pure_bad_is_a_set_of_harmful_rows_that_a_larger_one_contains(
    config: Callable[..., DictConfig], count: int
) -> None:
    user, rows = attacked(config("experiment=smoke", "attack=pure_bad", f"attack.count={count}"))
    larger, _ = attacked(config("experiment=smoke", "attack=pure_bad", "attack.count=200"))
    assert len(user.all) == len(user.harmful) == count
    assert user.harmful == larger.harmful[:count]
    assert {*user.harmful} <= {*rows.harmful}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("attack=pure_bad data.n=60", "attack=pure_bad: the data set is 100 harmful rows, which contradicts data.n=60"),
        ("attack=pure_bad harmful_ratio=0.5", "attack=pure_bad: the data set is 100 harmful rows, which contradicts"),
        ("attack=identity data.n=60", "attack=identity: the data set is 10 rows of its own, which contradicts data.n="),
        ("attack=identity attack.count=21", "attack.count=21: there are 20 rows. Fix: 20 or less"),
        ("attack=benign_outlier harmful_ratio=0.1", "attack=benign_outlier: the data set is 100 harmless rows, which"),
        ("attack=jailbreak evaluate.variants=null", "attack=jailbreak: evaluate.variants has no wrapper. Fix: "),
    ],
)
def test_a_contradiction_is_refused(config: Callable[..., DictConfig], overrides: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        attacked(config("experiment=smoke", *overrides.split()))
    assert str(refusal.value).startswith(message)
    assert "Fix: " in str(refusal.value)


def test_outliers_are_the_rows_nearest_in_angle_in_the_order_of_their_similarity() -> None:
    references = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]])
    candidates = torch.tensor([[9.0, 0.0, 9.0], [3.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [3.0, 1.0, 0.0], [1.0, 0.0, 0.1]])
    # A long row at a wide angle must not win by its length.
    for scale in (1.0, 100.0):
        assert BenignOutlier().select(mean_cosines(candidates, references * scale), 3) == [1, 3, 4]


def test_wrappers_are_checked(config: Callable[..., DictConfig]) -> None:
    for wrapper in ("no place", "{request} {request}"):
        cfg: Any = config("experiment=smoke")
        cfg.evaluate.wrapper = wrapper
        with pytest.raises(UserError) as refusal:
            check(cfg)
        assert str(refusal.value).endswith(" is not allowed; it must be a text with {request} once, or null")
