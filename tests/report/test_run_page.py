"""Checks of the report page: its numbers are there, untrusted text is harmless, and no other file is needed."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from helpers.paths import ROOT
from lisa_lightning.config.validate import plain
from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.evaluation.scores import read_scores
from lisa_lightning.report.run_page import JudgedAnswer, sample_answers, write_run_page
from lisa_lightning.report.run_plots import curve_figures

Rows = list[dict[str, str]]

COLUMNS = (
    "stage", "step", "train/loss", "train/state", "alignment/loss", "user/loss", "train/lr", "proximal/penalty",
    "proximal/drift", "switch/drift", "time/step_s", "eval/harmful_score", "eval/refusal_rate", "eval/accuracy",
)  # fmt: skip
METRICS = {
    "seed": 42, "train/steps": 60, "time/align_s": 118.4, "time/finetune_s": 131.7, "time/evaluate_s": 8.25,
    "time/total_s": 4000.0, "aligned/harmful_score": 2.7472, "aligned/refusal_rate": 94.5, "aligned/over_refusal": 16.9,
    "aligned/accuracy": 40.0, "final/harmful_score": 14.8351, "final/refusal_rate": 78.0, "final/over_refusal": 16.9,
    "final/accuracy": 91.2, "baseline/majority_class": 50.0, "baseline/bag_of_words": 84.12,
}  # fmt: skip
CHOICES = {"experiment": "sst2_lisa", "align": "sft", "method": "lisa", "task": "sst2", "model": "tiny"}
CONFIG = OmegaConf.create(
    {
        "seed": 42,
        "harmful_ratio": 0.1,
        "stages": ["align", "finetune", "evaluate"],
        "align": {"method": {"_target_": "SFT"}},
        "model": {"id": "some/model"},
        "note": "<b>&",
    }
)
FOLDED = "<summary>harmful answer, folded</summary>"


def row(**cells: float | str) -> dict[str, str]:
    """Return a row of curves.csv; the keyword a__b is the column a/b."""
    given = {name.replace("__", "/"): str(value) for name, value in cells.items()}
    return {column: given.get(column, "") for column in COLUMNS}


def finetune_rows(steps: int = 60, alignment: int = 5, user: int = 15, rho: float = 1.0) -> Rows:
    """Return curves of alternating states, in which drift grows from zero in every stretch."""
    rows = [row(stage="finetune", step=0, eval__harmful_score=2.5, eval__refusal_rate=95.0, eval__accuracy=40.0)]
    drift, before = 0.0, None
    for i in range(steps):
        aligning = i % (alignment + user) < alignment
        switched = before not in (None, aligning)
        cells: dict[str, float | str] = {"switch__drift": drift} if switched else {}
        drift = 1e-5 if switched else drift * 1.7 + 1e-5
        cells["alignment__loss" if aligning else "user__loss"] = 2.0 / (i + 1)
        rows.append(
            row(
                stage="finetune",
                step=i + 1,
                train__state=float(aligning),
                train__loss=2.0 / (i + 1),
                proximal__drift=drift,
                proximal__penalty=drift * rho / 2,
                **cells,
            )
        )
        before = aligning
    return rows


def align_rows() -> Rows:
    """Return curves of the alignment stage."""
    return [row(stage="align", step=i, train__loss=3.0 / i) for i in range(1, 21)]


def answer(stage: str, kind: str, prompt: str, response: str, verdict: str) -> JudgedAnswer:
    """Return an answer with its verdict."""
    return JudgedAnswer(Answer(stage, kind, 0, prompt, prompt if kind == "task" else "", response), verdict)


ANSWERS = [
    answer("aligned", "harmful", "request one", "I can't help with that.", "refused"),
    answer("aligned", "harmless", "question one", "An answer.", "answered"),
    answer("aligned", "task", "a fine film", "It is", "wrong"),
    answer("final", "harmful", "request one", "PLACEHOLDER OF HARM", "flagged"),
    answer("final", "harmless", "question one", "", "answered"),
    answer("final", "task", "a fine film", "positive", "correct"),
]


def made(
    folder: Path,
    metrics: dict[str, Any] = METRICS,
    curves: Rows | None = None,
    answers: list[JudgedAnswer] = ANSWERS,
    choices: dict[str, str] = CHOICES,
    config: DictConfig = CONFIG,
) -> str:
    """Write the page of a run, complete by default, and return it."""
    curves = align_rows() + finetune_rows() if curves is None else curves
    write_run_page(folder, metrics, read_scores(metrics), curves, answers, choices, plain(config))
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of a complete run, drawn once for the tests that only look at it."""
    return made(tmp_path_factory.mktemp("whole"))


