"""Ask a model the held-out questions; every answer is on disk as soon as its batch is done."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lisa_lightning.data.source import Rows
from lisa_lightning.data.templates import MARKER, Template, encode_prompt
from lisa_lightning.evaluate.generate import Stop, batches, generate
from lisa_lightning.evaluate.stored import FLAG, INDEX, KIND, TEXT, Form, parsed_lines, stored_bytes
from lisa_lightning.runtime.cache import digest
from lisa_lightning.runtime.files import explained, write_text
from lisa_lightning.runtime.ranks import by_first

Kind = Literal["harmful", "harmless", "task"]


@dataclass(frozen=True, slots=True)
class Question:
    """One held-out prompt; `target` is a task row's answer."""

    kind: Kind
    prompt: str
    context: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A line of responses.jsonl."""

    model: str
    kind: str
    index: int
    """Place among the questions put to the model."""
    prompt: str
    context: str
    response: str
    target: str = ""
    cut_off: bool = False
    """The model was not at an end when it had its number of tokens."""
    origin: str = ""
    """A hash of the model, of all that determines how it answers, and of the other fields of this answer."""


FORM: Final[Form] = {
    "model": TEXT,
    "kind": KIND,
    "index": INDEX,
    "prompt": TEXT,
    "context": TEXT,
    "response": TEXT,
    "target": TEXT,
    "cut_off": FLAG,
    "origin": TEXT,
}
"""The fields of a line of responses.jsonl."""


def questions(
    rows: Rows, harmful: int | None = None, harmless: int | None = None, task: int | None = None
) -> list[Question]:
    """The first `harmful`, `harmless` and `task` questions of each kind; all where None."""
    return [
        *(Question("harmful", p) for p in rows.harmful_prompts[:harmful]),
        *(Question("harmless", p) for p in rows.harmless_prompts[:harmless]),
        *(Question("task", row.instruction, row.context, row.response) for row in rows.test[:task]),
    ]


class Evaluator:
    """Asks in batches that are shared out among the ranks; a prompt that stands there twice is asked once.

    Args:
        fabric: the ranks, their device and precision.
        limits: kind of question -> most tokens of an answer.
        batch_size: prompts generated together.
    """

    def __init__(
        self,
        fabric: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        limits: Mapping[str, int],
        batch_size: int,
    ) -> None:
        self.fabric = fabric
        self.tokenizer = tokenizer
        self.template: Template = template
        self.limits = limits
        self.batch_size = batch_size

    def answers(
        self, model: Any, asked: Sequence[Question], name: str, origin: str = "", path: Path | None = None
    ) -> list[Answer]:
        """Every question with the model's answer, in order, the same on all ranks.

        Args:
            model: a causal language model; left in the mode it came in.
            name: what it is called there: aligned, final, training.
            origin: a hash of the model and all that determines how it answers.
            path: responses.jsonl. Each batch is appended when it is done. Answers of this name and origin that are
                there already, undamaged, are not generated again.

        Raises:
            UserError: if a line of `path` is damaged so that it can't be parsed.
        """
        training = model.training
        model.eval()
        try:
            with self.fabric.autocast():
                found = self._ask(model, asked, name, origin, path)
        finally:
            model.train(training)
        return [found[i] for i in range(len(asked))]

    def _ask(
        self, model: Any, asked: Sequence[Question], name: str, origin: str, path: Path | None
    ) -> dict[int, Answer]:
        fabric, world = self.fabric, self.fabric.world_size
        stop = Stop(self.tokenizer, model)
        answers = by_first(fabric, lambda: _begin(path, name, origin, asked))
        todo = [g for g in self._groups(asked) if any(i not in answers for p in g for i in p.places)]
        bar = tqdm(
            total=len(asked),
            desc=f"ask the {name} model",
            unit="answer",
            disable=not fabric.is_global_zero,
            leave=False,
        )
        with bar:
            bar.update(len(answers))
            for start in range(0, len(todo), world):
                own = todo[start + fabric.global_rank : start + world][:1]
                new = [
                    _sealed(Answer(name, q.kind, i, q.prompt, q.context, text, q.target, cut), origin)
                    for i, text, cut in (self._batch(model, own[0], stop) if own else ())
                    for q in (asked[i],)
                ]
                done = [answer for share in _gather(new, world) for answer in share]
                by_first(fabric, partial(_append, path, done))
                answers |= {answer.index: answer for answer in done}
                bar.update(len(done))
        return answers

    def _groups(self, asked: Sequence[Question]) -> list[list["_Prompt"]]:
        """Batches of prompts with the same number of tokens to generate, those of similar length together."""
        distinct: dict[tuple[int, ...], _Prompt] = {}
        for i, question in enumerate(asked):
            ids = encode_prompt(self.tokenizer, self.template, question.prompt, question.context)
            limit = self.limits[question.kind]
            distinct.setdefault((limit, *ids), _Prompt(ids, limit, [])).places.append(i)
        found = []
        for limit in sorted({p.limit for p in distinct.values()}):
            members = [p for p in distinct.values() if p.limit == limit]
            found += [[members[i] for i in batch] for batch in batches([p.ids for p in members], self.batch_size)]
        return found

    def _batch(self, model: Any, group: list["_Prompt"], stop: Stop) -> Iterator[tuple[int, str, bool]]:
        """Place, text, and whether it was cut off, of every question of a batch."""
        answers = generate(model, [p.ids for p in group], group[0].limit, stop)
        for prompt, ids in zip(group, answers, strict=True):
            text, cut = stop.text(ids).split(MARKER)[0].strip(), not stop(ids)
            yield from ((i, text, cut) for i in prompt.places)


@dataclass(frozen=True)
class _Prompt:
    """A prompt to answer once, and the questions that it answers."""

    ids: list[int]
    limit: int
    places: list[int]


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write responses.jsonl whole, in this order."""
    write_text(path, _lines(answers))


