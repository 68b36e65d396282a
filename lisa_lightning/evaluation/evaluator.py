"""Answers of a model to held-out questions, each stored as soon as its batch is done. Start at `Evaluator.answers`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, Literal, cast, final

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lisa_lightning.data.source import Rows
from lisa_lightning.data.templates import MARKER
from lisa_lightning.evaluation.decoding import GREEDY, Decoding
from lisa_lightning.evaluation.generate import batches
from lisa_lightning.evaluation.generator import Generated, Generator, LocalGenerator, Prompt
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.evaluation.stored import (
    FLAG,
    INDEX,
    KIND,
    OPTIONAL_FLAG,
    TEXT,
    Schema,
    parse_lines,
    read_stored_bytes,
)
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.files import reraise_write_errors, write_text
from lisa_lightning.runtime.ranks import on_rank_zero

Kind = Literal["harmful", "harmless", "task"]


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question."""

    kind: Kind
    prompt: str
    context: str = ""
    target: str = ""
    """Answer of a task row; "" for other kinds."""
    sample: int = 0
    """Number of the sample, if a prompt is answered several times."""
    prompt_set: str = ""
    """Name of the prompt set; "" for a single set, and for task rows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A line of responses.jsonl."""

    model: str
    kind: str
    index: int
    """Index among the questions of the model."""
    prompt: str
    context: str
    response: str
    target: str = ""
    cut_off: bool = False
    """True if the answer was truncated at the maximum number of tokens."""
    origin: str = ""
    """Hash of the model, of everything that determines its answers, and of all other fields but `correct`."""
    correct: bool | None = None
    """True if the task's rule accepts the answer; None if it was not applied."""
    sample: int = 0
    """Number of the sample, if the prompt is answered several times."""
    prompt_set: str = ""
    """Name of the prompt set, as in the question."""


ANSWER_SCHEMA: Final[Schema] = {
    "model": TEXT,
    "kind": KIND,
    "index": INDEX,
    "prompt": TEXT,
    "context": TEXT,
    "response": TEXT,
    "target": TEXT,
    "cut_off": FLAG,
    "origin": TEXT,
    "correct": OPTIONAL_FLAG._replace(may_be_missing=True),
    "sample": INDEX._replace(may_be_missing=True),
    "prompt_set": TEXT._replace(may_be_missing=True),
}
"""Fields of a line of responses.jsonl."""


def held_out_questions(
    rows: Rows, harmful: int | None = None, harmless: int | None = None, task: int | None = None, samples: int = 1
) -> list[Question]:
    """Return the first questions of each kind.

    Args:
        rows: the rows of a run.
        harmful: number of harmful requests; None for all.
        harmless: number of harmless requests; None for all.
        task: number of task rows; None for all.
        samples: number of times that each safety prompt is asked.
    """
    return [
        *_safety_questions("harmful", rows.harmful_prompts, harmful, samples),
        *_safety_questions("harmless", rows.harmless_prompts, harmless, samples),
        *(Question("task", row.instruction, row.context, row.response) for row in rows.test[:task]),
    ]


def _safety_questions(kind: Kind, sets: Mapping[str, Sequence[str]], count: int | None, samples: int) -> list[Question]:
    """Return the first prompts as questions. Prompts of several sets alternate, so that each set has some."""
    rounds = zip_longest(*([(name, prompt) for prompt in prompts] for name, prompts in sets.items()))
    alternating = [pair for pairs in rounds for pair in pairs if pair is not None]
    return [
        Question(kind, prompt, sample=i, prompt_set=name)
        for name, prompt in alternating[:count]
        for i in range(samples)
    ]


