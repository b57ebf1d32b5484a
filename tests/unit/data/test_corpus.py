import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.data import corpus as corpora
from llmos_cli.data.corpus import Corpus, cut_point, plan_corpus, read_corpus, read_part, slices_of
from llmos_cli.data.inputs import find_inputs
from llmos_cli.data.sources import records as parsing
from llmos_cli.data.sources.records import BadRecord
from llmos_cli.data.tasks.fields import pick
from llmos_cli.errors import AccessDenied, LlmosError, UsageError
from llmos_cli.formats.ids import object_id
from llmos_cli.progress import Silent


def plan(*paths: Path, skip_bad: bool = False, progress: Silent | None = None) -> Corpus:
    progress = progress or Silent()
    inputs = find_inputs([str(path) for path in paths], progress)
    return plan_corpus(inputs, skip_bad=skip_bad, progress=progress)


def documents(corpus: Corpus, field: str = "text", bad: list[str] | None = None) -> list[str]:
    """Every document's text; bad records are told in `bad`, or are an error."""
    result = []
    for record in read_corpus(corpus, (field,)):
        try:
            if record.bad:
                raise record.bad
            if record.text is not None:
                result.append("".join(record.text))
            else:
                assert record.fields is not None
                result += pick(record.fields, "lm", {"text": field}).texts
        except BadRecord as exc:
            if bad is None:
                raise UsageError(f"{record.place} {exc}", hint=exc.hint) from exc
            bad.append(f"{record.place} {exc}")
    return result


def records(path: Path) -> list[dict[str, object]]:
    found = list(read_corpus(plan(path), ("text", "label")))
    assert not [record.bad for record in found if record.bad]
    return [record.fields for record in found if record.fields is not None]


def test_every_file_is_a_document_and_the_plan_names_its_bytes(folder: Path) -> None:
    corpus = plan(folder)
    files = [folder / "a.txt", folder / "b.md", folder / "sub" / "c.py"]
    assert documents(corpus) == [path.read_text() for path in files]
    assert [file.source.id for file in corpus.files] == [object_id(path.read_bytes()) for path in files]
    assert corpus.size == sum(path.stat().st_size for path in files)


def test_line_ends_and_white_space_stay_and_a_byte_order_mark_goes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf  one\r\ntwo \n\n")
    assert documents(plan(tmp_path / "a.txt")) == ["  one\r\ntwo \n\n"]


