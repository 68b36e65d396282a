"""Reading rows: the forms of real files, and errors that name file and line."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lisa_lightning.data.files import read_records
from lisa_lightning.data.source import load_rows
from lisa_lightning.errors import UserError
from lisa_lightning.tasks.sst2 import SST2

BOTH = {"prompt": "prompt", "response": "response"}


def write(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "p", "response": "r\\n2", "more": 1}\n\n{"prompt": "q", "response": "s"}\n'),
        ("a.json", '[{"prompt": "p", "response": "r\\n2"}, {"prompt": "q", "response": "s"}]'),
        ("a.csv", 'prompt,response\np,"r\n2"\nq,s\n'),
        ("bom.csv", b'\xef\xbb\xbfprompt,response\r\np,"r\n2"\r\nq,s\r\n'),
    ],
)
def test_reads_every_form(tmp_path: Path, name: str, content: str | bytes) -> None:
    found = read_records(write(tmp_path, name, content), BOTH, {}, dict)
    assert found == [{"prompt": "p", "response": "r\n2"}, {"prompt": "q", "response": "s"}]


def test_tab_separated_files_are_not_quoted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'sentence\tlabel\nso "quoted\t1\n"odd one\t0\n')
    found = read_records(path, {"sentence": "sentence", "label": "label"}, {}, dict)
    assert [r["sentence"] for r in found] == ['so "quoted', '"odd one']


def test_columns_are_mapped_and_rows_chosen(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"q": "1", "safe": true}\n{"q": "2", "safe": false}\n')
    assert read_records(path, {"prompt": "q"}, {"safe": False}, dict) == [{"prompt": "2"}]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", " \n", "the file is empty"),
        ("a.jsonl", b'{"prompt": "p", "response": "r"}\n\n"\xff"\n', "line 3: not UTF-8"),
        ("a.jsonl", '{"prompt": "p", "response": "r"}\n{"prompt": \n', "line 2: broken JSON"),
        ("a.jsonl", '{"prompt": "p", "response": "r"}\n[1]\n', "line 2: not a JSON object"),
        ("a.jsonl", '{"prompt": "p", "response": "r"}\n{"prompt": "q"}\n', "line 2: column 'response' is missing"),
        ("a.json", '[{"prompt": "p",\n "response": }]', "line 2: broken JSON"),
        ("a.json", '{"prompt": []}', "must hold a list"),
        ("a.csv", "prompt,answer\np,r\n", "line 2: column 'response' is missing; there are: prompt, answer"),
        ("a.csv", "prompt,response\np,r\nq\n", "line 3: 1 cells where the header has 2"),
        ("a.csv", 'prompt,response\np,"r\n', "line 2: unexpected end of data"),
        ("a.csv", "prompt,response\n", "no rows"),
        ("a.jsonl", '{"prompt": "p", "response": null}\n', "line 1: column 'response' is null"),
        ("a.xlsx", "x", "files of kind '.xlsx' can't be read; allowed: .jsonl, .json, .csv, .tsv"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read_records(path, BOTH, {}, dict)
    assert sentence in str(error.value)
    assert path in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: can't be read \(No such file"):
        read_records(str(tmp_path / "none.jsonl"), BOTH, {}, dict)


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    for name, content in (
        ("a.csv", "prompt,response\np,one\u2028two\n"),
        ("a.tsv", "prompt\tresponse\np\tone\u2028two\n"),
    ):
        assert read_records(write(tmp_path, name, content), BOTH, {}, dict)[0]["response"] == "one\u2028two"


def test_a_wrong_label_is_named_with_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "sentence\tlabel\ngood\t1\nbad\t2\n")
    with pytest.raises(
        UserError, match=r"a\.tsv, line 3: label '2' of an SST-2 row; allowed: 0, 1, negative, positive"
    ):
        read_records(path, {"sentence": "sentence", "label": "label"}, {}, SST2().row)


def test_rows_whose_prompt_is_tested_are_not_trained_on(tmp_path: Path) -> None:
    pair = '{{"prompt": "{0}", "response": "r"}}\n'
    label = '{{"sentence": "{0}", "label": 1}}\n'
    files = {
        "train": write(tmp_path, "train.jsonl", label.format("seen") + label.format("new")),
        "test": write(tmp_path, "test.jsonl", label.format("seen")),
        "alignment": write(tmp_path, "alignment.jsonl", pair.format("a") + pair.format("h1") + pair.format("h2")),
        "harmful": write(tmp_path, "harmful.jsonl", pair.format("b") + pair.format("h1")),
        "harmful_prompts": write(tmp_path, "hp.jsonl", '{"prompt": "h1"}\n{"prompt": "h1"}\n'),
        "harmless_prompts": write(tmp_path, "hl.jsonl", '{"prompt": "h2"}\n'),
    }
    entry = {"columns": None, "where": None, "skip": 0, "take": None}
    rows = load_rows(OmegaConf.create({n: entry | {"path": p} for n, p in files.items()}), SST2())
    assert [len(x) for x in (rows.task, rows.alignment, rows.harmful)] == [1, 1, 1]
    assert rows.harmful_prompts == ["h1"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [("positive", True), (" Positive\n", True), ("positive.", False), ("The answer is positive", False), ("", False)],
)
def test_sst2_counts_the_word_alone(answer: str, right: bool) -> None:
    assert SST2().correct(answer, "positive") is right
