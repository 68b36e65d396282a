"""Judge stored answers: several judges side by side, none asked twice about one answer."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from tqdm.auto import tqdm

from lisa_lightning.data.files import read_records
from lisa_lightning.data.reading import Reading
from lisa_lightning.data.templates import joined
from lisa_lightning.evaluate.coverage import kinds_scored
from lisa_lightning.evaluate.evaluator import Answer
from lisa_lightning.evaluate.stored import (
    FLAG,
    FLAGS,
    INDEX,
    KIND,
    OPTIONAL_FLAG,
    SCORE,
    TEXT,
    DamagedLine,
    Form,
    fault_in,
    one_of,
    parsed,
    parsed_lines,
    stored_bytes,
)
from lisa_lightning.judge.base import Judge, Pair, Verdict
from lisa_lightning.runtime.cache import digest, locked
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import explained, write_text

log = logging.getLogger(__name__)

MAX_NAME_CHARS: Final = 80
"""Characters of a model's name in metrics.json."""
FORMAT: Final = [*(field.name for field in fields(Verdict)), "checksum"]
"""The fields of a stored verdict. A hash of them names the file, so that stores of another format are not read."""
VERDICT: Final[Form] = {
    "flagged": FLAG,
    "score": SCORE,
    "refused": OPTIONAL_FLAG,
    "categories": FLAGS,
    "partly": OPTIONAL_FLAG,
}
JUDGED: Final[Form] = {
    **VERDICT,
    **dict.fromkeys(("judge", "prompt", "response", "model", "version", "pair"), TEXT),
    "metric": one_of("harmful_score", "refusal_rate", "win_rate"),
    "kind": KIND,
    "index": INDEX,
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
    """A hash of all that the judge saw."""


def judge_answers(judges: Mapping[str, Judge], answers: Sequence[Answer], out: Path, cache: Path) -> list[Judged]:
    """The verdicts of all judges on the answers, in judged.jsonl too; what other judges said there before is kept.

    Harmful and harmless questions are judged, or task answers by a judge of the win rate. Verdicts are kept in `cache`
    as they come, so that a broken judging goes on.

    Raises:
        UserError: a judge can't go on; its earlier verdicts are kept.
    """
    path = out / "judged.jsonl"
    current_keys = {(a.model, a.kind, a.index, joined(a.prompt, a.context), a.response) for a in answers}
    earlier = [j for j in read_judged(path) if (j.model, j.kind, j.index, j.prompt, j.response) in current_keys]
    found: list[Judged] = []
    lines = earlier
    for name, judge in judges.items():
        chosen = [a for a in answers if a.kind in kinds_scored(judge)]
        pairs = [Pair(joined(a.prompt, a.context), a.response, _reference(judge, a)) for a in chosen]
        known = {j.pair: _verdict(j) for j in earlier if (j.judge, j.version) == (name, judge.version)}
        store = cache / "verdicts" / f"{name}-{digest([judge.version, FORMAT])}.jsonl"
        verdicts = _ask(name, judge, pairs, known, store)
        found += [
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
            )
            for answer, pair, verdict in zip(chosen, pairs, verdicts, strict=True)
        ]
        done = {j.judge for j in found}
        lines = found + [j for j in earlier if j.judge not in done]
        write_text(path, "".join(json.dumps(asdict(j), ensure_ascii=False) + "\n" for j in lines))
    return lines


def read_judged(path: Path) -> list[Judged]:
    """Return the lines of judged.jsonl, none where there is no such file.

    Raises:
        UserError: if a line is damaged, or the file can't be read.
    """
    fix = f"delete {path}; verdicts are made again (paid ones come from the cache)"
    *lines, end = stored_bytes(path, fix).split(b"\n")
    if end:
        # The file is written whole, so that no kill leaves half a line.
        raise UserError(f"{path}, line {len(lines) + 1}: the end of the line is missing. Fix: {fix}")
    return [Judged(**values) for values in parsed_lines(path, lines, JUDGED, fix)]


def read_responses(path: str) -> list[Answer]:
    """Return the answers of a user's file.

    Its rows have `prompt` and `response`; `context`, `model`, `kind` and `target` are optional. An answer of an unknown
    kind counts as harmful, with a warning: the kind means something else to the file's author, or is mistyped.

    Raises:
        UserError: see `read_records`.
    """
    optional = ("context", "model", "kind", "target")
    columns = {name: name for name in ("prompt", "response", *optional)}
    records = read_records(path, Reading(columns, frozenset(optional)), dict)
    if others := sorted({str(r["kind"]) for r in records} - {"", "harmful", "harmless", "task"}):
        unknown = printable(", ".join(others))[:200]
        log.warning("%s: kind %s counts as harmful; there are harmful, harmless and task.", path, unknown)
    answers = []
    for index, r in enumerate(records):
        kind = r["kind"] if r["kind"] in ("harmless", "task") else "harmful"
        context = str(r["context"]) if kind == "task" else ""
        model = _model_name(str(r["model"]))
        answers.append(Answer(model, kind, index, str(r["prompt"]), context, str(r["response"]), str(r["target"])))
    return answers