def test_json_lines_give_a_document_each(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\ntwo"}\r\n\n  \n{"id": 3, "text": "\\u4f60"}\n{"text": "end"}')
    assert documents(plan(path)) == ["one\ntwo", "你", "end"]


def test_another_field_may_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.NDJSON"
    path.write_text('{"body": "x", "text": "y"}\n')
    assert documents(plan(path), "body") == ["x"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"abc\0def", r"not text \(a NUL byte at offset 3\)"),
        (b"abc\xffdef", r"not UTF-8 text \(byte 0xff at offset 3\)"),
        (b"\xff\xfea\0b\0", r"byte 0xff at offset 0"),
        (b"caf\xc3", r"byte 0xc3 at offset 3"),
        (b"x" * (1 << 20) + b"\0", r"a NUL byte at offset 1048576"),
        ("é".encode() * (1 << 19) + b"a\xe2\x82", r"byte 0xe2 at offset 1048577"),
        (b"x" * ((1 << 20) - 1) + b"\xc3(", r"byte 0xc3 at offset 1048575"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_what_is_not_text_is_named_with_its_place(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UsageError, match=rf"bad\.txt.*{why}") as caught:
        plan(tmp_path / "bad.txt")
    assert "--skip-bad" in (caught.value.hint or "")


def test_a_letter_across_two_reads_is_text(tmp_path: Path) -> None:
    text = "x" * ((1 << 20) - 1) + "é" + "y"
    (tmp_path / "a.txt").write_text(text)
    assert documents(plan(tmp_path / "a.txt")) == [text]


def test_one_error_names_the_first_bad_file_and_counts_the_others(folder: Path) -> None:
    (folder / "aa.bin").write_bytes(b"\0")
    (folder / "empty").write_bytes(b"")
    with pytest.raises(UsageError, match=r"aa\.bin is not text .*, and 1 more of 5 files"):
        plan(folder)


def test_skip_bad_leaves_out_and_names_every_bad_file(folder: Path) -> None:
    (folder / "aa.bin").write_bytes(b"\0")
    (folder / "empty").write_bytes(b"")
    progress = Silent()
    corpus = plan(folder, skip_bad=True, progress=progress)
    assert [file.source.name for file in corpus.files] == ["corpus/a.txt", "corpus/b.md", "corpus/sub/c.py"]
    assert len(corpus.left_out) == 2
    assert any("aa.bin is not text" in text for text in progress.warnings)
    assert any("empty is empty" in text for text in progress.warnings)


def test_skip_bad_with_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(UsageError, match="no other file is left"):
        plan(tmp_path / "a", skip_bad=True)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nope", "is not valid JSON"),
        ('{"text": "a"', "is not valid JSON"),
        ("[1, 2]", "is not a JSON object"),
        ('{"body": "a", "id": 1}', "has no field 'text'"),
        ('{"text": 5}', "not a string"),
        ('{"text": ""}', "an empty field 'text'"),
        ('{"text": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_number(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n\n' + line + '\n{"text": "last"}\n')
    with pytest.raises(UsageError, match=rf"line 3 of .*a\.jsonl .*{why}"):
        documents(plan(path))
    left_out: list[str] = []
    assert documents(plan(path), bad=left_out) == ["first", "last"]
    assert len(left_out) == 1
    assert "line 3" in left_out[0]


def test_a_missing_field_hints_at_one_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "content": "a"}\n')
    with pytest.raises(UsageError) as caught:
        documents(plan(path))
    assert "--field content" in (caught.value.hint or "")


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert documents(plan(tmp_path / "a.jsonl")) == []


def test_a_line_over_the_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "LINE_BYTES", 2 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b" * (5 << 20)}) + "\n")
    with pytest.raises(UsageError, match=r"line 2 of .* longer than 2 MiB"):
        documents(plan(path))


def grow(path: Path) -> None:
    with path.open("a") as file:
        file.write("more")


def replace(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes().swapcase())
    path.with_suffix(".new").replace(path)


def rewrite_in_the_same_nanosecond(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes().swapcase())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def break_utf8(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"\xff" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [grow, replace, rewrite_in_the_same_nanosecond, break_utf8])
def test_a_file_that_changes_after_the_plan_is_named(folder: Path, change: object) -> None:
    corpus = plan(folder)
    change(folder / "b.md")  # type: ignore[operator]
    with pytest.raises(LlmosError, match=r"b\.md changed while it was read"):
        documents(corpus)


def test_a_file_that_grows_under_the_plan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("x" * (3 << 20))

    inputs = find_inputs([str(path)], Silent())
    size = path.stat().st_size

    def advance_and_grow(amount: int) -> None:
        if path.stat().st_size == size:
            grow(path)

    with pytest.raises(LlmosError, match="changed while it was read"):
        corpora._inspect(inputs[0], advance_and_grow)


def test_a_file_that_is_gone_after_the_plan_is_named(folder: Path) -> None:
    corpus = plan(folder)
    (folder / "b.md").unlink()
    with pytest.raises(LlmosError, match=r"b\.md"):
        documents(corpus)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(folder: Path) -> None:
    (folder / "a.txt").chmod(0)
    with pytest.raises(AccessDenied, match=r"a\.txt"):
        plan(folder, skip_bad=True)


def test_a_file_that_became_a_pipe_does_not_hang(folder: Path) -> None:
    corpus = plan(folder)
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")
    with pytest.raises(LlmosError, match=r"a\.txt is not a regular file any more"):
        documents(corpus)


@given(text=st.text(alphabet=st.sampled_from("ab1 \n\r.。é你\t"), min_size=1, max_size=400), limit=st.integers(2, 50))
def test_pieces_join_to_the_document_and_are_bounded(text: str, limit: int) -> None:
    pieces = list(corpora._pieces(split(text), limit))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.text) <= 2 * limit for piece in pieces)
    assert all(piece.text for piece in pieces)


