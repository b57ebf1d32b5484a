"""Tokenizers out of the store: tokenizer.json is the truth, tokenizer_config.json adds names and the chat template.

Always `PreTrainedTokenizerFast`: never a class that comes with the files, never the network.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerFast

from llmos_cli.errors import Damaged, LlmosError, Unsafe, from_os_error
from llmos_cli.formats import canonical
from llmos_cli.formats.manifest import FileEntry, Manifest
from llmos_cli.models.config import one_line
from llmos_cli.models.quiet import quiet
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file

TOKENIZER_FILE: Final = "tokenizer.json"
_CONFIG_FILE: Final = "tokenizer_config.json"
_FOLDER: Final = "tokenizer/"
_FILES: Final = (
    TOKENIZER_FILE,
    _CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    # what slow tokenizers were made from; kept beside tokenizer.json for the tools that want them
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
_READ: Final = _FILES[:5]
# Keys that could point the loader at other files or other code.
_DROPPED: Final = (
    "tokenizer_file", "tokenizer_object", "vocab_file", "merges_file", "gguf_file", "name_or_path", "backend",
)  # fmt: skip


def tokenizer_entries(manifest: Manifest) -> list[FileEntry]:
    """The tokenizer's files under the names a model folder gives them (a dataset's `tokenizer/x` becomes `x`)."""
    folder = _folder(manifest)
    found = ((name, manifest.file(folder + name)) for name in _FILES)
    return [dataclasses.replace(entry, path=name) for name, entry in found if entry is not None]


def load_tokenizer(store: Store, manifest: Manifest) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, checkpoint, dataset or tokenizer manifest."""
    files = {entry.path: read_file(store, entry) for entry in tokenizer_entries(manifest) if entry.path in _READ}
    if TOKENIZER_FILE not in files:
        raise LlmosError(
            f"this {manifest.kind} has no {TOKENIZER_FILE}",
            hint="save a fast tokenizer (tokenizer.save_pretrained) beside the model and add the folder again",
        )
    files[_CONFIG_FILE] = _clean_config(files.get(_CONFIG_FILE, b"{}"))
    try:
        # transformers reads tokenizers from a folder only; the system's, because a store may be read-only.
        with tempfile.TemporaryDirectory(prefix="llmos-tokenizer-") as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            with quiet():
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except OSError as exc:
        raise from_os_error(exc, "loading a tokenizer") from exc
    except Exception as exc:  # the Rust library raises bare Exception
        raise Damaged(f"{TOKENIZER_FILE} is not a valid tokenizer: {one_line(exc)}") from exc
    tokenizer.name_or_path = ""
    return tokenizer


def _clean_config(data: bytes) -> bytes:
    values = canonical.loads(data, _CONFIG_FILE)
    if not isinstance(values, dict):
        raise Damaged(f"{_CONFIG_FILE} is not a table")
    if values.get("auto_map"):
        raise Unsafe(
            f"{_CONFIG_FILE} asks to run code that comes with the tokenizer (auto_map)",
            hint="llmos uses tokenizer.json only; remove auto_map if that file is enough",
        )
    return json.dumps({key: value for key, value in values.items() if key not in _DROPPED}).encode()


def _folder(manifest: Manifest) -> str:
    return "" if manifest.file(TOKENIZER_FILE) is not None or manifest.kind != "dataset" else _FOLDER
