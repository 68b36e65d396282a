"""Reading rows: the forms of real files, and errors that name file and line."""

import gzip
import json
import lzma
import os
import socket
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import DictConfig, OmegaConf

from lisa_lightning.data.files import content_hash, read_records
from lisa_lightning.data.reading import Reading
from lisa_lightning.data.source import Row, load_rows
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.task.agnews import AGNews
from lisa_lightning.task.alpaca import Alpaca
from lisa_lightning.task.sst2 import SST2

BOTH = Reading({"prompt": "prompt", "response": "response"})


LABELLED = Reading({"sentence": "sentence", "label": "label"})


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
        ("a.ndjson", '{"prompt": "p", "response": "r\\n2"}\n{"prompt": "q", "response": "s"}\n'),
        ("A.CSV", 'prompt,response\np,"r\n2"\nq,s\n'),
        ("bom.csv", b'\xef\xbb\xbfprompt,response\r\np,"r\n2"\r\nq,s\r\n'),
    ],
)
def test_reads_every_form(tmp_path: Path, name: str, content: str | bytes) -> None:
    found = read_records(write(tmp_path, name, content), BOTH, dict)
    assert found == [{"prompt": "p", "response": "r\n2"}, {"prompt": "q", "response": "s"}]


def test_tab_separated_files_are_not_quoted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'sentence\tlabel\nso "quoted\t1\n"odd one\t0\n')
    found = read_records(path, LABELLED, dict)
    assert [r["sentence"] for r in found] == ['so "quoted', '"odd one']


def test_columns_are_mapped_and_rows_chosen(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"q": "1", "safe": true}\n{"q": "2", "safe": false}\n')
    assert read_records(path, Reading({"prompt": "q"}, where={"safe": False}), dict) == [{"prompt": "2"}]


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
        ("a.jsonl", '{"prompt": "p", "response": ["r"]}\n', "line 1: column 'response' is no text: list"),
        ("a.jsonl", '{"prompt": 1e999, "response": "r"}\n', "line 1: column 'prompt' is no text: float inf"),
        ("a.csv", 'prompt,response\np,"r\n2"\n"q\n\n",s,t\n', "line 4: 3 cells where the header has 2"),
        ("a.jsonl", '{"prompt": NaN, "response": "r"}\n', "line 1: column 'prompt' is no text: float nan"),
        ("a.jsonl", '{"prompt": "p", "response": "r\\ud83d"}\n', "line 1: column 'response' holds half of a character"),
        ("a.xlsx", "x", "files of kind '.xlsx' can't be read; allowed: .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read_records(path, BOTH, dict)
    assert sentence in str(error.value)
    assert path in str(error.value)


def test_a_path_that_is_no_regular_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is no regular file ends in one sentence. A pipe would hang, and a device has no end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo("pipe.csv")
    Path("device.csv").symlink_to("/dev/zero")
    Path("broken.csv").symlink_to("none")
    Path("loop.csv").symlink_to("loop.csv")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.csv")
    problems = {
        "none.jsonl": "No such file or directory",
        "none.xyz": "No such file or directory",
        "folder.csv": "a directory, not a regular file",
        "pipe.csv": "a pipe, not a regular file",
        "device.csv": "a device, not a regular file",
        "socket.csv": "a socket, not a regular file",
        "/dev/zero": "a device, not a regular file",
        "broken.csv": "it is a link to none, which is missing",
        "loop.csv": "Too many levels of symbolic links",
        "~no.such.user/rows.csv": "no home directory for its first part",
        "a\0b.csv": "embedded null byte in the path",
        "x" * 300 + ".csv": "File name too long",
        "a\nb.csv": "No such file or directory",
    }
    for path, problem in problems.items():
        with pytest.raises(UserError) as error:
            read_records(path, BOTH, dict)
        assert f": can't be read ({problem}). Fix: " in str(error.value)
        assert "\n" not in str(error.value)
        assert content_hash(path) == ""


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    for name, text in (
        ("a.csv", "prompt,response\np,one\u2028two\n"),
        ("a.tsv", "prompt\tresponse\np\tone\u2028two\n"),
    ):
        assert read_records(write(tmp_path, name, text), BOTH, dict)[0]["response"] == "one\u2028two"


def test_a_wrong_label_is_named_with_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", "sentence\tlabel\ngood\t1\nbad\t2\n")
    with pytest.raises(
        UserError, match=r"a\.tsv, line 3: label '2' of an SST-2 row; allowed: 0, 1, negative, positive"
    ):
        read_records(path, LABELLED, SST2().row)


PACKERS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}
CONTENT = {
    ".jsonl": b'{"prompt": "p", "response": "r\\n2"}\n{"prompt": "q", "response": "s"}\n',
    ".json": b'{"prompt": ["p", "q"], "response": ["r\\n2", "s"], "inputs": []}',
    ".csv": b'# where it is from\n# and what it is\nprompt,response\np,"r\n2"\nq,s\n',
    ".tsv": b"prompt\tresponse\np\tr 2\nq\ts\n",
}