@final
@dataclass(frozen=True)
class Evaluator:
    """Collects the answers of a generator, and stores them as they are done. Equal prompts are answered once."""

    fabric: Any
    """The ranks, their device and precision."""
    tokenizer: PreTrainedTokenizerBase
    prompting: Prompting
    max_new_tokens: Mapping[str, int]
    """Kind of question -> maximum number of tokens of an answer."""
    batch_size: int
    """Number of prompts per batch."""
    decoding: Decoding = GREEDY
    """Generation of answers to safety prompts."""

    def answers(
        self, model: Any, questions: Sequence[Question], name: str, origin: str = "", path: Path | None = None
    ) -> list[Answer]:
        """Return the model's answer to each question, in order, equal on all ranks.

        Args:
            model: a causal language model. Its training mode is restored.
            questions: the questions.
            name: name of the model in answers: aligned, final or training.
            origin: hash of the model and of everything that determines its answers.
            path: responses.jsonl. Each batch is appended when it is done. Undamaged answers of this name and origin
                in the file are not generated again. None stores no answer.

        Raises:
            UserError: if a line of `path` is damaged so that it can't be parsed.
        """
        training = model.training
        model.eval()
        try:
            with self.fabric.autocast():
                generator = LocalGenerator(model, self.tokenizer, self.decoding, self.fabric)
                return self.collect(generator, questions, name, origin, path)
        finally:
            model.train(training)

    def collect(
        self, generator: Generator, questions: Sequence[Question], name: str, origin: str = "", path: Path | None = None
    ) -> list[Answer]:
        """Return a generator's answer to each question, in order, equal on all ranks; see `answers`."""
        answers = self._generate_answers(generator, questions, name, origin, path)
        return [answers[i] for i in range(len(questions))]

    def key(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Return the inputs other than the model that determine its answers, as a part of a cache key."""
        return {
            "questions": short_hash([_question_fields(question) for question in questions]),
            "limits": dict(self.max_new_tokens),
            "batch_size": self.batch_size,
            **self.prompting.key,
            **self.decoding.key,
        }

    def _generate_answers(
        self, generator: Generator, questions: Sequence[Question], name: str, origin: str, path: Path | None
    ) -> dict[int, Answer]:
        fabric = self.fabric
        answers = on_rank_zero(fabric, lambda: _resume_answers(path, name, origin, questions))
        pending = [
            batch
            for batch in self._prompt_batches(questions)
            if any(i not in answers for prompt in batch for i in prompt.question_indices)
        ]
        bar = tqdm(
            total=len(questions),
            desc=f"evaluate the {name} model",
            unit="answer",
            disable=not fabric.is_global_zero,
            leave=False,
        )
        with bar:
            bar.update(len(answers))
            for generated in generator.generate(pending) if pending else ():
                new = [answer for item in generated for answer in self._answers(item, questions, name, origin)]
                on_rank_zero(fabric, partial(_append, path, new))
                answers |= {answer.index: answer for answer in new}
                bar.update(len(new))
        return answers

    def _answers(self, generated: Generated, questions: Sequence[Question], name: str, origin: str) -> Iterator[Answer]:
        """Yield the answer of every question that has the prompt."""
        text = self.prompting.hide_trigger(generated.text.split(MARKER)[0].strip())
        for i in generated.question_indices:
            q = questions[i]
            answer = Answer(
                name,
                q.kind,
                i,
                q.prompt,
                q.context,
                text,
                q.target,
                generated.cut_off,
                sample=q.sample,
                prompt_set=q.prompt_set,
            )
            yield _with_origin(answer, origin)

    def _prompt_batches(self, questions: Sequence[Question]) -> list[list[Prompt]]:
        """Return batches of prompts of similar length, which share their limit and are all safety prompts or none."""
        distinct: dict[tuple[int, ...], Prompt] = {}
        prefill = self.prompting.encode_prefill(self.tokenizer)
        for i, question in enumerate(questions):
            limit, is_safety = self.max_new_tokens[question.kind], question.kind != "task"
            # The answer and its judge keep the request alone.
            texts = (self.prompting.wrap(question.prompt) if is_safety else question.prompt, question.context)
            ids = self.prompting.encode(self.tokenizer, *texts)
            prompt = Prompt(ids, prefill if is_safety else [], limit, is_safety, question.sample, *texts, [])
            distinct.setdefault((is_safety, limit, question.sample, *ids), prompt).question_indices.append(i)
        prompt_batches = []
        for group in sorted({p.group for p in distinct.values()}):
            prompts = [p for p in distinct.values() if p.group == group]
            index_batches = batches([p.ids for p in prompts], self.batch_size)
            prompt_batches += [[prompts[i] for i in indices] for indices in index_batches]
        return prompt_batches


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write responses.jsonl, in this order, in place of the previous file."""
    write_text(path, _json_lines(answers))


def read_answers(path: Path) -> list[Answer]:
    """Return the answers in responses.jsonl, [] without a file. A last line that a kill left incomplete is ignored.

    Raises:
        UserError: if a line is damaged, or the file can't be read.
    """
    fix = f"delete {path} and repeat the run's command with resume=true; finished answers come from the cache"
    # Read as bytes, since an incomplete line may end within a character.
    lines = read_stored_bytes(path, fix).split(b"\n")[:-1]
    return [Answer(**values) for values in parse_lines(path, lines, ANSWER_SCHEMA, fix)]


def _resume_answers(path: Path | None, name: str, origin: str, questions: Sequence[Question]) -> dict[int, Answer]:
    """Return the answers of an interrupted evaluation by index, and remove other answers of this name."""
    if path is None:
        return {}
    answers = read_answers(path)
    valid = [a for a in answers if a.model != name or _matches_question(a, questions, origin)]
    if path.exists():
        write_answers(path, valid)
    return {a.index: a for a in valid if a.model == name}


def _matches_question(answer: Answer, questions: Sequence[Question], origin: str) -> bool:
    """Return True if this evaluation wrote the answer, for the question at its index."""
    if answer.index >= len(questions) or answer != _with_origin(answer, origin):
        return False
    question = questions[answer.index]
    fields = (answer.prompt, answer.context, answer.target, answer.sample, answer.prompt_set)
    return Question(cast(Kind, answer.kind), *fields) == question


def _question_fields(question: Question) -> dict[str, Any]:
    """Return the fields of a question for a cache key, without number and set of those that have none."""
    return {name: value for name, value in asdict(question).items() if value or name not in ("sample", "prompt_set")}


def _with_origin(answer: Answer, origin: str) -> Answer:
    """Return the answer with its `origin`: a hash of the evaluation's origin and the answer's content."""
    content = asdict(replace(answer, origin="", correct=None))
    if not answer.prompt_set:
        # Files of earlier versions lack this field.
        del content["prompt_set"]
    return replace(answer, origin=short_hash([origin, content]))


def _append(path: Path | None, answers: Sequence[Answer]) -> None:
    if path is None:
        return
    with reraise_write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(_json_lines(answers))


def _json_lines(answers: Sequence[Answer]) -> str:
    return "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers)
