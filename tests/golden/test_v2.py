"""What version 2 of a snapshot wrote is read for ever, and what is written today is the same bytes."""

import runpy
from pathlib import Path

from llmos_cli.formats.names import RefName
from llmos_cli.formats.snapshot import decode_snapshot, encode_snapshot, parse_snapshot_name

FOLDER = Path(__file__).parent / "v2"
V1 = FOLDER.parent / "v1"


def test_the_signed_snapshot_is_read_and_written_the_same() -> None:
    (path,) = (FOLDER / "snapshots").iterdir()
    name, data = parse_snapshot_name(path.name), path.read_bytes()
    assert name is not None
    snapshot = decode_snapshot(data, name)
    assert encode_snapshot(snapshot) == data
    ((number, signature),) = snapshot.signatures[RefName("golden", "v1")]
    (file,) = V1.rglob("*.sig")
    assert (number, signature) == (2, file.read_bytes())


def test_the_files_are_those_that_are_made_today() -> None:
    made = runpy.run_path(str(FOLDER.parent / "make_v2.py"))["build"]()
    assert {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in FOLDER.rglob("*-*")} == made