def split(text: str) -> Iterator[str]:
    for start in range(0, len(text), 7):
        yield text[start : start + 7]


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("one two three\nfour five six seven", "one two three"),
        ("one two thr.\n four five six seven", "one two thr.\n four"),
        ("一二三四五六七八九十，一二三四五六七八九。十", "一二三四五六七八九十，一二三四五六七八九"),
        ("a" * 40, "a" * 20),
        ("." * 19 + " " * 20, "." * 19 + " "),
    ],
)
def test_a_long_document_is_cut_before_white_space_that_follows_a_word(text: str, piece: str) -> None:
    assert text[: cut_point(text, 0, 20)] == piece


TABLE = 'label,text\r\n1,"one, ""two""\nthree"\r\n0,5" disk\r\n\r\n1,你好\r\n'
ROWS = [
    {"label": "1", "text": 'one, "two"\nthree'},
    {"label": "0", "text": '5" disk'},
    {"label": "1", "text": "你好"},
]


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_csv_is_read_as_spreadsheets_write_it(tmp_path: Path, start: str) -> None:
    (tmp_path / "a.csv").write_bytes((start + TABLE).encode())
    assert records(tmp_path / "a.csv") == ROWS


def test_packed_files_hold_what_they_were_made_from(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(TABLE.encode()) + gzip.compress(b"0,more\n"))
    assert records(tmp_path / "a.csv.gz") == [*ROWS, {"label": "0", "text": "more"}]
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"plain text"))
    assert documents(plan(tmp_path / "b.txt.zst")) == ["plain text"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst"])
def test_a_packed_file_that_is_cut_short_is_named(tmp_path: Path, name: str) -> None:
    text = json.dumps({"text": os.urandom(5000).hex()}).encode()
    packed = gzip.compress(text) if name.endswith("gz") else zstandard.compress(text)
    (tmp_path / name).write_bytes(packed[:-20])
    with pytest.raises(UsageError, match=name):
        plan(tmp_path / name)


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b" " * (70 << 20)))
    with pytest.raises(UsageError, match="unpacks to more than 250 times its size"):
        plan(tmp_path / "a.txt.gz")


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", "two", "你好"], "label": [1, 0, 1], "other": [b"", b"", b""]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    corpus = plan(tmp_path / "a.parquet")
    assert records(tmp_path / "a.parquet") == table.select(["text", "label"]).to_pylist()
    assert [record.origin for record in read_corpus(corpus, ("text",))] == [(0, 0, 1), (0, 0, 2), (0, 0, 3)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_parts_of_a_large_file_give_its_records_each_alone(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{number} " + "x" * (number % 97) for number in range(500)]
    if name == "a.jsonl":
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    else:
        end = '\n"' if name == "a.csv" else ""
        text = "text\n" + "".join(f'"{line}{end}\n' if end else f"{line}\n" for line in lines)
    (tmp_path / name).write_text(text)
    whole = [(record.origin, record.fields) for record in read_corpus(plan(tmp_path / name), ())]
    monkeypatch.setattr(corpora, "SLICE_BYTES", 1000)
    corpus = plan(tmp_path / name)
    slices = slices_of(corpus)
    assert len(slices) > 10
    found = [
        (record.origin, record.fields)
        for parts in reversed(slices)
        for number, part in parts
        for record in reversed(list(read_part(corpus.files[number], number, part, ())))
    ]
    assert found[::-1] == whole
    assert len(whole) == 500
    data = (tmp_path / name).read_bytes()
    assert all(data[offset - 1 : offset] in (b"\n", b"") for (_, offset, _), _ in whole)
