"""Makes what version 2 of a snapshot looks like: python tests/golden/make_v2.py. Everything else is version 1."""

import runpy
from pathlib import Path

from llmos_cli.formats.layout import ref_key
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import decode_entry
from llmos_cli.formats.snapshot import Snapshot, encode_snapshot, name_snapshot

HERE = Path(__file__).parent
REF = RefName("golden", "v1")


def build() -> dict[str, bytes]:
    """The ref of version 1 with its log and its signature."""
    made = runpy.run_path(str(HERE / "make_v1.py"))["build"]()
    log = tuple(decode_entry(made[ref_key(REF, number)], REF, number) for number in (1, 2))
    (signature,) = [data for key, data in made.items() if key.endswith(".sig")]
    kept = tuple(sorted(move.id for move in log))
    snapshot = Snapshot(
        "2026-01-02T03:04:08.090+00:00", "ann@example:/store", {REF: log}, kept, {REF: ((2, signature),)}
    )
    data = encode_snapshot(snapshot)
    return {name_snapshot(snapshot, data).key: data}


if __name__ == "__main__":
    for key, content in build().items():
        (HERE / "v2" / key).parent.mkdir(parents=True, exist_ok=True)
        (HERE / "v2" / key).write_bytes(content)
