"""Parquet: row groups as ranges of rows, rows as records, through pyarrow (the extra `parquet`).

Only the columns that are asked for are read, a few hundred rows at a time; columns of text stay as the dictionary they
may be stored as, so that a file cannot make one long text into a million.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from llmos_cli.data.sources.streams import MOST_TIMES, SMALL_BYTES, Unreadable
from llmos_cli.errors import UsageError
from llmos_cli.formats.limits import MiB

_ROWS: Final = 256
_GROUP_BYTES: Final = 4096 * MiB
_BOMB: Final = f"unpacks to more than {MOST_TIMES} times its size, which no text does"


def row_groups(path: Path) -> tuple[list[int], tuple[str, ...], int]:
    """How many rows each row group has, the columns, and the bytes they unpack to; raises Unreadable."""
    file = _opened(path)
    meta = file.metadata
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)
    if any(group.total_byte_size > _GROUP_BYTES for group in groups):
        raise Unreadable(f"has a row group that unpacks to more than {_GROUP_BYTES // MiB} MiB")
    if size > max(SMALL_BYTES, MOST_TIMES * path.stat().st_size):
        raise Unreadable(_BOMB)
    return [group.num_rows for group in groups], tuple(file.schema_arrow.names), size


def read_rows(path: Path, start: int, stop: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of row groups `start` to `stop`, those columns that there are; raises Unreadable."""
    import pyarrow as pa

    file = _opened(path, columns)
    done, most = 0, max(SMALL_BYTES, MOST_TIMES * path.stat().st_size)
    names = [name for name in file.schema_arrow.names if name in columns]
    try:
        for batch in file.iter_batches(batch_size=_ROWS, row_groups=range(start, stop), columns=names):
            held = [batch.column(name) for name in names]
            for row in range(batch.num_rows):
                fields = {name: column[row].as_py() for name, column in zip(names, held, strict=True)}
                done += sum(len(value) for value in fields.values() if isinstance(value, str))
                if done > most:
                    raise Unreadable(_BOMB)
                yield fields
    except (pa.ArrowException, OSError) as exc:
        raise Unreadable(f"is damaged: {str(exc)[:200]}") from exc


def _opened(path: Path, columns: Sequence[str] = ()) -> Any:
    if find_spec("pyarrow") is None:
        raise UsageError(f"{path} is Parquet, which needs pyarrow", hint="pip install 'llmos[parquet]'")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        plain = pq.ParquetFile(path)
        texts = [
            field.name
            for field in plain.schema_arrow
            if field.name in columns and (pa.types.is_string(field.type) or pa.types.is_binary(field.type))
        ]
        return pq.ParquetFile(path, read_dictionary=texts) if texts else plain
    except (pa.ArrowException, OSError) as exc:
        raise Unreadable(f"is not a Parquet file that can be read: {str(exc)[:200]}") from exc