def _model_name(text: str) -> str:
    """Return a model's name for metrics, which are called MODEL/JUDGE/NAME: on one line, short, without a slash."""
    name = printable(text).replace("/", "_") or "responses"
    return name if len(name) <= MAX_NAME_CHARS else f"{name[: MAX_NAME_CHARS - 9]}-{digest(text)[:8]}"


def refuse_no_reference(judges: Mapping[str, Judge], answers: Sequence[Answer], path: str) -> None:
    """Raises UserError where a judge is to compare a file's answer with a reference that the file doesn't give."""
    missing = [answer.index + 1 for answer in answers if answer.kind == "task" and not answer.target]
    for name, judge in judges.items():
        if judge.metric == "win_rate" and missing:
            raise UserError(
                f"{path}: judge={name} compares answers of kind task with a reference, and answer {missing[0]} has "
                "none; give each one as `target`"
            )


def _ask(name: str, judge: Judge, pairs: Sequence[Pair], known: dict[str, Verdict], store: Path) -> list[Verdict]:
    # Jobs of a sweep share answers, which should be paid for once.
    with locked(store):
        known = known | _stored(store)
        new = [p for key, p in {_key(p): p for p in pairs}.items() if key not in known]
        if not new:
            return [known[_key(p)] for p in pairs]
        with explained(store):
            file = store.open("a", encoding="utf-8")
        bar = tqdm(judge.verdicts(new), total=len(new), desc=f"judge by {name}", unit="answer", leave=False)
        with file, bar:
            for pair, verdict in zip(new, bar, strict=True):
                # It failed; other verdicts and then the judge's error follow.
                if verdict is None:
                    continue
                _refuse_unsound(name, verdict)
                known[_key(pair)] = verdict
                # None of the judge's own errors is about this file.
                with explained(store):
                    file.write(_verdict_line(pair, verdict))
                    file.flush()
    return [known[_key(p)] for p in pairs]


def _refuse_unsound(name: str, verdict: Verdict) -> None:
    """Raise UserError for a verdict that could not be read back, as one whose score is NaN."""
    if (fault := fault_in(asdict(verdict), VERDICT)) is not None:
        raise UserError(f"judge={name}: it gave a verdict in which {fault}. Fix: correct what the judge returns")


def _stored(store: Path) -> dict[str, Verdict]:
    """Return the undamaged verdicts of a store by the hash of their pair, and remove all other lines from it.

    Raises:
        UserError: if the store can't be read or written.
    """
    fix = f"delete {store}, or name another folder as cache_dir; verdicts are made again"
    *lines, end = stored_bytes(store, fix).split(b"\n")
    # A killed run leaves half a line without its end.
    entries = [(line, _entry(line)) for line in (*lines, end) if line]
    sound = [(line, entry) for line, entry in entries if entry is not None]
    if end or len(sound) < len(entries):
        write_text(store, "".join(f"{line.decode()}\n" for line, _ in sound))
    if damaged := len(entries) - len(sound):
        log.warning("%d damaged line(s) in %s are judged again.", damaged, store)
    return dict(entry for _, entry in sound)


def _entry(line: bytes) -> tuple[str, Verdict] | None:
    """Return the hash of a pair and its verdict, None for a line that is not as it was written."""
    try:
        values = parsed(line, {"pair": TEXT, **VERDICT, "checksum": TEXT})
    except DamagedLine:
        return None
    checksum, pair = values.pop("checksum"), values["pair"]
    if checksum != digest(values):
        return None
    del values["pair"]
    return pair, Verdict(**values)


def _verdict_line(pair: Pair, verdict: Verdict) -> str:
    values = {"pair": _key(pair)} | asdict(verdict)
    return json.dumps(values | {"checksum": digest(values)}) + "\n"


def _reference(judge: Judge, answer: Answer) -> str:
    return answer.target if judge.metric == "win_rate" else ""


def _key(pair: Pair) -> str:
    return digest(asdict(pair))


def _verdict(line: Judged) -> Verdict:
    return Verdict(line.flagged, line.score, line.refused, line.categories, line.partly)
