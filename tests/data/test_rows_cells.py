"""Cells of files and sets: bytes, numbers, null and blank texts, and the config that converts them."""

import json
import logging
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lisa_lightning.data.files import read_records
from lisa_lightning.data.hub import read_hub
from lisa_lightning.data.normal_form import normal_value
from lisa_lightning.data.reading import Reading
from lisa_lightning.data.source import Rows, load_rows
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.task.agnews import AGNews
from lisa_lightning.task.alpaca import Alpaca
from lisa_lightning.task.gsm8k import GSM8K
from lisa_lightning.task.sst2 import SST2

TEXT = Reading({"text": "text"})
GOOD = {"sentence": "film 1", "label": 1, "prompt": "request 1", "response": "answer 1"}
OTHER = {"sentence": "film 2", "label": 0, "prompt": "request 2", "response": "answer 2"}
BLANK = ["", " ", "\t\n", "\u00a0", "\u200b", "\ufeff", "\u2028", "\u3000", "\u00ad", "\u200d\ufe0f", "\u3164", "\x00"]
ENTRY = {
    "path": None, "header": None, "columns": None, "labels": None, "where": None, "skip": 0, "take": None,
    "hub": None, "config": None, "split": "train", "revision": None, "files": None, "rows": None,
}  # fmt: skip


def parquet(path: Path, columns: Any) -> str:
    out = BytesIO()
    pyarrow.parquet.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), out)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(out.getvalue())
    return str(path)


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


