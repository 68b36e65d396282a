"""Tab-separated tables: quoted ones, and those with quotes as part of their texts."""

import csv
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lisa_lightning.data.tables import is_quoted, table_rows
from lisa_lightning.runtime.errors import UserError

HEADER = ["text", "label"]


def read(text: str, kind: str = ".tsv", header: list[str] | None = None) -> list[list[str]]:
    return [list(row.values()) for _, row in table_rows(text, "a.tsv", kind, header)]


def written(rows: list[list[str]], quoting: int, end: str = "\n") -> str:
    out = StringIO(newline="")
    numbers = [[text, int(label) if label.isdigit() else label] for text, label in rows]
    csv.writer(out, delimiter="\t", quoting=quoting, lineterminator=end).writerows(numbers)  # type: ignore[arg-type]
    return out.getvalue()


def excel(rows: list[list[str]]) -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in '",\t\n') else text

    return "".join("\t".join(map(cell, row)) + "\r\n" for row in rows)


def literal(rows: list[list[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "text", ['said "a" twice', '"a film" is good', '"great film"', "a\tb", "a\nb", "a\r\nb", '"', "a, b", '"a\tb"\n, c']
)
def test_texts_of_quoted_tables_are_read_unquoted(text: str) -> None:
    rows = [[text, "1"], ["plain", "0"]]
    tables = [written([HEADER, *rows], q, end) for q in (0, 1, 2) for end in ("\n", "\r\n")]
    for table in (*tables, excel([HEADER, *rows])):
        assert read(table) == rows


@pytest.mark.parametrize(
    "texts",
    [
        ['"odd one', "plain"],
        ['so "quoted', '"odd one'],
        ['"great film"', "plain"],
        ['"a film" is good', '"great film"'],
        ['"so begins', "plain", 'and so ends"'],
        ['"so begins', '"so begins'],
        ['"great, film"', "b, c"],
        ['""great""', "plain"],
        ['"', '"'],
        ['"""', "plain"],
        ['""', "plain"],
        ['"a"', '"b"'],
    ],
)
def test_tables_without_quoting_are_read_literally(texts: list[str]) -> None:
    rows = [[text, str(i % 2)] for i, text in enumerate(texts)]
    for end in ("\n", "\r\n"):
        assert read(literal([HEADER, *rows]).replace("\n", end)) == rows


QUOTABLE = st.text('ab ",\t\n', min_size=1, max_size=8)


@given(st.lists(QUOTABLE, min_size=1, max_size=5))
def test_what_a_writer_quotes_is_read_back(texts: list[str]) -> None:
    rows = [[text, str(i)] for i, text in enumerate(texts)]
    assert read(written([HEADER, *rows], csv.QUOTE_ALL)) == rows
    # Without a doubled quote, a text with a tab and a line end may look like two rows.
    assume(any('"' in text for text in texts))
    assert read(written([HEADER, *rows], csv.QUOTE_MINIMAL)) == rows
    assert read(excel([HEADER, *rows])) == rows


@given(st.lists(st.text('ab ",', min_size=1, max_size=8), min_size=1, max_size=5))
def test_a_table_that_is_not_quoted_keeps_every_row(texts: list[str]) -> None:
    rows = [[text, str(i)] for i, text in enumerate(texts)]
    table = literal([HEADER, *rows])
    assert read(table) == rows or is_quoted(table)
    # One malformed quoted cell proves that no cell is quoted.
    assert read(table + '"a" b\t1\n') == [*rows, ['"a" b', "1"]]


def test_all_texts_quoted_but_for_booleans_and_missing_values() -> None:
    assert read('"text"\t"label"\n"a"\tTrue\n"b"\tNaN\n"c"\t\n') == [["a", "True"], ["b", "NaN"], ["c", ""]]
    assert read('"a"\t"1"\n"b"\t0\n', header=HEADER) == [["a", "1"], ["b", "0"]]
    assert read('# by "me"\ntext\tlabel\n"a ""b"""\t1\n') == [['a "b"', "1"]]
    assert read('"text"\n"one\ntwo"\n') == [["one\ntwo"]]


@pytest.mark.parametrize("kind", [".tsv", ".csv"])
def test_a_row_of_several_lines_has_the_number_of_its_first(kind: str) -> None:
    table = '# comment\ntext\tlabel\n"a ""b""\nc"\t1\n\n"d\ne"\t0\nf\t1\t2\n'.replace(
        "\t", "," if kind == ".csv" else "\t"
    )
    rows = table_rows(table, "a", kind, None)
    assert [next(rows)[0], next(rows)[0]] == ["line 3", "line 6"]
    with pytest.raises(UserError, match=r"^a, line 8: 3 cells where the header has 2\. Fix: "):
        next(rows)


def test_a_large_table_is_decided_fast() -> None:
    row = 'a "charming" and often affecting journey\t1\n'
    table = literal([HEADER]) + row * 100_000
    assert not is_quoted(table)
    assert not is_quoted('"it is" a thing\t1\n' + table)
    assert is_quoted(table + '"a ""b"""\t1\n')


def test_a_name_of_two_columns_is_refused(tmp_path: Path) -> None:
    for table, header in (("a\ta\n1\t2\n", None), ("1\t2\n", ["a", "a"])):
        with pytest.raises(UserError, match="two columns are called 'a'"):
            read(table, header=header)
