"""What rot may do to the two small files that stand above everything else: FORMAT and config.toml.

A store whose FORMAT or config.toml cannot be read does not open, so these are looked at by path. config.toml ends in a
seal, a comment with the checksum of what stands before it, because a bit that flips in a number leaves a file that
reads well. People may edit the file: then the seal no longer fits, which is worth a note and nothing more.
"""

import re
from pathlib import Path
from typing import Final

from llmos_cli.config import Config, parse_config, render_config
from llmos_cli.errors import Damaged, UnknownVersion, UsageError
from llmos_cli.formats.ids import checksum
from llmos_cli.formats.layout import FORMAT_FILE, FORMAT_TEXT, check_format
from llmos_cli.store.disk import durable
from llmos_cli.store.refs.moves import one_bit_off

CONFIG_FILE: Final = "config.toml"
_PRIVATE: Final = 0o600
_SEAL = re.compile(rb"# as written by llmos: ([0-9a-f]{16})\n\Z")


def write_config(root: Path, config: Config) -> None:
    """Write `config.toml`, for nobody else to read: it names remotes."""
    durable.write_file(root / CONFIG_FILE, sealed_config(config), mode=_PRIVATE)


def sealed_config(config: Config) -> bytes:
    """The bytes of a `config.toml`, which can be told from what rot or people make of them."""
    body = render_config(config).encode()
    return body + f"# as written by llmos: {checksum(body):016x}\n".encode()


def is_as_written(root: Path) -> bool:
    """Whether config.toml is what llmos wrote, or says nothing about that."""
    try:
        data = (root / CONFIG_FILE).read_bytes()
    except OSError:
        return True  # opening the store has already said what there is to say
    seal = _SEAL.search(data)
    return seal is None or _fits(data)


def mend_settings(root: Path) -> list[str]:
    """Put right a FORMAT or config.toml that cannot be read, where one bit has flipped; returns their names."""
    mended = []
    for name, good in ((FORMAT_FILE, _mended_format), (CONFIG_FILE, _mended_config)):
        try:
            data = (root / name).read_bytes()
        except OSError:
            continue
        better = good(data)
        if better is not None:
            durable.write_file(root / name, better, mode=_PRIVATE if name == CONFIG_FILE else None)
            mended.append(name)
    return mended


def _mended_format(data: bytes) -> bytes | None:
    """Another version's name is not damage, however near it is to ours."""
    try:
        check_format(data)
    except UnknownVersion:
        return None
    except Damaged:
        return one_bit_off(data, lambda trial: trial == FORMAT_TEXT)
    return None


def _mended_config(data: bytes) -> bytes | None:
    return None if _reads_well(data) else one_bit_off(data, lambda trial: _fits(trial) and _reads_well(trial))


def _reads_well(data: bytes) -> bool:
    try:
        parse_config(data.decode("utf-8"), CONFIG_FILE)
    except (UsageError, UnicodeDecodeError):
        return False
    return True


def _fits(data: bytes) -> bool:
    seal = _SEAL.search(data)
    return seal is not None and int(seal[1], 16) == checksum(data[: seal.start()])
