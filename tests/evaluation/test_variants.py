"""Variants of the evaluation: each gives the answers of a run with its options, and changes no other."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from helpers.composing import composed
from lisa_lightning.config.validate import check
from lisa_lightning.evaluation.evaluator import Answer, read_answers
from lisa_lightning.pipeline.run import run
from lisa_lightning.runtime.errors import UserError

SETTINGS = [
    *("experiment=smoke", "stages=[align,evaluate,judge]", "align.optim.steps=2", "evaluate.max_new_tokens=4"),
    *("source.harmful_prompts.take=3", "source.harmless_prompts.take=2", "source.test.take=3", "task.max_new_tokens=2"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefill": {"prefill": "Sure, here is"},
    "asked": {"system": "Be safe.", "template": "alpaca_newline"},
    "sampled": {"samples": 2, "temperature": 1.5, "top_p": 0.9},
}


def variants(options: dict[str, Any]) -> str:
    """Return the override that sets variants. JSON is a part of Hydra's grammar but for quoted names."""
    names = ", ".join(f"{name}: {{{_pairs(changed)}}}" for name, changed in options.items())
    return f"evaluate.variants={{{names}}}"


def _pairs(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in options.items())


@pytest.mark.slow
def test_a_variant_has_the_answers_and_scores_of_a_run_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def results(name: str, *overrides: str) -> tuple[dict[str, Any], list[Answer]]:
        out = tmp_path / name
        metrics = run(composed([*SETTINGS, f"cache_dir={tmp_path / 'cache'}", *overrides], out))
        return metrics, [replace(a, origin="") for a in read_answers(out / "responses.jsonl")]

    metrics, answers = results("together", variants(OPTIONS))
    assert metrics["variants"] == ["prefill", "asked", "sampled"]
    for variant, options in OPTIONS.items():
        alone, expected = results(variant, *(f"evaluate.{key}={json.dumps(value)}" for key, value in options.items()))
        model = f"aligned-{variant}" if options else "aligned"
        measured = [replace(answer, model="aligned") for answer in answers if answer.model == model]
        assert {answer.kind for answer in measured} >= {"harmful", "harmless"}
        assert [a for a in expected if a.kind != "task"] == [a for a in measured if a.kind != "task"]
        # Neither prefill nor sampling applies to task rows, which then keep the answers of the run itself.
        has_task_rows = variant in ("plain", "asked")
        assert [a for a in measured if a.kind == "task"] == [a for a in expected if a.kind == "task" and has_task_rows]
        scores = {name: value for name, value in alone.items() if name.startswith("aligned/")}
        scores = {n: v for n, v in scores.items() if has_task_rows or ("accuracy" not in n and "cut_off" not in n)}
        assert scores
        assert (
            scores.items() <= {n.replace(f"{model}/", "aligned/"): v for n, v in metrics.items() if model in n}.items()
        )
    page = (tmp_path / "together" / "report.html").read_text()
    assert "<strong>sampled</strong>: samples 2, temperature 1.5, top_p 0.9." in page
    assert "<strong>prefill</strong>: prefill." in page
    assert ">plain<" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": {"samples": 4}}, "evaluate.variants.a.samples=4: at evaluate.variants.a.temperature=0 all answers"),
        ({"a": {"samples": 0, "temperature": 1}}, "evaluate.variants.a.samples=0 is not allowed; it must be a whole"),
        ({"a": {"prefil": "Sure"}}, "evaluate.variants.a.prefil is no option of a variant; did you mean prefill"),
        ({"a": {}, "b": {}}, "evaluate.variants: a and b have no options, so that they are the same. Fix: "),
        ({"a/b": {"prefill": "Sure"}}, "evaluate.variants.a/b: it is no name. Fix: "),
        ({"a": "Sure"}, "evaluate.variants.a=Sure is not allowed; it must be a mapping with template, "),
    ],
)
def test_a_wrong_variant_is_refused(config: Callable[..., DictConfig], options: dict[str, Any], message: str) -> None:
    cfg = config("experiment=smoke")
    cfg.evaluate.variants = options
    with pytest.raises(UserError) as refusal:
        check(cfg)
    assert str(refusal.value).startswith(message)


def test_a_variant_inherits_the_temperature_of_the_run(config: Callable[..., DictConfig]) -> None:
    check(config("experiment=smoke", "evaluate.temperature=1", variants({"many": {"samples": 4}})))
