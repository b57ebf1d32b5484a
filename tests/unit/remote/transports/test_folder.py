"""A folder that several people write to: what the contract of all transports cannot say."""

import os
import time
import warnings
from pathlib import Path

import pytest

from llmos_cli.remote.transports.folder import FolderTransport

NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be two people")
def test_what_somebody_else_has_written_can_be_set_aside(tmp_path: Path) -> None:
    """Its time is its owner's and cannot be set; where it goes it begins anew all the same."""
    for folder in (*tmp_path.parents, tmp_path):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    (tmp_path / "nas/packs/ab").mkdir(parents=True)
    for folder in (tmp_path / "nas", tmp_path / "nas/packs", tmp_path / "nas/packs/ab"):
        folder.chmod(0o777)
    path = tmp_path / "nas/packs/ab/1.pack"
    path.write_bytes(b"bytes of a pack")
    path.chmod(0o444)
    os.utime(path, (1_000_000, 1_000_000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            FolderTransport(tmp_path / "nas").set_aside("packs/ab/1.pack", "trash/1.pack")
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    (item,) = FolderTransport(tmp_path / "nas").dated("trash/")
    assert (tmp_path / "nas/trash/1.pack").read_bytes() == b"bytes of a pack"
    assert (tmp_path / "nas/trash/1.pack").stat().st_uid == NOBODY
    assert item.time > time.time() - 600
    assert not path.exists()
