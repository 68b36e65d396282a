"""The schedule against the official state machine, and its integer arithmetic against counting."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lisa_lightning.data.schedule import Schedule


def official_states(k1: int, k2: int, steps: int) -> list[str]:
    """Return the states of the official trainer's mutable machine, which has a status and a clock."""
    status, clock, seen = "alignment", 0, []
    for step in range(steps):
        if status == "alignment" and clock % k1 == 0 and step != 0:
            status, clock = "user", 0
        elif status == "user" and clock % k2 == 0 and step != 0:
            status, clock = "alignment", 0
        seen.append(status)
        clock += 1
    return seen


def test_equals_the_official_state_machine() -> None:
    for k1 in range(1, 12):
        for k2 in range(1, 12):
            schedule = Schedule(k1, k2)
            assert [schedule.state(t) for t in range(200)] == official_states(k1, k2, 200)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 120), st.booleans())
@example(3, 4, 0, False)  # the first step follows none
def test_counts_and_switches_agree_with_the_states(k1: int, k2: int, before: int, user_first: bool) -> None:
    if k1 + k2 == 0:
        return
    schedule = Schedule(k1, k2, user_first)
    states = [schedule.state(t) for t in range(before + 1)]
    for state in ("alignment", "user"):
        assert schedule.steps_in(state, before) == states[:before].count(state)
    assert schedule.switches_at(before) == (before > 0 and states[before] != states[before - 1])


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_cycle_with_the_user_first_has_the_same_steps_in_the_other_order(k1: int, k2: int) -> None:
    schedule, other = Schedule(k1, k2, user_first=True), Schedule(k1, k2)
    cycle = [schedule.state(t) for t in range(k1 + k2)]
    assert cycle == ["user"] * k2 + ["alignment"] * k1
    assert [schedule.state(t) for t in range(k1 + k2, 60)] == [other.state(t) for t in range(k1, 60 - k2)]


@pytest.mark.parametrize("user_first", [False, True])
@pytest.mark.parametrize(("k1", "k2", "only"), [(0, 5, "user"), (5, 0, "alignment")])
def test_a_state_of_length_zero_is_never_entered(k1: int, k2: int, only: str, user_first: bool) -> None:
    schedule = Schedule(k1, k2, user_first)
    assert {schedule.state(t) for t in range(50)} == {only}
    assert not any(schedule.switches_at(t) for t in range(50))


@pytest.mark.parametrize(("k1", "k2"), [(0, 0), (-1, 5), (5, -1)])
def test_refuses_impossible_lengths(k1: int, k2: int) -> None:
    with pytest.raises(ValueError, match=f"alignment_steps={k1} and user_steps={k2}"):
        Schedule(k1, k2)
