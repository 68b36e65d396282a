"""Expressions of metrics: they agree with Python's arithmetic, and accept nothing beyond it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_lightning.config.expression import parse_expression
from lisa_lightning.config.settings import SweepSettings
from lisa_lightning.runtime.errors import UserError

METRICS = {"final/accuracy": 90.0, "final/harmful_score": 12.5, "final-prefill/harmful_score": 40, "seed": 3}
NUMBERS = st.integers(0, 99).map(str) | st.floats(0, 1e3, allow_subnormal=False).map(repr)
LEAVES = NUMBERS | st.sampled_from([name for name in METRICS if "-" not in name] + ["'final-prefill/harmful_score'"])
FORMULAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        | inner.map(lambda t: f"-{t}")
        | st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
    ),
    max_leaves=8,
)


@given(FORMULAS)
def test_an_expression_has_the_value_that_python_gives_it(formula: str) -> None:
    numbers = formula
    for name, value in METRICS.items():
        numbers = numbers.replace(f"'{name}'", repr(value)).replace(name, repr(value))
    try:
        expected = float(eval(numbers, {"__builtins__": {"min": min, "max": max}}))
    except ZeroDivisionError:
        expected = math.nan
    if math.isfinite(expected):
        assert parse_expression(formula).value(METRICS) == expected
    else:
        with pytest.raises(UserError, match=r"sweep\.value="):
            parse_expression(formula).value(METRICS)


def test_a_slash_within_words_belongs_to_a_name() -> None:
    assert parse_expression("final/accuracy/2").value(METRICS) == 45
    assert parse_expression("2/final/accuracy").value(METRICS) == 2 / 90
    assert parse_expression("final/accuracy / final/harmful_score").value(METRICS) == 7.2
    assert parse_expression("1e2 + final/accuracy").names == ["final/accuracy"]


REFUSED = [
    *("", "(", "final/", "final/accuracy -", "1 2", "\0", "a = 1", "f'{seed}'", "1j", "True", "None", "b'a'"),
    *(
        "seed.real",
        "seed[0]",
        "abs(seed)",
        "min(seed)",
        "max(1, 2, key=3)",
        "pow(2, 3)",
        "min(*seed)",
        "().__class__",
        "[1]",
    ),
    *("2**9", "7 // 2", "7 % 2", "seed < 3", "seed if seed else 1", "lambda: 1", "__import__('os')", "not seed"),
    *("(seed := 1)", "{1}", "seed and 1", "~3", "(min)(seed.a, 2)", "1+" * 600 + "1", "-" * 900 + "1 2"),
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_nothing_but_arithmetic_is_an_expression(text: str) -> None:
    with pytest.raises(ValueError, match=r"it may have|more than 1000|null bytes"):
        parse_expression(text)
    with pytest.raises(ValueError):  # noqa: PT011  # pydantic's error
        SweepSettings(value=text)


@given(st.text(max_size=30))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    try:
        names = parse_expression(text).names
    except ValueError:
        return
    assert all(isinstance(name, str) for name in names)


def test_what_has_no_value_is_refused() -> None:
    with pytest.raises(UserError, match="have no metric final/acuracy; did you mean final/accuracy"):
        parse_expression("final/acuracy - 1").value(METRICS)
    for text in ("1e400", "final/accuracy / 0", "1e308 * final/accuracy"):
        with pytest.raises(UserError, match="Fix: another expression"):
            parse_expression(text).value(METRICS)
    with pytest.raises(UserError, match="have no metric code"):
        parse_expression("code").value({**METRICS, "code": "abc"})
