"""HarmBench's classifier: a tiny random Llama, with the published prompt and verdicts checked against its logits."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from helpers.judge_models import PAIRS, next_logits, shipped
from lisa_lightning.judge.base import Pair, Verdict
from lisa_lightning.judge.harmbench import HarmBenchJudge
from lisa_lightning.runtime.errors import UserError

PUBLISHED = "5247bb01ce7faa6db6d166e9ec61c8beb9d50f2241f79aa49594c66fc3351b0e"
"""SHA-256 of LLAMA2_CLS_PROMPT in HarmBench's eval_utils.py, with {prompt} for {behavior} and {response} for
{generation}."""


def judged(folder: Path, pairs: list[Pair] = PAIRS, **more: Any) -> list[Verdict]:
    return list(HarmBenchJudge(**shipped("harmbench", folder, **more)).verdicts(pairs))


def test_the_prompt_is_the_published_one(yes_or_no: Path) -> None:
    judge = HarmBenchJudge(**shipped("harmbench", yes_or_no))
    assert sha256(judge.template.encode()).hexdigest() == PUBLISHED
    start, _, end = judge.template.partition("{prompt}\n\n[GENERATION]:\n{response}")
    pair = PAIRS[1]
    assert judge._text(pair.prompt, pair.response) == f"{start}{pair.prompt}\n\n[GENERATION]:\n{pair.response}{end}"


def test_the_score_is_the_softmax_of_all_spellings_of_yes_and_no(yes_or_no: Path) -> None:
    judge = HarmBenchJudge(**shipped("harmbench", yes_or_no))
    for pair, verdict in zip(PAIRS, judged(yes_or_no), strict=True):
        tokenizer, logits = next_logits(yes_or_no, LlamaForCausalLM, judge._text(pair.prompt, pair.response))
        chances = logits.softmax(-1)
        vocabulary = tokenizer.get_vocab()
        yes, no = (float(sum(chances[vocabulary[w]] for w in words)) for words in (("yes", "Yes"), (" no",)))
        assert verdict.score == pytest.approx(yes / (yes + no), abs=1e-5)
        assert (verdict.flagged, verdict.partly, verdict.refused) == (yes > no, False, None)


def test_an_answer_is_cut_after_its_own_limit_and_marked(yes_or_no: Path) -> None:
    pair = PAIRS[3]
    (whole,), (cut,) = (
        judged(yes_or_no, [Pair(pair.prompt, pair.response[:30])]),
        judged(yes_or_no, [pair], max_response_length=30),
    )
    assert (whole.partly, cut.partly) == (False, True)
    assert cut.score == pytest.approx(whole.score, abs=1e-6)
    template = len(HarmBenchJudge(**shipped("harmbench", yes_or_no))._prompt(pair.prompt, ""))
    (fitted,) = judged(yes_or_no, [pair], max_length=template + 30)
    assert fitted.partly
    assert fitted.score == pytest.approx(whole.score, abs=1e-6)


def test_invalid_input_is_refused_before_a_verdict(yes_or_no: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.harmbench\.template: a placeholder is missing\. Fix: "):
        judged(yes_or_no, template="{prompt}")
    with pytest.raises(UserError, match=r"judge\.harmbench\.max_length=50 is too small: the template takes \d+ tokens"):
        judged(yes_or_no, max_length=50)
    with pytest.raises(UserError, match=r"judge\.harmbench\.id=.*has no token for 'yes', so it is no classifier"):
        judged(tiny)


def test_every_setting_makes_another_version(yes_or_no: Path) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"template": "{prompt} {response}"}, {"max_response_length": 5}, {"max_length": 4000}, {"dtype": "bfloat16"}
    ]  # fmt: skip
    assert len({HarmBenchJudge(**shipped("harmbench", yes_or_no, **more)).version for more in changes}) == 5
