from pathlib import Path

import pytest

from llmos_cli.data.sources import columnar
from llmos_cli.data.sources.columnar import read_rows, row_groups
from llmos_cli.data.sources.streams import Unreadable

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def written(path: Path, rows: int = 1000, group: int = 300) -> Path:
    texts = [f"review {number} 好" for number in range(rows)]
    pq.write_table(pa.table({"review": texts, "stars": list(range(rows)), "more": texts}), path, row_group_size=group)
    return path


def all_rows(path: Path) -> list[dict[str, object]]:
    rows, columns, _ = row_groups(path)
    return list(read_rows(path, 0, len(rows), columns))


def test_row_groups_are_told_and_give_their_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet")
    rows, columns, _ = row_groups(path)
    assert (rows, columns) == ([300, 300, 300, 100], ("review", "stars", "more"))
    found = list(read_rows(path, 1, 3, ("review", "stars", "none")))
    assert found[0] == {"review": "review 300 好", "stars": 300}
    assert [row["stars"] for row in found] == list(range(300, 900))


def test_a_long_text_that_repeats_is_a_bomb_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "SMALL_BYTES", 1 << 20)
    path = tmp_path / "bomb.parquet"
    table = pa.table({"text": [f"{number:04} " + "a" * (1 << 20) for number in range(16)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(Unreadable, match="unpacks to more than"):
        row_groups(path)


@pytest.mark.parametrize("damage", ["cut", "other", "flipped"])
def test_a_damaged_file_is_told(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path / "a.parquet")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[4:400] = bytes(396)
    path.write_bytes(data[:-40] if damage == "cut" else b"no parquet" if damage == "other" else bytes(data))
    with pytest.raises(Unreadable, match=r"damaged|not a Parquet file"):
        all_rows(path)


def test_one_text_that_is_in_every_row_is_a_bomb_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "SMALL_BYTES", 1 << 20)
    path = tmp_path / "bomb.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), pa.array(["ab " * 10_000]))
    pq.write_table(pa.table({"text": column}), path)
    rows, columns, _ = row_groups(path)
    seen = 0

    def read() -> None:
        nonlocal seen
        for row in read_rows(path, 0, len(rows), columns):
            seen += len(str(row["text"]))

    with pytest.raises(Unreadable, match="unpacks to more than"):
        read()
    assert 0 < seen <= max(1 << 20, 250 * path.stat().st_size)
