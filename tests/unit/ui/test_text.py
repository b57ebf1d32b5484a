"""How values read, and that nothing from outside can move a cursor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.ui.text import (
    count,
    duration,
    percent,
    plural,
    safe,
    safe_line,
    shorten,
    size,
    table_lines,
    when,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (12_345_678, "12.3 MB"),
        (5 * 10**12, "5.00 TB"),
        (7 * 10**18, "7000 PB"),
        (-1500, "-1.50 kB"),
    ],
)
def test_size(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200.4, "3 min 20 s"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts() -> None:
    assert count(1_234_567) == "1,234,567"
    assert (plural(1, "file"), plural(0, "file"), plural(1200, "file")) == ("1 file", "0 files", "1,200 files")
    assert (percent(1, 3), percent(1, 0)) == ("33.3 %", "-")


def test_a_time_is_shown_in_local_time_and_an_odd_one_as_it_is() -> None:
    assert len(when("2026-11-23T14:05:09+00:00")) == len("2026-11-23 14:05")
    assert when("whenever") == "whenever"


def test_escape_sequences_are_spelled_out() -> None:
    assert safe("a\x1b[2Jb") == "a\\x1b[2Jb"
    assert safe("a\r\x9b1mb\x7f") == "a\\r\\x9b1mb\\x7f"
    assert safe("evil\u202etxt.exe") == "evil\\u202etxt.exe"
    assert safe("lines\n\tstay ü 中") == "lines\n\tstay ü 中"
    assert safe_line("one\nline\t\x00") == "one\\nline\\t\\x00"


@given(st.text(alphabet=st.characters()))
def test_a_safe_line_has_no_control_characters(text: str) -> None:
    shown = safe_line(text)
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in shown)
    assert safe_line(shown) == shown


@given(st.text(max_size=40), st.integers(1, 50))
def test_a_shortened_text_fits_and_keeps_its_ends(text: str, width: int) -> None:
    shown = shorten(text, width)
    assert len(shown) == min(len(text), width)
    if len(text) <= width:
        assert shown == text
    elif width > 4:
        assert (shown[0], shown[-1]) == (text[0], text[-1])


def test_a_table_aligns_its_columns() -> None:
    assert table_lines(["ref", "size"], [["a:latest", "1 B"], ["b", "12 kB"]], right=frozenset({1})) == [
        "REF        SIZE",
        "a:latest    1 B",
        "b         12 kB",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table_lines(["ref", "size"], []) == ["REF  SIZE"]


@pytest.mark.parametrize("width", [80, 60, 40])
def test_a_table_fits_its_width(width: int) -> None:
    rows = [["a-rather-long-model-name-for-a-test:quantized-v2", "checkpoint", "3f2a9c0112aa", "12.3 GB"]]
    lines = table_lines(["ref", "kind", "id", "size"], rows, right=frozenset({3}), width=width)
    assert max(map(len, lines)) <= width
    assert "12.3 GB" in lines[1]


def test_a_narrow_table_leaves_out_what_can_be_spared_and_keeps_ids_whole() -> None:
    columns = ["ref", "id", "when", "what"]
    rows = [["a-name:latest", "3f2a9c0112aa", "2026-11-23 14:05", "a long message " * 3]]
    spare = frozenset({2})
    assert "2026-11-23 14:05" in table_lines(columns, rows, spare=spare, width=100)[1]
    line = table_lines(columns, rows, spare=spare, width=50)[1]
    assert "2026" not in line
    assert "3f2a9c0112aa" in line
    assert len(line) <= 50


def test_a_table_is_not_cut_on_a_pipe_and_survives_a_tiny_terminal() -> None:
    rows = [["x" * 200, "y"]]
    assert table_lines(["a", "b"], rows)[1] == "x" * 200 + "  y"
    assert table_lines(["a", "b"], rows, width=1)[1].startswith("xx..xx")


def test_a_cell_stays_on_its_line() -> None:
    assert table_lines(["a"], [["two\nlines"]])[1] == "two\\nlines"
