import csv
import io
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.data.sources import records
from llmos_cli.data.sources.records import (
    BadRecord,
    Raw,
    decode,
    parse_columns,
    parse_json,
    read_csv,
    read_lines,
    split_csv,
)


def blocks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=6), st.integers(1, 30))
def test_lines_are_the_same_however_the_bytes_come(lines: list[bytes], size: int) -> None:
    data = b"".join(line + b"\n" for line in lines)
    found = list(read_lines(blocks(data, size), 0, 1))
    assert [raw.data for raw in found] == lines
    assert [raw.number for raw in found] == list(range(1, len(lines) + 1))
    assert all(data[raw.offset :].startswith(line) for raw, line in zip(found, lines, strict=True))


def test_a_last_line_without_an_end_is_a_line() -> None:
    assert [raw.data for raw in read_lines(iter([b"a\nb", b"c"]), 0, 1)] == [b"a", b"bc"]


def test_a_line_over_the_limit_is_told_and_the_next_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_BYTES", 8)
    found = list(read_lines(blocks(b"short\n" + b"x" * 100 + b"\nafter\n", 5), 0, 1))
    assert found == [Raw(b"short", 0, 1), Raw(None, 6, 2), Raw(b"after", 107, 3)]
    with pytest.raises(BadRecord, match="is longer than"):
        decode(found[1])


ROWS = st.lists(st.tuples(*[st.text(st.sampled_from('ab,"\n 好'), max_size=6)] * 2).filter(any), max_size=5)


@given(ROWS, st.integers(1, 20))
def test_what_pythons_csv_writes_is_read_back(rows: list[tuple[str, str]], size: int) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    found = [split_csv(decode(raw)) for raw in read_csv(blocks(file.getvalue().encode(), size), 0, 1)]
    assert found == [list(row) for row in rows]


def test_windows_line_ends_and_a_byte_order_mark_are_not_text() -> None:
    found = list(read_csv(iter([b'\xef\xbb\xbflabel,review\r\n1,"a\r\nb"\r\n']), 0, 0))
    assert decode(found[0]) == "label,review"
    assert parse_columns(decode(found[1]), ("label", "review"), tabs=False) == {"label": "1", "review": "a\r\nb"}


def test_a_quote_that_never_ends_is_one_bad_record() -> None:
    """Of 3 MB; looking at all of it with every line would take hours."""
    found = list(read_csv(iter([b'1,"open\n' + b'""\n' * 1_000_000]), 0, 1))
    assert len(found) == 1
    with pytest.raises(BadRecord, match="a quote that does not end"):
        parse_columns(decode(found[0]), ("label", "review"), tabs=False)


def test_a_record_over_the_limit_is_told_and_the_next_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_BYTES", 16)
    found = list(read_csv(iter([b'1,"a\nb\ncccc\ndddddd\n2,ok\n']), 0, 1))
    assert found[0] == Raw(None, 0, 1)
    assert found[-1].data == b"2,ok"


@pytest.mark.parametrize("text", ['5" disk,"a\nb",x', '"a",5" x\n"b"', 'a"b\nc', '"a\n",5",5","\nb"'])
def test_a_quote_within_a_field_that_has_none_around_it_is_a_letter(text: str) -> None:
    """Records are cut where their fields, taken together, have no quote that is open."""
    lines, held, wanted = text.split("\n"), "", []
    for line in lines:
        held = f"{held}\n{line}" if held else line
        if split_csv(held) is not None:
            wanted.append(held)
            held = ""
    assert [decode(raw) for raw in read_csv(iter([text.encode()]), 0, 1)] == wanted


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"caf\xe9", r"not UTF-8 text \(byte 0xe9 at offset 3\)"),
        (b"a\0b", "NUL byte"),
    ],
)
def test_bytes_that_are_no_text_are_told(data: bytes, why: str) -> None:
    with pytest.raises(BadRecord, match=why):
        decode(Raw(data, 0, 1))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"text": "half', "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "is (nested too deeply|not valid JSON)"),
    ],
)
def test_json_that_is_no_record_is_told(text: str, why: str) -> None:
    with pytest.raises(BadRecord, match=why):
        parse_json(text)


def test_a_row_of_another_width_is_told_and_tabs_know_no_quotes() -> None:
    assert parse_columns('a"b\t"c', ("x", "y"), tabs=True) == {"x": 'a"b', "y": '"c'}
    with pytest.raises(BadRecord, match="has 3 fields where the first line names 2"):
        parse_columns("1,2,3", ("x", "y"), tabs=False)