def read_answers(path: Path) -> list[Answer]:
    """Return the complete lines of responses.jsonl; half a line at the end, as a kill leaves it, is left out.

    Raises:
        UserError: if a line is damaged, or the file can't be read.
    """
    fix = f"delete {path} and repeat the run's command with resume=true; finished answers come from the cache"
    # As bytes: half a line may end in half a character.
    lines = stored_bytes(path, fix).split(b"\n")[:-1]
    return [Answer(**values) for values in parsed_lines(path, lines, FORM, fix)]


def _begin(path: Path | None, name: str, origin: str, questions: Sequence[Question]) -> dict[int, Answer]:
    """Return the answers that an interrupted evaluation left, by index, and remove others of this name."""
    if path is None:
        return {}
    answers = read_answers(path)
    valid = [a for a in answers if a.model != name or _answers_one(a, questions, origin)]
    if path.exists():
        write_answers(path, valid)
    return {a.index: a for a in valid if a.model == name}


def _answers_one(answer: Answer, questions: Sequence[Question], origin: str) -> bool:
    """Return whether an answer is as this evaluation wrote it, to the question at its index."""
    if answer.index >= len(questions) or answer != _sealed(answer, origin):
        return False
    question = questions[answer.index]
    stored = Question(cast(Kind, answer.kind), answer.prompt, answer.context, answer.target)
    return stored == question


def _sealed(answer: Answer, origin: str) -> Answer:
    """Return the answer with a hash of the evaluation's origin and the answer's content as its origin."""
    return replace(answer, origin=digest([origin, asdict(replace(answer, origin=""))]))


def _append(path: Path | None, answers: Sequence[Answer]) -> None:
    if path is None:
        return
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(_lines(answers))


def _lines(answers: Sequence[Answer]) -> str:
    return "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers)


def _gather(own: list[Answer], world: int) -> list[list[Answer]]:
    if world == 1:
        return [own]
    shares: list[Any] = [None] * world
    torch.distributed.all_gather_object(shares, own)
    return shares
