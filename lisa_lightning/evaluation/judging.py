"""Judging of stored answers by several judges. No judge gets the same answer twice. Start at `judge_answers`."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from tqdm.auto import tqdm

from lisa_lightning.data.files import read_records
from lisa_lightning.data.reading import Reading
from lisa_lightning.data.templates import join_context
from lisa_lightning.evaluation.coverage import kinds_scored
from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.evaluation.stored import (
    FLAG,
    FLAGS,
    INDEX,
    KIND,
    OPTIONAL_FLAG,
    SCORE,
    TEXT,
    DamagedLine,
    Schema,
    find_fault,
    one_of,
    parse_line,
    parse_lines,
    read_stored_bytes,
)
from lisa_lightning.judge.base import Judge, Pair, Verdict
from lisa_lightning.runtime.cache import path_lock, short_hash
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import reraise_write_errors, write_text

log = logging.getLogger(__name__)

MAX_NAME_CHARS: Final = 80
"""Maximum number of characters of the name of a model or prompt set in metrics.json."""
STORE_FIELDS: Final = [*(field.name for field in fields(Verdict)), "checksum"]
"""Fields of a stored verdict. Their hash is a part of the file name, so that stores of another format are not read."""
VERDICT_SCHEMA: Final[Schema] = {
    "flagged": FLAG,
    "score": SCORE,
    "refused": OPTIONAL_FLAG,
    "categories": FLAGS,
    "partly": OPTIONAL_FLAG,
}
JUDGED_SCHEMA: Final[Schema] = {
    **VERDICT_SCHEMA,
    **dict.fromkeys(("judge", "prompt", "response", "model", "version", "pair"), TEXT),
    "metric": one_of("harmful_score", "refusal_rate", "win_rate"),
    "kind": KIND,
    "index": INDEX,
    "graded": FLAG._replace(may_be_missing=True),
    "sample": INDEX._replace(may_be_missing=True),
    "prompt_set": TEXT._replace(may_be_missing=True),
}


@dataclass(frozen=True, slots=True)
class Judged:
    """A line of judged.jsonl."""

    judge: str
    flagged: bool
    score: float
    prompt: str
    response: str
    refused: bool | None
    categories: Mapping[str, bool]
    partly: bool | None
    metric: str
    model: str
    kind: str
    index: int
    version: str
    pair: str
    """Hash of the judge's input."""
    graded: bool = False
    """True if the judge's scores are grades; absent from files of earlier versions."""
    sample: int = 0
    """Number of the sample, as in the answer; absent from files of earlier versions."""
    prompt_set: str = ""
    """Name of the prompt set, as in the answer; absent from files of earlier versions."""


def judge_answers(judges: Mapping[str, Judge], answers: Sequence[Answer], out: Path, cache: Path) -> list[Judged]:
    """Return the verdicts of all judges on the answers, and write them to judged.jsonl.

    Judges score answers to harmful and harmless questions; a judge of the win rate scores task answers. Each verdict
    is stored at once, so that an interrupted judging can continue.

    Args:
        judges: judges by name.
        answers: answers of all models.
        out: folder of judged.jsonl. Its verdicts of other judges on these answers are kept.
        cache: cache folder, with the verdicts of each judge and version.

    Returns:
        The lines of judged.jsonl: verdicts of `judges` in order, then earlier ones of other judges.

    Raises:
        UserError: if a judge fails; its finished verdicts are kept.
    """
    path = out / "judged.jsonl"
    current_keys = {(a.model, a.kind, a.index, join_context(a.prompt, a.context), a.response) for a in answers}
    earlier = [j for j in read_judged(path) if (j.model, j.kind, j.index, j.prompt, j.response) in current_keys]
    current: list[Judged] = []
    lines = earlier
    for name, judge in judges.items():
        scored = [a for a in answers if a.kind in kinds_scored(judge)]
        pairs = [Pair(join_context(a.prompt, a.context), a.response, _reference(judge, a)) for a in scored]
        earlier_verdicts = {j.pair: _verdict(j) for j in earlier if (j.judge, j.version) == (name, judge.version)}
        verdicts = request_verdicts(name, judge, pairs, earlier_verdicts, cache)
        current += [
            Judged(
                name,
                **asdict(verdict),
                prompt=pair.prompt,
                response=pair.response,
                metric=judge.metric,
                model=answer.model,
                kind=answer.kind,
                index=answer.index,
                version=judge.version,
                pair=_key(pair),
                graded=getattr(judge, "graded", False),
                sample=answer.sample,
                prompt_set=answer.prompt_set,
            )
            for answer, pair, verdict in zip(scored, pairs, verdicts, strict=True)
        ]
        done = {j.judge for j in current}
        lines = current + [j for j in earlier if j.judge not in done]
        write_text(path, "".join(json.dumps(asdict(j), ensure_ascii=False) + "\n" for j in lines))
    return lines


