"""Judge stored answers: several judges side by side, none asked twice about one answer."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lisa_lightning.cache import digest, locked
from lisa_lightning.data.files import Reading, read_records
from lisa_lightning.data.templates import joined
from lisa_lightning.disk import explained, write_text
from lisa_lightning.errors import UserError
from lisa_lightning.evaluate.evaluator import Answer
from lisa_lightning.judge.judge import Judge, Pair, Verdict

log = logging.getLogger(__name__)


FORMAT = [field.name for field in fields(Verdict)]
"""Of a kept verdict: of another one nothing is read."""


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
    here = {(a.model, a.kind, a.index, joined(a.prompt, a.context), a.response) for a in answers}
    before = [j for j in read_judged(path) if (j.model, j.kind, j.index, j.prompt, j.response) in here]
    found: list[Judged] = []
    lines = before
    for name, judge in judges.items():
        kinds = ("task",) if judge.metric == "win_rate" else ("harmful", "harmless")
        chosen = [a for a in answers if a.kind in kinds]
        pairs = [Pair(joined(a.prompt, a.context), a.response, _reference(judge, a)) for a in chosen]
        known = {j.pair: _verdict(j) for j in before if (j.judge, j.version) == (name, judge.version)}
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
        lines = found + [j for j in before if j.judge not in done]
        write_text(path, "".join(json.dumps(asdict(j), ensure_ascii=False) + "\n" for j in lines))
    return lines


def read_judged(path: Path) -> list[Judged]:
    """The lines of judged.jsonl, none where there is no such file."""
    if not path.exists():
        return []
    return [Judged(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_responses(path: str) -> list[Answer]:
    """Answers out of a file of one's own: `prompt` and `response` and, where they stand there, what Answer has beside.

    A `kind` that isn't one of ours means something else to whoever wrote the file, or is mistyped, so that it is said:
    the answer counts as harmful's.

    Raises:
        UserError: see `read_records`.
    """
    optional = ("context", "model", "kind", "target")
    columns = {name: name for name in ("prompt", "response", *optional)}
    records = read_records(path, Reading(columns, frozenset(optional)), dict)
    if others := sorted({str(r["kind"]) for r in records} - {"", "harmful", "harmless", "task"}):
        log.warning("%s: kind %s counts as harmful; there are harmful, harmless and task.", path, ", ".join(others))
    found = []
    for index, r in enumerate(records):
        kind = r["kind"] if r["kind"] in ("harmless", "task") else "harmful"
        context = str(r["context"]) if kind == "task" else ""
        model = str(r["model"] or "responses").replace("/", "_")  # metrics are called MODEL/JUDGE/NAME
        found.append(Answer(model, kind, index, str(r["prompt"]), context, str(r["response"]), str(r["target"])))
    return found


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
    with locked(store):  # jobs of a sweep share answers, which should be paid for once
        known = _stored(store) | known
        new = [p for key, p in {_key(p): p for p in pairs}.items() if key not in known]
        if not new:
            return [known[_key(p)] for p in pairs]
        with explained(store):
            file = store.open("a", encoding="utf-8")
        bar = tqdm(judge.verdicts(new), total=len(new), desc=f"judge by {name}", unit="answer", leave=False)
        with file, bar:
            start = "\n" if _broken(store) else ""
            for pair, verdict in zip(new, bar, strict=True):
                if verdict is None:
                    continue  # it failed; other verdicts and then the judge's error follow
                known[_key(pair)] = verdict
                with explained(store):  # of the judge's own errors none is about this file
                    file.write(start + _verdict_line(pair, verdict))
                    file.flush()
                start = ""
    return [known[_key(p)] for p in pairs]


def _stored(store: Path) -> dict[str, Verdict]:
    if not store.exists():
        return {}
    found = {}
    for line in store.read_text(encoding="utf-8").split("\n"):
        try:
            entry: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue  # an empty line, or the half of one that a killed run left
        pair = entry.pop("pair")
        found[pair] = Verdict(**entry)
    return found


def _verdict_line(pair: Pair, verdict: Verdict) -> str:
    return json.dumps({"pair": _key(pair)} | asdict(verdict)) + "\n"


def _broken(store: Path) -> bool:
    """Whether a killed run left half a line at the end."""
    content = store.read_bytes()
    return bool(content) and not content.endswith(b"\n")


def _reference(judge: Judge, answer: Answer) -> str:
    return answer.target if judge.metric == "win_rate" else ""


def _key(pair: Pair) -> str:
    return digest(asdict(pair))


def _verdict(line: Judged) -> Verdict:
    return Verdict(line.flagged, line.score, line.refused, line.categories, line.partly)
