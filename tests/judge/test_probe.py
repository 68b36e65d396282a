"""The probe judge: verdicts that depend on nothing but the answer, its agreement with labels, and its fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from benchmarks.fit_probe import TrainingRows, calibrated_probe, do_not_answer, first_words, held_out_scores
from helpers.public_rows import public
from lisa_lightning.data.files import EMBEDDED
from lisa_lightning.judge import probe
from lisa_lightning.judge.base import Pair
from lisa_lightning.judge.probe import ANSWER_TOKENS, ProbeJudge


@pytest.fixture(scope="module")
def judge() -> ProbeJudge:
    return ProbeJudge()


def rows(name: str, **fields: str) -> list[Pair]:
    lines = (EMBEDDED / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    records: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
    return [Pair(r["prompt"], r["response"]) for r in records if all(r[k] == v for k, v in fields.items())]


def test_a_fit_finds_the_direction_and_its_probabilities_are_shares() -> None:
    """Without a signal of prompts: their labels are drawn with a slope of 1.5 along the first feature."""
    rng = np.random.default_rng(0)
    prompts, features = [f"prompt {i // 2}" for i in range(3000)], rng.normal(size=(2, 3000, 5))
    features[1] = features[0] + 0.1 * rng.normal(size=(3000, 5))
    harmful = rng.random(3000) < 1 / (1 + np.exp(-1.5 * features[0, :, 0] - 1))
    training = TrainingRows(prompts, features, harmful, np.ones(3000))
    fitted = calibrated_probe(training)
    assert np.abs(fitted.weight[1:]).max() < 0.2 < 1.2 < fitted.weight[0] < 1.8
    probabilities = 1 / (1 + np.exp(-held_out_scores(training, calibrated_probe)[0]))
    for low in (0.2, 0.4, 0.6, 0.8):
        within = (low <= probabilities) & (probabilities < low + 0.2)
        assert harmful[within].mean() == pytest.approx(probabilities[within].mean(), abs=0.08)


@pytest.mark.slow
def test_verdicts_depend_on_neither_order_nor_company(judge: ProbeJudge) -> None:
    pairs = [*rows("judge")[:6], Pair("", ""), Pair("How?", "word " * 400), Pair("Say it.", "<|im_end|>")]
    verdicts = list(judge.verdicts(pairs))
    assert list(judge.verdicts(pairs[::-1])) == verdicts[::-1]
    assert [v for pair in pairs for v in judge.verdicts([pair])] == verdicts
    assert list(judge.verdicts([])) == []
    assert [v.partly for v in verdicts] == [False] * 7 + [True, False]
    assert all(v.flagged == (v.score > 0.5) for v in verdicts)


@pytest.mark.slow
def test_neither_text_after_the_limit_nor_marks_of_turns_count(judge: ProbeJudge) -> None:
    long = Pair("Tell me a story.", "Once upon a time there was a fox. " * 40)
    others = (Pair(long.prompt, long.response * 10_000), Pair(long.prompt, f"\n {long.response}"))
    assert len({v.score for v in judge.verdicts([long, *others])}) == 1
    turn = "<|im_end|>\n<|im_start|>assistant\n"
    states, partly = judge.reader.states(Pair("Say it.", turn))
    assert len(judge.reader.tokenizer(turn, add_special_tokens=False)["input_ids"]) < len(states) < ANSWER_TOKENS
    assert not partly


@pytest.mark.slow
@pytest.mark.parametrize("words", [1000, 18])
def test_embedded_rows(judge: ProbeJudge, words: int) -> None:
    def flagged(pairs: list[Pair]) -> float:
        cut = [Pair(p.prompt, first_words(p.response, words)) for p in pairs[::16]]
        return sum(v.flagged for v in judge.verdicts(cut)) / len(cut)

    assert flagged(rows("harmful")) > 0.85
    assert flagged(rows("alignment", kind="helpful")) < 0.15
    assert flagged(rows("alignment", kind="refusal")) < 0.1


@pytest.mark.slow
def test_labels_of_a_set_it_was_not_fitted_on(judge: ProbeJudge) -> None:
    public("do_not_answer")
    labelled = do_not_answer()
    sample = [*np.flatnonzero(labelled.harmful)[::4], *np.flatnonzero(~labelled.harmful)[::90]]
    verdicts = list(judge.verdicts([labelled.pairs[i] for i in sample]))
    assert roc_auc_score(labelled.harmful[sample], [v.score for v in verdicts]) > 0.8
    assert np.mean([v.flagged for v, i in zip(verdicts, sample, strict=True) if not labelled.harmful[i]]) < 0.1


@pytest.mark.slow
def test_other_coefficients_make_another_version(
    judge: ProbeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ProbeJudge().version == judge.version
    file = tmp_path / "probe.safetensors"
    save_file({name: -value for name, value in load_file(probe.COEFFICIENTS).items()}, file)
    monkeypatch.setattr(probe, "COEFFICIENTS", file)
    pairs, opposite = rows("judge")[:2], ProbeJudge()
    assert opposite.version != judge.version
    for before, after in zip(judge.verdicts(pairs), opposite.verdicts(pairs), strict=True):
        assert after.score == pytest.approx(1 - before.score)
