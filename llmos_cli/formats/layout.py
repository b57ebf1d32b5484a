"""Where things lie in a store or a remote, and the `FORMAT` file that says which version wrote it."""

import re
from typing import Final

from llmos_cli.errors import Damaged, UnknownVersion
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import RefName
from llmos_cli.formats.reflog import entry_name

FORMAT_FILE: Final = "FORMAT"
FORMAT_TEXT: Final = b"llmos 1\n"
PACKS: Final = "packs"
REFS: Final = "refs"
PACK_SUFFIX: Final = ".pack"
ADOPTED: Final = "adopted"
SNAPSHOTS: Final = "snapshots"
TRASH: Final = "trash"
_FORMAT = re.compile(rb"llmos ([!-~]{1,64})\n\Z")


def check_format(data: bytes) -> None:
    """Accept the `FORMAT` of this version; raises UnknownVersion for another one, Damaged for anything else."""
    if data == FORMAT_TEXT:
        return
    match = _FORMAT.match(data)
    if match:
        name = match[1].decode("ascii")
        raise UnknownVersion(f"the store has the unknown format {name!r}; this llmos reads 1", hint="use a newer llmos")
    raise Damaged("the store's FORMAT file is damaged", hint="it should hold the one line 'llmos 1'")


def pack_key(name: ObjectId) -> str:
    text = str(name)
    return f"{PACKS}/{text[:2]}/{text}{PACK_SUFFIX}"


def trash_key(name: ObjectId) -> str:
    return f"{TRASH}/{name}{PACK_SUFFIX}"


def adopted_key(name: ObjectId) -> str:
    text = str(name)
    return f"{ADOPTED}/{text[:2]}/{text}"


def ref_key(ref: RefName, sequence: int) -> str:
    return f"{REFS}/{ref.name}/{ref.tag}/{entry_name(sequence)}"
