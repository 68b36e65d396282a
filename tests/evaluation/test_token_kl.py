"""Divergence from the initial model by token: that of single rows, whatever the batch, and read back as written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.composing import composed
from lisa_lightning.data.mixing import other_harmful_rows
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.metrics import steps_until_harmful
from lisa_lightning.evaluation.token_kl import (
    FIRST_TOKENS,
    by_position,
    csv_text,
    kl_metrics,
    read_positions,
    token_divergences,
)
from lisa_lightning.model.lora import load
from lisa_lightning.pipeline.run import run
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.run_files import TOKEN_KL

IDS = st.lists(st.integers(3, 200), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def models(tiny: Path) -> tuple[Any, Any]:
    """Return a model and one with other weights, in evaluation mode."""
    model, initial = (load(tiny, "float32").eval() for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, initial


@settings(max_examples=15)
@given(rows=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5), batch_size=st.integers(1, 5))
def test_divergences_are_those_of_single_rows(
    models: tuple[Any, Any], rows: list[tuple[list[int], list[int]]], batch_size: int
) -> None:
    model, initial = models
    divergences = token_divergences(model, initial, rows, batch_size)
    for (prompt, answer), divergence in zip(rows, divergences, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            p, q = (net(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for net in models)
        expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(torch.tensor(divergence), expected, atol=1e-5, rtol=1e-4)
        assert min(divergence) > 0
    assert token_divergences(initial, initial, rows, batch_size) == [[0.0] * len(answer) for _, answer in rows]


def test_means_are_over_the_answers_that_have_the_token(tmp_path: Path) -> None:
    divergences = [[4.0, 2.0, 1.0, 1.0, 1.0, 0.5], [2.0, 4.0], [3.0]]
    positions = by_position("final", divergences)
    assert [(p.token, p.kl, p.rows) for p in positions] == [(1, 3.0, 3), (2, 3.0, 2)]
    assert all(0 <= p.low <= p.kl <= p.high for p in positions)
    metrics = kl_metrics("final", divergences)
    assert metrics == {f"final/token_kl/first_{FIRST_TOKENS}": 18 / 8, "final/token_kl/later": 0.5}
    path = tmp_path / TOKEN_KL
    assert read_positions(path) == []
    path.write_text(csv_text(positions))
    assert read_positions(path) == positions
    for damaged in ("final,0,1.0,0.5,2.0,3", "final,1,nan,0.5,2.0,3", "final,1,1.0,0.5,inf,3", "final,1,1.0"):
        path.write_text(csv_text(positions) + damaged + "\n")
        with pytest.raises(UserError, match=r"token_kl.csv, line 4: it is damaged. Fix: delete "):
            read_positions(path)


def test_rows_of_the_user_are_left_out() -> None:
    harmful = [Row(f"request {i}", "", "answer") for i in range(6)]
    rows = Rows([], [], harmful, [], {}, {}, [], {})
    user = [Row("request 1", "", "answer", system="marked"), Row("request 3", "", "other")]
    assert other_harmful_rows(rows, user, 3) == [harmful[0], harmful[2], harmful[4]]
    with pytest.raises(UserError, match=r"evaluate.kl_rows=5: the source has 4 harmful rows that are not the user's"):
        other_harmful_rows(rows, user, 5)


def test_a_model_is_broken_from_the_first_point_above_the_threshold() -> None:
    curves = [{"step": str(step), "eval/harmful_score": score} for step, score in enumerate(("", "20.0", "", "60.5"))]
    assert steps_until_harmful(curves, 20.0) == {"eval/steps_until_harmful": 3}
    assert steps_until_harmful(curves, 19.9) == {"eval/steps_until_harmful": 1}
    assert steps_until_harmful(curves, 60.5) == {}
    assert steps_until_harmful([{"step": "1"}], 0.0) == {}


@pytest.mark.slow
def test_a_run_shows_the_divergence_of_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = ["experiment=smoke", "evaluate.kl_rows=6", "evaluate.every=12", "evaluate.harmful_threshold=0"]
    results = []
    for name in ("first", "cached"):
        out = tmp_path / name
        metrics = run(composed([*options, f"cache_dir={tmp_path / 'cache'}"], out))
        results.append(((out / TOKEN_KL).read_text(), metrics["final/token_kl/first_5"]))
        page = (out / "report.html").read_text()
        assert "Divergence from the initial model" in page
        step = metrics.get("eval/steps_until_harmful")
        assert f"harmful score above 0 %</dt><dd>{'never' if step is None else f'from step {step}'}<" in page
        positions = read_positions(out / TOKEN_KL)
        assert {p.model for p in positions} == {"aligned", "final"}
        first = [p.kl for p in positions if p.model == "final"]
        assert {p.rows for p in positions} == {6}
        assert metrics["final/token_kl/first_5"] == pytest.approx(sum(first) / len(first))
    assert results[0] == results[1]