def read_judged(path: Path) -> list[Judged]:
    """Return the lines of judged.jsonl, [] without a file.

    Raises:
        UserError: if a line is damaged, or the file can't be read.
    """
    fix = f"delete {path}; verdicts are made again (paid ones come from the cache)"
    *lines, end = read_stored_bytes(path, fix).split(b"\n")
    if end:
        # The file is written atomically, so that no kill leaves half a line.
        raise UserError(f"{path}, line {len(lines) + 1}: the end of the line is missing. Fix: {fix}")
    return [Judged(**values) for values in parse_lines(path, lines, JUDGED_SCHEMA, fix)]


def read_responses(path: str) -> list[Answer]:
    """Return the answers of a user's file.

    Each record needs `prompt` and `response`; `context`, `model`, `kind`, `target` and `prompt_set` are optional. An
    unknown `kind` counts as harmful, with a warning: it has another meaning in the file, or is mistyped.

    Args:
        path: a file that `read_records` can read.

    Raises:
        UserError: if the file can't be read, see `read_records`.
    """
    optional = ("context", "model", "kind", "target", "prompt_set")
    columns = {name: name for name in ("prompt", "response", *optional)}
    records = read_records(path, Reading(columns, frozenset(optional)), dict)
    if unknown := sorted({str(r["kind"]) for r in records} - {"", "harmful", "harmless", "task"}):
        shown = printable(", ".join(unknown))[:200]
        log.warning("%s: unknown kind %s counts as harmful. Fix: use harmful, harmless or task", path, shown)
    answers = []
    for index, r in enumerate(records):
        kind = r["kind"] if r["kind"] in ("harmless", "task") else "harmful"
        context = str(r["context"]) if kind == "task" else ""
        model = _metric_part(str(r["model"])) or "responses"
        prompt_set = _metric_part(str(r["prompt_set"])) if kind != "task" else ""
        texts = (str(r["prompt"]), context, str(r["response"]), str(r["target"]))
        answers.append(Answer(model, kind, index, *texts, prompt_set=prompt_set))
    return answers


def _metric_part(text: str) -> str:
    """Return the name of a model or prompt set as a part of a metric's name: one short line without a slash."""
    name = printable(text).replace("/", "_")
    return name if len(name) <= MAX_NAME_CHARS else f"{name[: MAX_NAME_CHARS - 9]}-{short_hash(text)[:8]}"


def refuse_no_reference(judges: Mapping[str, Judge], answers: Sequence[Answer], path: str) -> None:
    """Raise UserError if a judge needs a reference for an answer that has no `target`.

    Args:
        judges: judges by name.
        answers: the answers of a user's file.
        path: the file, for the message.

    Raises:
        UserError: if a judge of the win rate is selected and a task answer lacks its `target`.
    """
    missing = [answer.index + 1 for answer in answers if answer.kind == "task" and not answer.target]
    for name, judge in judges.items():
        if judge.metric == "win_rate" and missing:
            raise UserError(
                f"{path}: judge={name} compares answers of kind task with a reference, and answer {missing[0]} has "
                "none. Fix: add a `target` to each of them"
            )