def parquet() -> bytes:
    out = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p", "q"], "response": ["r\n2", "s"]}), out)
    return out.getvalue()


@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [*CONTENT, ".parquet"])
def test_every_kind_plain_and_packed(tmp_path: Path, kind: str, packed: str) -> None:
    data = CONTENT[kind] if kind in CONTENT else parquet()
    suffix = f"{kind}{packed}"
    path = write(
        tmp_path, f"a{suffix.upper() if packed == '.gz' else suffix}", PACKERS[packed](data) if packed else data
    )
    found = read_records(path, BOTH, dict)
    assert [r["prompt"] for r in found] == ["p", "q"]
    assert found[0]["response"].split() == ["r", "2"]


@pytest.mark.parametrize("packed", PACKERS)
def test_a_broken_packed_file_is_named(tmp_path: Path, packed: str) -> None:
    whole = PACKERS[packed](CONTENT[".jsonl"] * 1000)
    for data in (whole[: len(whole) // 2], whole[:-1], whole[:1], b"not packed at all"):
        with pytest.raises(UserError, match=r"a\.jsonl\.\w+: can't be read \("):
            read_records(write(tmp_path, f"a.jsonl{packed}", data), BOTH, dict)
    for data in (b"", PACKERS[packed](b"")):
        with pytest.raises(UserError, match=r"a\.jsonl\.\w+: the file is empty"):
            read_records(write(tmp_path, f"a.jsonl{packed}", data), BOTH, dict)


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet: can't be read \("):
        read_records(write(tmp_path, "a.parquet", parquet()[:-9]), BOTH, dict)


def test_columns_are_joined_and_named_where_there_is_no_header(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '3,"Title, of it","said ""so"""\n1,Other,text\n')
    reading = Reading(
        {"text": ["title", "description"], "label": "class"}, labels={"label": {"1": "World", "3": "Biz"}}
    )
    found = read_records(path, reading, dict, header=["class", "title", "description"])
    assert found == [{"text": 'Title, of it said "so"', "label": "Biz"}, {"text": "Other text", "label": "World"}]
    with pytest.raises(UserError, match=r"a\.csv, line 1: label '3' is not among its labels: 1"):
        read_records(path, Reading({"label": "a"}, labels={"label": {"1": "World"}}), dict, header=["a", "b", "c"])


def test_a_first_line_that_looks_like_a_comment_is_a_row_where_there_is_no_header(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "# Sum up,no\nplain,yes\n")
    assert [r["a"] for r in read_records(path, Reading({"a": "a"}), dict, header=["a", "b"])] == ["# Sum up", "plain"]


def test_a_shipped_file_can_be_read_in_part(tmp_path: Path) -> None:
    asked = Reading({"prompt": "prompt"})
    whole, part = (read_records(f"embedded:harmful_prompts.jsonl{n}", asked, dict) for n in ("", "[:150]"))
    assert (len(whole), part) == (182, whole[:150])


def test_a_file_of_ones_own_is_read_whole_in_place_of_a_shipped_part(config: Callable[..., DictConfig]) -> None:
    """A user's file is read completely, although the default takes a part of its own file."""
    source = config("source.harmful_prompts.path=mine.jsonl", "source.test.path=mine.csv").source
    assert {name: entry.take for name, entry in source.items() if entry.take is not None} == {}


def test_polarity_is_turned_by_labels_and_rows_are_kept_by_values(tmp_path: Path) -> None:
    content = "".join(json.dumps({"p": str(i), "safe": v}) + "\n" for i, v in enumerate((True, False, 1, "0", "False")))
    path = write(tmp_path, "a.jsonl", content)
    labels = {"harmful": {"true": "no", "1": "no", "false": "yes", "0": "yes"}}
    found = read_records(path, Reading({"harmful": "safe"}, labels=labels), dict)
    assert [r["harmful"] for r in found] == ["no", "yes", "no", "yes", "yes"]
    kept = read_records(path, Reading({"p": "p"}, where={"safe": ["false", 0]}), dict)
    assert [r["p"] for r in kept] == ["1", "3", "4"]


def test_a_missing_or_null_input_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"p": "1", "input": "x"}\n{"p": "2", "input": null}\n{"p": "3"}\n')
    found = read_records(path, Reading({"p": "p", "input": "input"}, optional=frozenset({"input"})), dict)
    assert [r["input"] for r in found] == ["x", "", ""]


def test_lines_are_counted_behind_comments_and_inside_cells(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '# one\n# two\nprompt,response\np,"r\n2\n3"\nq,s,t\n')
    with pytest.raises(UserError, match=r"a\.csv, line 7: 3 cells where the header has 2"):
        read_records(path, BOTH, dict)
    with pytest.raises(UserError, match="line 1: two columns are called 'a'"):
        read_records(write(tmp_path, "b.csv", "a,a\n1,2\n"), Reading({"a": "a"}), dict)


def test_a_very_long_cell_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt,response\np," + "x" * 200_000 + "\n")
    assert len(read_records(path, BOTH, dict)[0]["response"]) == 200_000


PAIRED = '{{"prompt": "{0}", "response": "r"}}\n'
SENTENCE = '{{"sentence": "{0}", "label": 1}}\n'


@pytest.fixture
def source(tmp_path: Path) -> Any:
    """Return sets that share prompts in every way, once with other blanks and capitals."""
    contents = {
        "train": "".join(map(SENTENCE.format, ("seen", "new"))),
        "test": SENTENCE.format("Seen "),
        "alignment": "".join(map(PAIRED.format, ("a", "h1", "h2", "B"))),
        "harmful": "".join(map(PAIRED.format, ("b", "h1"))),
        "harmful_prompts": '{"prompt": "H1"}\n{"prompt": "h1"}\n',
        "harmless_prompts": '{"prompt": "h2"}\n',
    }
    entry = {"header": None, "columns": None, "labels": None, "where": None, "skip": 0, "take": None}
    return OmegaConf.create(
        {name: entry | {"path": write(tmp_path, f"{name}.jsonl", text)} for name, text in contents.items()}
    )


def test_no_prompt_is_in_two_sets(source: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = load_rows(source, SST2(), allow_overlap=False)
    assert [r.context for r in rows.train] == ["new"]
    assert [r.instruction for r in rows.alignment] == ["a"]
    assert [r.instruction for r in rows.harmful] == ["b"]
    assert rows.harmful_prompts == {"": ["H1", "h1"]}  # asked as often as the set has it
    overlap = {
        "train_test": 1, "alignment_harmful_prompts": 1, "alignment_harmless_prompts": 1, "alignment_harmful": 2,
        "harmful_harmful_prompts": 1,
    }  # fmt: skip
    assert rows.overlap == overlap
    assert "1 of train also in test" in caplog.text
    assert caplog.text.rstrip().endswith("left out.")


def test_defender_rows_share_no_prompt_either(source: Any) -> None:
    source.defender = source.alignment
    assert [r.instruction for r in load_rows(source, SST2(), allow_overlap=False, defender=True).defender] == ["a"]
    assert load_rows(source, SST2(), allow_overlap=False).defender == []


def test_overlap_is_kept_and_told_where_it_is_allowed(source: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = load_rows(source, SST2(), allow_overlap=True)
    assert [len(x) for x in (rows.train, rows.alignment, rows.harmful)] == [2, 4, 2]
    assert sum(rows.overlap.values()) == 6
    assert caplog.text.rstrip().endswith("kept.")


def test_a_set_that_overlaps_wholly_is_refused_with_the_way_out(source: Any) -> None:
    source.train.path = source.test.path
    with pytest.raises(
        UserError, match=r"source\.train: every prompt is also in test or .*Fix: .*data\.allow_overlap=true"
    ):
        load_rows(source, SST2(), allow_overlap=False)


@pytest.mark.parametrize("strip", [True, False])
def test_white_space_around_texts_stays_only_if_it_is_to(source: Any, tmp_path: Path, strip: bool) -> None:
    text = " a film\t"
    fields = {"sentence": text, "text": text, "label": 1, "instruction": text, "input": text, "output": text}
    source.train.path = write(tmp_path, "blanks.jsonl", json.dumps(fields))
    source.test.path = write(tmp_path, "other.jsonl", json.dumps(fields | {"sentence": "b", "text": "b", "input": "b"}))
    pair = {"prompt": text, "input": text, "response": text}
    source.alignment.path = write(tmp_path, "pair.jsonl", json.dumps(pair))
    expected = text.strip() if strip else text
    for task, texts in (
        (SST2(), (expected, "positive")),
        (AGNews(), (expected, "Sports")),
        (Alpaca(), (expected, expected)),
    ):
        rows = load_rows(source, task, allow_overlap=False, strip=strip)
        assert [(row.context, row.response) for row in rows.train] == [texts]
        assert rows.alignment == [Row(text, expected, expected)]