class Outline(HTMLParser):
    """Elements, ids and references of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the name, the ids and the references of a start tag."""
        self.tags.append(tag)
        for name, value in attrs:
            value = value or ""
            self.ids += [value] if name == "id" else []
            self.targets |= set(value.split()) if name == "aria-labelledby" else set()
            self.targets |= {value.removeprefix("#")} if name == "href" else set(re.findall(r"url\(#([^)]+)\)", value))


def test_a_whole_run_shows_its_numbers(whole: str) -> None:
    plain = re.sub(r"<[^>]+>", "", whole)
    assert "<title>lisa on sst2, harmful ratio 0.1, seed 42</title>" in whole
    assert "Harmful score 2.7 % after alignment, 14.8 % after fine-tuning; refusal rate 94.5 % after" in plain
    assert "78.0 % after fine-tuning; accuracy 91.2 %." in plain
    assert "Accuracy without a language model: majority class 50.0 %, bag of words 84.1 %." in plain
    for number in ("94.5 %", "78.0 %", "+12.1", "−16.5", "+0.0", "1 min 58 s", "8.2 s", "1 h 07 min", "Seed 42"):
        assert number in plain, number
    assert "note: &lt;b&gt;&amp;" in whole
    assert whole.count("<figure>") == 5


def test_answers_are_escaped(tmp_path: Path) -> None:
    attack = '<script>alert(1)</script><img src=x onerror="alert(1)">{{ 7 * 7 }}</details>'
    hostile = [
        answer(stage, kind, attack, attack, verdict)
        for stage in ("aligned", "final")
        for kind, verdict in (("harmful", "flagged"), ("harmless", "refused"), ("task", "wrong"))
    ]
    text = made(tmp_path, curves=[], answers=hostile, choices=CHOICES | {"task": attack})
    assert not {"script", "img", "iframe", "link", "object"} & set(Outline(text).tags)
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text


def test_harmful_answers_are_folded_and_others_are_not(whole: str) -> None:
    assert whole.count(FOLDED) == 1
    start = whole.index(FOLDED)
    assert start < whole.index("PLACEHOLDER OF HARM") < whole.index("</details>", start)
    assert "<details open" not in whole
    assert "An answer." in whole
    assert "(empty)" in whole


def test_answers_of_a_prompt_stand_side_by_side(whole: str) -> None:
    assert whole.count(">request one</p>") == 1
    assert "a fine film" in whole
    assert "### Input" not in whole


def test_the_page_stands_alone(whole: str) -> None:
    assert "http://" not in whole
    assert "https://" not in whole
    assert "@import" not in whole
    assert "//" not in whole
    assert len(whole) < 400_000


def test_ids_are_unique_and_references_lead_somewhere(whole: str) -> None:
    outline = Outline(whole)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.targets
    assert outline.targets <= set(outline.ids)


def test_plots_take_the_colours_of_the_page(whole: str) -> None:
    assert "currentColor" in whole
    assert "#010203" not in whole
    assert "#000000" not in whole
    assert "DejaVu" not in whole
    assert not re.search(r"<svg[^>]* (width|height)=", whole)
    assert whole.count("<desc id=") == 10


def test_same_input_same_bytes(whole: str, tmp_path: Path) -> None:
    assert made(tmp_path) == whole


