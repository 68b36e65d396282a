"""Batched generation against the library's own, one prompt at a time."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_lightning.evaluation import generate as generate_module
from lisa_lightning.evaluation.decoding import GREEDY
from lisa_lightning.evaluation.evaluator import Evaluator, Question, read_answers
from lisa_lightning.evaluation.generate import Stop, batches, generate
from lisa_lightning.evaluation.generator import LocalGenerator
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.model.lora import load, load_tokenizer

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
    wanted = [a[len(p) :].tolist() for a, p in zip(alone, PROMPTS[name], strict=True)]
    ends = {w[3] for w in wanted if len(w) > 3}
    assert generate(model, PROMPTS[name], 12, lambda ids: ids[-1] == end) == wanted
    for other in ends:  # ends in the middle of some rows
        cut = [w[: w.index(other) + 1] if other in w else w for w in wanted]
        assert generate(model, PROMPTS[name], 12, lambda ids, other=other: ids[-1] in (end, other)) == cut


def test_stops_at_the_end_of_text_and_at_a_second_response_marker(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    stop = Stop(tokenizer)
    ids = tokenizer("Yes.\n### Response: more")["input_ids"]
    first = next(i for i in range(1, len(ids) + 1) if stop(ids[:i]))
    assert stop.text(ids[:first]) == "Yes.\n### Response:"
    end: Any = tokenizer.eos_token_id
    assert stop([*ids[:3], end])
    assert not stop(tokenizer("### Instruction: Response:")["input_ids"])


def test_batches_hold_every_prompt_once_sorted_by_length() -> None:
    prompts = [[1] * n for n in (5, 1, 4, 2, 3)]
    assert batches(prompts, 2) == [[1, 3], [4, 2], [0]]


class Ranks:
    """Stand-in for one process of a run, with the members that the evaluator uses."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.global_rank, self.world_size, self.is_global_zero = rank, world, rank == 0

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return ({}, None) if obj == (None, None) else obj  # to other ranks the first says that nothing is answered yet


ASKED = [Question("harmful", f"request {i % 3}") for i in range(5)] + [
    Question("task", "sign", f"sentence {i}", "positive") for i in range(4)
]
LIMITS = {"harmful": 6, "task": 3}


def test_a_killed_evaluation_goes_on_where_it_was(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(tiny, "float32").eval(), load_tokenizer(tiny)
    evaluator = Evaluator(Ranks(), tokenizer, Prompting("alpaca"), LIMITS, batch_size=2)
    whole = evaluator.answers(model, ASKED, "final", "x")
    assert [(a.prompt, a.context, a.index) for a in whole] == [(q.prompt, q.context, i) for i, q in enumerate(ASKED)]
    assert whole[0].response == whole[3].response  # the same prompt
    assert any(a.cut_off for a in whole)

    path, batches_done = tmp_path / "responses.jsonl", []
    original = generate_module.generate

    def counted(*arguments: Any) -> Any:
        if len(batches_done) == 2:
            raise KeyboardInterrupt
        batches_done.append(arguments[1])
        return original(*arguments)

    monkeypatch.setattr("lisa_lightning.evaluation.generator.generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluator.answers(model, ASKED, "final", "x", path)
    kept = path.read_text().splitlines()
    assert kept
    path.write_text(path.read_text() + kept[0][:20])  # a kill in the middle of a line
    batches_done.clear()
    monkeypatch.setattr(
        "lisa_lightning.evaluation.generator.generate", lambda *a: batches_done.append(a[1]) or original(*a)
    )
    assert evaluator.answers(model, ASKED, "final", "x", path) == whole
    assert len(batches_done) == 2  # of four
    assert sorted(read_answers(path), key=lambda a: a.index) == whole
    batches_done.clear()
    other = evaluator.answers(model, ASKED, "final", "another model", path)
    assert not {a.origin for a in other} & {a.origin for a in whole}
    assert len(batches_done) == 4


def test_ranks_share_the_questions_and_none_is_asked_by_two(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(tiny, "float32").eval(), load_tokenizer(tiny)
    monkeypatch.setattr("lisa_lightning.evaluation.generator._gather", lambda own, world: [own])
    alone = {
        a.index: a for a in Evaluator(Ranks(), tokenizer, Prompting("alpaca"), LIMITS, 2).answers(model, ASKED, "final")
    }
    shares = [
        Evaluator(Ranks(rank, 3), tokenizer, Prompting("alpaca"), LIMITS, 2)._generate_answers(
            LocalGenerator(model, tokenizer, GREEDY, Ranks(rank, 3)), ASKED, "final", "", None
        )
        for rank in range(3)
    ]
    assert all(shares)
    assert sum(map(len, shares)) == len(ASKED)
    assert {i: a for share in shares for i, a in share.items()} == alone
