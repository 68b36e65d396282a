"""JSON and JSON Lines: both under either suffix, with file and line of a broken row."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_lightning.data.files import read_records
from lisa_lightning.data.json_rows import json_rows
from lisa_lightning.data.reading import Reading
from lisa_lightning.runtime.errors import UserError

ROWS = [{"prompt": "request 1", "response": "answer\n1"}, {"prompt": "request 2", "response": "answer 2"}]
KINDS = (".json", ".jsonl", ".ndjson")


def read(text: str, kind: str) -> list[dict[str, object]]:
    return [row for _, row in json_rows(text, "a", kind)]


@pytest.mark.slow
@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.booleans() | st.none(), min_size=1),
        min_size=1,
        max_size=4,
    )
)
def test_every_form_is_read_under_every_suffix(rows: list[dict[str, object]]) -> None:
    lines = [json.dumps(row) for row in rows]
    forms = [
        "\n".join(lines), "\r\n\r\n".join(lines), "\n\n" + "\n".join(lines) + "\n\n", json.dumps(rows),
        json.dumps(rows, indent=1), "[" + ",\n".join(lines) + "]\n", "[\n" + "\n,".join(lines) + "\n]",
    ]  # fmt: skip
    for form in forms:
        for kind in KINDS:
            assert read(form, kind) == rows


DEEP = '{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}"
LONG = '{"prompt": ' + "9" * 6000 + "}"
TWICE = '{"prompt": "a", "response": "b", "prompt": "c"}'
GOOD = '{"prompt": "a"}'
DEFECTS = {
    "JSON nested too deeply": DEEP,
    "a number of more than 4300 digits": LONG,
    "two columns are called 'prompt'": TWICE,
    "not a JSON object but a number": "5",
    "not a JSON object but a list": "[1]",
    "not a JSON object but null": "null",
    "broken JSON": '{"prompt": "a"',
}


@pytest.mark.slow
@pytest.mark.parametrize("problem", DEFECTS)
def test_a_defect_is_one_sentence_with_its_line(tmp_path: Path, problem: str) -> None:
    defect = DEFECTS[problem]
    for kind in KINDS:
        for text in (f"{GOOD}\n\n{defect}\n", f"[{GOOD},\n\n{defect}]\n", f"[\n\n{defect},\n{GOOD}]"):
            (tmp_path / f"a{kind}").write_text(text)
            with pytest.raises(UserError) as error:
                read_records(str(tmp_path / f"a{kind}"), Reading({"p": "prompt"}), dict)
            assert re.search(rf"a{re.escape(kind)}, line [34](, row \d)?: {problem}.* Fix: [^\n]*$", str(error.value))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["5", '"x"', "null", "true", "[5]", "{", "[", "]", "{} x", '[{"a": 1}', '[{"a": 1},]'])
def test_a_file_without_rows_is_one_sentence_with_its_line(text: str, kind: str) -> None:
    with pytest.raises(UserError, match=r"^a, line 1(, row 1)?: .*\. Fix: [^\n]*$"):
        read(text, kind)


def test_columns_and_single_objects() -> None:
    columns = json.dumps({"prompt": ["request 1", "request 2"], "response": ["answer\n1", "answer 2"], "inputs": []})
    assert read(columns, ".json") == read(json.dumps(json.loads(columns), indent=1), ".json") == ROWS
    for kind in KINDS:
        assert read(json.dumps(ROWS[0]), kind) == read(json.dumps(ROWS[0], indent=1), kind) == ROWS[:1]
    for text in ('{"a": [1], "b": [1, 2]}', '{"a": []}', "{}"):
        with pytest.raises(UserError, match=r"^a, line 1: a JSON file must hold a list of objects"):
            read(text, ".json")


def test_a_broken_first_line_is_the_first() -> None:
    for text in ('{"a": \n{"a": 1}\n', '{"a": 1} {"a": 2}\n{"a": 3}\n'):
        with pytest.raises(UserError, match=r"^a, line 1: broken JSON"):
            read(text, ".jsonl")