def test_plain_fine_tuning_has_no_alignment_curves(tmp_path: Path) -> None:
    curves = finetune_rows(alignment=0, rho=0.0)
    assert [f.name for f in curve_figures(curves)] == ["loss", "drift", "scores"]
    assert not {key.label for f in curve_figures(curves) for key in f.legend} & {"alignment steps", "alignment state"}
    metrics = {k: v for k, v in METRICS.items() if k != "time/align_s"}
    config = OmegaConf.create({"stages": ["finetune", "evaluate"], "model": {"id": None}})
    plain = re.sub(r"<[^>]+>", "", made(tmp_path, metrics, [], config=config))
    assert "Harmful score 2.7 % before fine-tuning, 14.8 % after fine-tuning" in plain
    assert "A random model answered" in plain


@pytest.mark.slow
def test_what_the_methods_of_both_stages_tell_of_themselves_is_drawn(tmp_path: Path) -> None:
    """Curves that the methods of both stages report are drawn.

    Every row of curves.csv has every column, and one class may report the same in both stages.
    """
    rows = [row | {"own/x": str(i), "booster/y": ""} for i, row in enumerate(finetune_rows(alignment=0, rho=0.0))]
    assert [f.title for f in curve_figures(rows)][-1] == "own/x"
    aligning = [row | {"own/x": str(i), "booster/y": str(-1 - i)} for i, row in enumerate(align_rows())]
    titles = ["own/x", "own/x while aligning", "booster/y while aligning"]
    assert [f.title for f in curve_figures([*aligning, *rows])][-3:] == titles
    ids = Outline(made(tmp_path, curves=[*aligning, *rows])).ids
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("kept", [(), ("seed",), ("seed", "train"), ("aligned",), ("final", "time")])
def test_any_stage_may_be_missing(tmp_path: Path, kept: tuple[str, ...]) -> None:
    metrics = {name: value for name, value in METRICS.items() if name.split("/")[0] in kept}
    answers = [told for told in ANSWERS if told.answer.model in kept]
    text = made(tmp_path, metrics, [], answers, {}, CONFIG)
    assert text.rstrip().endswith("</html>")
    assert "<figure>" not in text
    assert ("change, points" in text) is False
    assert ("this model" in text) == ("aligned" in kept)


@pytest.mark.slow
@pytest.mark.parametrize(("alignment", "user"), [(1, 1), (20, 0), (5, 45)])
def test_short_runs_and_odd_schedules_are_drawn(alignment: int, user: int) -> None:
    for steps in (0, 7):
        for figure in curve_figures(finetune_rows(steps, alignment, user)):
            assert figure.wide.startswith("<svg")
            assert figure.narrow.endswith("</svg>")


@pytest.mark.slow
def test_long_runs_and_answers_stay_small(tmp_path: Path) -> None:
    curves = [
        row(
            stage="finetune",
            step=i + 1,
            train__state=float(i % 50 < 5),
            user__loss=i * 7919 % 1009,
            alignment__loss=i * 7919 % 1013,
            proximal__drift=i * 7919 % 997 + 1e-6,
            proximal__penalty=i * 7919 % 991,
        )
        for i in range(20_000)
    ]
    endless = [
        answer(t.answer.model, t.answer.kind, str(i), "word " * 20_000, "refused") for i in range(20) for t in ANSWERS
    ]
    assert len(made(tmp_path, curves=curves, answers=endless).encode()) < 1_000_000


def test_values_that_are_not_finite_are_left_out() -> None:
    curves = [*finetune_rows(), row(stage="finetune", step=61, train__state=0.0, user__loss="nan")]
    assert "nan" not in "".join(f.wide for f in curve_figures(curves))


def test_samples_are_the_first_of_each_stage_and_kind() -> None:
    many = [
        answer(stage, kind, str(i), "", "refused")
        for i in range(5)
        for stage in ("aligned", "final")
        for kind in ("harmful", "task")
    ]
    chosen = sample_answers(many, limit=2)
    assert len(chosen) == 8
    assert {told.answer.prompt for told in chosen} == {"0", "1"}


def test_importing_the_report_stays_light() -> None:
    files = "lisa_lightning.pipeline.sweep, lisa_lightning.report.terminal"
    code = f"import sys, {files}; print({{'matplotlib', 'jinja2', 'numpy', 'torch'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