def request_verdicts(
    name: str, judge: Judge, pairs: Sequence[Pair], earlier: Mapping[str, Verdict], cache: Path
) -> list[Verdict]:
    """Return the verdict on each pair: an earlier or stored one, or a new one, which is stored at once.

    Args:
        name: name of the judge.
        judge: the judge.
        pairs: requests with their answers.
        earlier: known verdicts by the hash of their pair.
        cache: cache folder, with the verdicts of each judge and version.

    Raises:
        UserError: if the judge fails; its finished verdicts are kept.
    """
    store = cache / "verdicts" / f"{name}-{short_hash([judge.version, STORE_FIELDS])}.jsonl"
    # Jobs of a sweep share answers, and each answer should be paid once.
    with path_lock(store):
        verdicts = {**earlier, **_read_store(store)}
        new = [p for key, p in {_key(p): p for p in pairs}.items() if key not in verdicts]
        if not new:
            return [verdicts[_key(p)] for p in pairs]
        with reraise_write_errors(store):
            file = store.open("a", encoding="utf-8")
        bar = tqdm(judge.verdicts(new), total=len(new), desc=f"judge by {name}", unit="answer", leave=False)
        with file, bar:
            for pair, verdict in zip(new, bar, strict=True):
                # The pair failed. Further verdicts follow, then the judge's error.
                if verdict is None:
                    continue
                _refuse_invalid(name, verdict)
                verdicts[_key(pair)] = verdict
                # Only write errors concern this file, not errors of the judge.
                with reraise_write_errors(store):
                    file.write(_verdict_line(pair, verdict))
                    file.flush()
    return [verdicts[_key(p)] for p in pairs]


def _refuse_invalid(name: str, verdict: Verdict) -> None:
    """Raise UserError for a verdict that could not be read back, such as one with the score NaN."""
    if (fault := find_fault(asdict(verdict), VERDICT_SCHEMA)) is not None:
        raise UserError(f"judge={name}: invalid verdict, {fault}. Fix: correct the judge's return value")


def _read_store(store: Path) -> dict[str, Verdict]:
    """Return the undamaged verdicts of a store by the hash of their pair, and remove damaged lines.

    Raises:
        UserError: if the store can't be read or written.
    """
    fix = f"delete {store}, or name another folder as cache_dir; its answers are judged again"
    *lines, end = read_stored_bytes(store, fix).split(b"\n")
    # A killed run may leave an incomplete last line.
    entries = [(line, _store_entry(line)) for line in (*lines, end) if line]
    valid = [(line, entry) for line, entry in entries if entry is not None]
    if end or len(valid) < len(entries):
        write_text(store, "".join(f"{line.decode()}\n" for line, _ in valid))
    if damaged := len(entries) - len(valid):
        log.warning("%d damaged line(s) in %s are judged again.", damaged, store)
    return dict(entry for _, entry in valid)


def _store_entry(line: bytes) -> tuple[str, Verdict] | None:
    """Return the hash of a pair and its verdict, None for a damaged line."""
    try:
        values = parse_line(line, {"pair": TEXT, **VERDICT_SCHEMA, "checksum": TEXT})
    except DamagedLine:
        return None
    checksum, pair = values.pop("checksum"), values["pair"]
    if checksum != short_hash(values):
        return None
    del values["pair"]
    return pair, Verdict(**values)


def _verdict_line(pair: Pair, verdict: Verdict) -> str:
    values = {"pair": _key(pair)} | asdict(verdict)
    return json.dumps(values | {"checksum": short_hash(values)}) + "\n"


def _reference(judge: Judge, answer: Answer) -> str:
    return answer.target if judge.metric == "win_rate" else ""


def _key(pair: Pair) -> str:
    return short_hash(asdict(pair))


def _verdict(line: Judged) -> Verdict:
    return Verdict(line.flagged, line.score, line.refused, line.categories, line.partly)