Load = Callable[..., Rows]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return a loader of a source of good rows, in which `changes` replace values of entries."""
    sets = ("train", "test", "alignment", "harmful", "harmful_prompts", "harmless_prompts")
    rows = [{k: f"{v} {name}" if k != "label" else v for k, v in GOOD.items()} for name in sets]
    paths = {name: lines(tmp_path / f"{name}.jsonl", row) for name, row in zip(sets, rows, strict=True)}

    def loaded(task: Any = None, **changes: dict[str, Any]) -> Rows:
        source = {name: ENTRY | {"path": path} | changes.get(name, {}) for name, path in paths.items()}
        return load_rows(OmegaConf.create(source), task or SST2(), allow_overlap=False)

    return loaded


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(5), pa.dictionary(pa.int8(), pa.binary())])
def test_bytes_are_decoded_wherever_they_are_used(tmp_path: Path, kind: pa.DataType) -> None:
    cells = pa.array(["caf\u00e9".encode(), b"other"], pa.binary() if pa.types.is_dictionary(kind) else kind)
    cells = cells.dictionary_encode() if pa.types.is_dictionary(kind) else cells
    path = parquet(tmp_path / "a.parquet", {"text": cells, "n": [1, 2]})
    assert [r["text"] for r in read_records(path, TEXT, dict)] == ["caf\u00e9", "other"]
    joined = Reading({"both": ["text", "n"]}, where={"text": "CAF\u00c9"})
    assert read_records(path, joined, dict) == [{"both": "caf\u00e9 1"}]
    labelled = Reading({"text": "text"}, labels={"text": {"caf\u00e9": "a", "other": "b"}})
    assert [r["text"] for r in read_records(path, labelled, dict)] == ["a", "b"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_bytes_that_are_no_utf8_are_refused_where_they_are_used(tmp_path: Path, kind: pa.DataType) -> None:
    cells = pa.array([b"text 1", b"\xff\xfe"], pa.binary())
    if kind != pa.binary():
        cells = cells.view(pa.string())
    if pa.types.is_dictionary(kind):
        cells = cells.dictionary_encode()
    path = parquet(tmp_path / "a.parquet", {"text": cells, "other": ["a", "b"]})
    for reading in (TEXT, Reading({"other": "other"}, where={"text": "x"}), Reading({"t": ["other", "text"]})):
        with pytest.raises(UserError, match=r"a\.parquet, row 2: column 'text' has bytes that are not UTF-8\. Fix: "):
            read_records(path, reading, dict)
    assert len(read_records(path, Reading({"other": "other"}), dict)) == 2


def test_other_types_have_their_text_and_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = {
        "int": [1], "float": [1.5], "bool": [True], "date": [date(2024, 7, 1)], "decimal": [Decimal("1.00")],
        "dictionary": pa.array(["a"]).dictionary_encode(),
    }  # fmt: skip
    path = parquet(tmp_path / "a.parquet", columns)
    record = read_records(path, Reading({name: name for name in columns}), dict)[0]
    assert [str(v) for v in record.values()] == ["1", "1.5", "True", "2024-07-01", "1.00", "a"]
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(UserError, match=r"a\.parquet: two columns are called 'text'\. Fix: "):
        read_records(parquet(tmp_path / "a.parquet", table), TEXT, dict)


def test_bytes_of_a_hub_set_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    parquet(tmp_path / "set" / "train.parquet", {"text": pa.array([b"text 1", b"\xff"], pa.binary()), "n": [1.0, 2.0]})
    where = (str(tmp_path / "set"), None, "train", None, None, None)
    assert read_hub(*where, Reading({"text": "text"}, where={"n": 1}), dict) == [{"text": "text 1"}]
    with pytest.raises(UserError, match=r"train, row 2: column 'text' has bytes that are not UTF-8"):
        read_hub(*where, TEXT, dict)


ONES = [1, 1.0, "1", "1.0", "1.00", "1e0", "1E+0", " 1 ", "+1", "\uff11", "1\u200b", Decimal("1.00"), np.int64(1)]


def test_a_number_equals_itself_however_it_is_written(tmp_path: Path) -> None:
    assert {normal_value(one) for one in [*ONES, np.float32(1), np.float64(1)]} == {"1"}
    others = [
        True,
        "true",
        "01",
        "007",
        "1 0",
        "1,0",
        "",
        None,
        "null",
        "-1",
        10,
        "0x1",
        0.1,
        2**70,
        2**70 + 1,
        "e1",
        ".",
    ]
    normal = [normal_value(other) for other in others]
    assert len(set(normal)) == len(others) - 1  # True is "true".
    assert "1" not in normal
    cells = "".join(f'{{"text": {json.dumps(one)}}}\n' for one in ONES if not isinstance(one, (Decimal, np.integer)))
    (tmp_path / "a.jsonl").write_text(cells + '{"text": "01"}\n{"text": true}\n{"text": null}\n')
    for value in ONES:
        assert (
            len(read_records(str(tmp_path / "a.jsonl"), Reading({"text": "text"}, where={"text": value}), dict)) == 11
        )


@given(st.integers(), st.integers(0, 5), st.integers(-30, 30))
def test_no_two_numbers_are_the_same_and_no_digit_counts_twice(number: int, zeros: int, shift: int) -> None:
    spelled = f"{number}.{'0' * zeros}e0", f"{number}{'0' * zeros}e-{zeros}"
    assert {normal_value(s) for s in spelled if number or "e-" not in s} == {normal_value(number)}
    assert normal_value(number + 1) != normal_value(number)
    value = Decimal(number).scaleb(shift)
    assert normal_value(value) == normal_value(str(value).lower()) == normal_value(f"{value:f}")


def test_null_equals_null_alone(tmp_path: Path) -> None:
    cells = [{"text": str(i), "c": c} for i, c in enumerate((None, "null", "None", "", 0, False))]
    path = lines(tmp_path / "a.jsonl", *cells)
    for value, rows in ((None, ["0"]), ("null", ["1"]), ("none", ["2"]), ([None, ""], ["0", "3"]), (False, ["5"])):
        assert [r["text"] for r in read_records(path, Reading({"text": "text"}, where={"c": value}), dict)] == rows


def test_columns_are_named_in_any_case_and_unicode_form(tmp_path: Path, load: Load) -> None:
    (tmp_path / "a.csv").write_text("\u00a0Se\u0301ance ,5\nfilm 1,1\n")
    columns = {"sentence": "s\u00e9ance", "label": 5}
    where = {"S\u00c9ANCE": "FILM\u00a01", 5: "1.0"}
    rows = load(train={"path": str(tmp_path / "a.csv"), "columns": columns, "where": where}).train
    assert [(r.context, r.response) for r in rows] == [("film 1", "positive")]
    (tmp_path / "b.csv").write_text("Sentence,SENTENCE,label\na,b,1\n")
    with pytest.raises(UserError, match=r"b\.csv, line 2: column 'sentence' can be Sentence, SENTENCE\. Fix: spell"):
        load(train={"path": str(tmp_path / "b.csv")})
    (tmp_path / "c.csv").write_text("Sentence,sentence,label\na,b,1\n")
    assert load(train={"path": str(tmp_path / "c.csv")}).train[0].context == "b"


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("columns", {"sentence": None}, "columns.sentence=null: it must be the name of a column"),
        ("columns", {"sentence": ["a", None]}, "columns.sentence=['a', None]: it must be the name of a column"),
        ("columns", {"sentence": []}, "columns.sentence=[]: it must be the name of a column"),
        ("columns", {"sentence": {"a": 1}}, "columns.sentence={'a': 1}: it must be the name of a column"),
        ("columns", {"sentence": [["a"]]}, "columns.sentence=[['a']]: it must be the name of a column"),
        ("columns", {"other": None}, "columns names 'other'; allowed: sentence, label"),
        ("columns", 5, "columns=5: it must be a mapping"),
        ("columns", {"sentence": "???"}, "columns: it has no value (Missing mandatory value: sentence). Fix: "),
        ("columns", {"sentence": "${none}"}, "columns: it has no value (Interpolation key 'none' not found). Fix: "),
        ("labels", {"label": None}, "labels.label=null: it must be a mapping"),
        ("labels", {"label": {}}, "labels.label={}: it must be a mapping"),
        ("labels", {"label": [1]}, "labels.label=[1]: it must be a mapping"),
        ("labels", {"label": {1: None}}, "labels.label={1: null}: both must be a text"),
        ("labels", {"label": {1: ["x"]}}, "labels.label={1: ['x']}: both must be a text"),
        ("labels", {"label": {"1": "negative", "1.0": "positive"}}, "labels.label={1: negative, 1.0: positive}: 1 and"),
        ("where", {"label": {"a": 1}}, "where.label={'a': 1}: it must be a value"),
        ("where", {"label": []}, "where.label=[]: it must be a value"),
        ("where", {"label": [[1]]}, "where.label=[[1]]: it must be a value"),
        ("header", ["a", None], "header=['a', None]: it must be a list of column names"),
    ],
)
def test_a_wrong_entry_is_named_by_its_key(load: Load, key: str, value: Any, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load(train={key: value})
    assert f"source.train.{sentence}" in str(error.value)


def test_labels_of_one_value_that_agree_are_one(load: Load, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"sentence": f"film {i}", "label": c} for i, c in enumerate((1, "1.0", 5.0))))
    labels = {"label": {"1": "negative", "1.0": "negative", 5: "positive"}}
    assert [r.response for r in load(train={"path": path, "labels": labels}).train] == ["negative"] * 2 + ["positive"]


@pytest.mark.parametrize("blank", BLANK)
def test_a_blank_text_of_a_file_is_refused_with_its_line_and_column(load: Load, tmp_path: Path, blank: str) -> None:
    fields = {
        "train": ("sentence",), "test": ("sentence",), "alignment": ("prompt", "response"),
        "harmful": ("prompt", "response"), "harmful_prompts": ("prompt",), "harmless_prompts": ("prompt",),
    }  # fmt: skip
    for name, columns in fields.items():
        for column in columns:
            path = lines(tmp_path / "a.jsonl", OTHER, OTHER | {column: blank})
            with pytest.raises(UserError, match=rf"a\.jsonl, line 2: column '{column}' is empty\. Fix: delete the row"):
                load(**{name: {"path": path}})


def test_a_blank_text_of_any_task_is_refused(load: Load, tmp_path: Path) -> None:
    records: list[tuple[Any, str, dict[str, Any]]] = [
        (AGNews(), "text", {"label": 1}),
        (GSM8K(), "question", {"answer": "#### 1"}),
        (Alpaca(), "instruction", {"output": "answer 1"}),
    ]
    for task, field, others in records:
        path = lines(tmp_path / "a.jsonl", {field: "\u200b "} | others)
        with pytest.raises(UserError, match=rf"a\.jsonl, line 1: column '{field}' is empty"):
            load(task, train={"path": path}, test={"path": path})


def test_empty_outputs_of_alpaca_and_texts_of_hub_sets_are_read_with_one_warning(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = [{"instruction": f"task {i}", "output": "" if i % 2 else "answer"} for i in range(5)]
    path = lines(tmp_path / "a.jsonl", *tasks)
    pairs = {"prompt": ["request 5", "", "request 6", ""], "response": ["answer", "a", " ", ""]}
    parquet(tmp_path / "set" / "train.parquet", pairs)
    hub = {"path": None, "hub": str(tmp_path / "set")}
    rows = load(Alpaca(), train={"path": path, "take": 3}, test={"path": path, "skip": 3}, alignment=hub | {"take": 3})
    assert [r.response for r in rows.test] == ["", "answer"]
    assert [(r.instruction, r.response) for r in rows.alignment] == [
        ("request 5", "answer"),
        ("", "a"),
        ("request 6", ""),
    ]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "empty" in r.getMessage()]
    assert warnings == [
        "Rows with an empty text, which are used as they were published: "
        "1 of source.test, 1 of source.train, 2 of source.alignment."
    ]


def test_nested_and_missing_cells_are_named_without_their_content(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": ["secret"], "c": {"a": 1}})
    for reading in (TEXT, Reading({"x": "x"}, where={"text": "a"}), Reading({"x": "c"})):
        with pytest.raises(UserError, match=r"line 1: column '(text|c)' is no text: (list|dict) of 1 values") as error:
            read_records(path, reading, dict)
        assert "secret" not in str(error.value)


def test_rows_of_one_file_may_spell_and_order_their_columns_differently(tmp_path: Path) -> None:
    headers = [
        ("text", "n"),
        ("TEXT", "n"),
        ("n", "Text"),
        ("N", "te\u200bxt"),
        ("x", "\uff34ext", "n"),
        ("n", "text", "TEXT"),
    ]
    rows = [dict.fromkeys(header, f"cell {number}") for number in range(50) for header in headers]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reading = Reading(
        {"text": "text", "input": "input"}, optional=frozenset({"input"}), where={"n": ["cell 1", "cell 9"]}
    )
    records = read_records(str(tmp_path / "a.jsonl"), reading, dict)
    assert records == [{"text": f"cell {number}", "input": ""} for number in (1, 9) for _ in headers]
    for column, problem in (("Text", r"can be text, TEXT\."), ("other", r"is missing; there are: n, text, TEXT\.")):
        for _ in range(2):
            with pytest.raises(UserError, match=f"column '{column}' {problem}"):
                Reading({"text": column}).record({"n": "1", "text": "a", "TEXT": "b"})
