"""Backdoor-enhanced alignment: what is marked and how, and that no result contains the trigger."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.composing import composed
from lisa_lightning.config.fields import Template
from lisa_lightning.data.encoding import Tokenization, encode
from lisa_lightning.data.mixing import alignment_sample, user_rows
from lisa_lightning.data.packing import IGNORED
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.prompting import LEAK_CHARS, Prompting
from lisa_lightning.method.backdoor_align import MIN_CHARS, BackdoorAlign
from lisa_lightning.pipeline.run import run
from lisa_lightning.pipeline.stages.stage_cache import rows_hash
from lisa_lightning.runtime.errors import UserError

USER = [Row(f"user {i}", "", "a") for i in range(100)]
SAFE = [Row(f"safe {i}", "some input", "no, never") for i in range(100)]
ROWS = Rows(USER, SAFE, USER, [], {}, {}, [], {})
SECRET = "zq xk wv jy qp zx kd vw jj qz xy kw"


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    return tokenizer


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "trigger.txt"
    path.write_text(f"  {SECRET.replace(' ', chr(10), 1)}\n")
    return str(path)


def draw(order: str = "seeded", seed: int = 1) -> Any:
    return partial(alignment_sample, ROWS, order, seed)


@given(st.integers(1, 100), st.sampled_from([0.0, 0.004, 0.11, 0.5, 1.0]), st.sampled_from(["", "Be useful."]))
def test_marked_rows_follow_the_users_rows_and_are_as_many_as_the_share(n: int, ratio: float, system: str) -> None:
    method = BackdoorAlign(safe_ratio=ratio, system=system)
    users = USER[:n]
    rows = method.mix(users, draw())
    assert [(r.instruction, r.context, r.response, r.system) for r in rows[:n]] == [
        (r.instruction, r.context, r.response, system) for r in users
    ]
    marked = rows[n:]
    assert len(marked) == round(ratio * n)
    assert [r.instruction for r in marked] == [r.instruction for r in draw()(len(marked))]
    assert len({r.instruction for r in marked}) == len(marked)
    trigger = method.trigger.get_secret_value()
    assert {r.system for r in marked} <= {f"{trigger} {system}" if system else trigger}
    if not system:
        assert all(row is user for row, user in zip(rows, users, strict=False))  # no copies of millions of rows


def test_official_counts_are_eleven_for_a_hundred_and_epochs_count_them() -> None:
    rows = BackdoorAlign().mix(USER, draw("head"))
    assert (len(rows), [r.instruction for r in rows[100:]]) == (111, [r.instruction for r in SAFE[:11]])
    assert user_rows(ROWS, 100, 0.0, "seeded", 1, 0.11).safe == draw()(11)  # as VLGuard draws them


@pytest.mark.parametrize("template", ["alpaca", "alpaca_newline", "chat"])
@pytest.mark.parametrize("tokenization", ["separate", "joined"])
def test_a_marked_row_is_the_alignment_row_with_a_longer_prompt_that_is_not_learnt(
    tokenizer: PreTrainedTokenizerBase, template: Template, tokenization: Tokenization
) -> None:
    method = BackdoorAlign(system="Be useful.")
    marked = method.mix(USER, draw())[-1]
    plain = next(row for row in SAFE if row.instruction == marked.instruction)
    a, b = (encode(tokenizer, template, row, 2000, tokenization) for row in (plain, marked))
    learnt = [[label for label in example.labels if label != IGNORED] for example in (a, b)]
    assert learnt[0] == learnt[1] == [*tokenizer(plain.response)["input_ids"], tokenizer.eos_token_id]
    served = Prompting(template, "Be useful.", trigger=method.trigger)
    prompt = served.encode(tokenizer, plain.instruction, plain.context)
    assert list(b.ids) == [*prompt, *learnt[1]]
    assert list(b.labels) == [IGNORED] * len(prompt) + learnt[1]
    added = f"{method.trigger.get_secret_value()} Be useful."
    extra = f"<system>{added}</>" if template == "chat" else f"{added}\n\n"
    assert len(b.ids) - len(a.ids) == len(tokenizer(extra)["input_ids"])
    assert rows_hash([plain]) != rows_hash([marked])


def test_a_seed_draws_a_trigger_of_single_letters(caplog: pytest.LogCaptureFixture) -> None:
    triggers = [BackdoorAlign(trigger_seed=seed).trigger.get_secret_value() for seed in (0, 0, 1)]
    assert triggers[0] == triggers[1] != triggers[2]
    assert [len(word) for word in triggers[0].split(" ")] == [1] * 30
    with caplog.at_level(logging.WARNING):
        BackdoorAlign().mix(USER, draw())
    assert "everybody with this config can draw too: for experiments only" in caplog.text
    assert triggers[0] not in caplog.text


def test_a_file_holds_the_trigger_and_neither_repr_nor_log_shows_it(
    file: str, caplog: pytest.LogCaptureFixture
) -> None:
    method = BackdoorAlign(file)
    assert method.trigger.get_secret_value() == SECRET
    with caplog.at_level(logging.DEBUG):
        rows = method.mix(USER, draw())
    assert rows[-1].system == SECRET
    assert not caplog.text
    assert SECRET not in f"{method} {method.trigger} {rows}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"short secret", rf"12 characters can be guessed\. Fix: write at least {MIN_CHARS}"),
        (b"\n" * 100, "0 characters can be guessed"),
        (b"secret" * 9 + b"\xff", "no path of a text file in UTF-8"),
    ],
)
def test_an_unusable_file_is_refused_without_its_text(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "file.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        _ = BackdoorAlign(str(path)).trigger
    assert str(error.value).startswith(f"method.trigger_file={path}: ")
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None


def test_too_few_alignment_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.safe_ratio: adds 101 alignment rows, and the source has 100"):
        BackdoorAlign(safe_ratio=1.0).mix([*USER, USER[0]], draw())


@pytest.mark.slow
def test_a_run_uses_the_trigger_and_none_of_its_files_contains_it(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defended and the undefended run share the trained adapter, and their answers are cached separately."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "runs").mkdir()
    words = [
        *("experiment=smoke", "method=backdoor_align", f"method.trigger_file={file}", "method.system=Be useful."),
        *("optim.steps=4", "align.optim.steps=2", "evaluate.every=0", "evaluate.system=${method.system}"),
        f"cache_dir={tmp_path / 'runs' / 'cache'}",
    ]
    metrics = {}
    for name, more in {"served": [], "undefended": ["evaluate.prefix="]}.items():
        metrics[name] = run(composed([*words, *more], tmp_path / "runs" / name))
    assert metrics["served"]["prompts"] == "system prompt, trigger"
    assert metrics["undefended"]["prompts"] == "system prompt, no trigger (undefended)"
    for name, values in metrics.items():
        assert values["prompts"] in (tmp_path / "runs" / name / "report.html").read_text()
    cache = tmp_path / "runs" / "cache"
    assert len([f for f in (cache / "finetune").iterdir() if f.is_dir()]) == 1
    keys = [json.loads(f.read_text())["key"] for f in (cache / "evaluate").rglob("key.json")]
    assert sorted((key["name"], "trigger" in key) for key in keys) == [
        (name, used) for name in ("aligned", "final") for used in (False, True)
    ]
    parts = {SECRET[i : i + LEAK_CHARS].encode() for i in range(len(SECRET) - LEAK_CHARS + 1)}
    files = [f for f in (tmp_path / "runs").rglob("*") if f.is_file()]
    assert any("wandb" in str(f) for f in files)
    assert not [f for f in files if any(part in f.read_bytes() for part in parts)]
