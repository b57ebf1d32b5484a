"""Manifests: canonical JSON that names the files of one dataset, model, checkpoint, adapter, tokenizer or report.

A manifest's id is its version. It carries no time and no host, so that equal work gives an equal id.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from llmos_cli.errors import Damaged, UnknownVersion, UsageError
from llmos_cli.formats import canonical, limits
from llmos_cli.formats.canonical import Json
from llmos_cli.formats.ids import ID_BYTES, ObjectId, object_id, parse_id
from llmos_cli.formats.names import check_paths

VERSION: Final = 1
KINDS: Final = ("adapter", "checkpoint", "dataset", "files", "model", "report", "tokenizer")


@dataclass(frozen=True)
class Chunk:
    """A run of a file's bytes, named by the id of its plain bytes."""

    id: ObjectId
    size: int


@dataclass(frozen=True)
class FileEntry:
    """One file: its chunks in order are its bytes."""

    path: str
    chunks: tuple[Chunk, ...]

    @property
    def size(self) -> int:
        return sum(chunk.size for chunk in self.chunks)


@dataclass(frozen=True)
class Source:
    """An input that is not in the store: the name it was given by, its size in bytes, the BLAKE3-256 of its bytes."""

    name: str
    size: int
    id: ObjectId


@dataclass(frozen=True)
class Recipe:
    """How an object was made: enough to make it again, and to know that it was made already.

    `inputs` are manifest ids by role ("data", "model", "tokenizer"); `params` is the resolved configuration;
    `tools` the versions that decide the bytes.
    """

    command: str
    params: Mapping[str, Json] = field(default_factory=dict)
    inputs: Mapping[str, ObjectId] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    seed: int | None = None
    tools: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """`meta` holds small facts about the content by kind (counts, dtypes, metrics), shown by `llmos show`."""

    kind: str
    files: tuple[FileEntry, ...]
    meta: Mapping[str, Json] = field(default_factory=dict)
    recipe: Recipe | None = None

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files)

    def file(self, path: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.path == path), None)


def recipe_key(recipe: Recipe) -> ObjectId:
    """The id of a recipe: equal inputs, parameters and tools give an equal key."""
    return object_id(canonical.encode(_recipe_to_json(recipe)))


def encode_manifest(manifest: Manifest) -> bytes:
    """The one byte string of a manifest, files sorted by path; what it returns, `decode_manifest` reads.

    Raises Unsafe for a path, UsageError for more than the limits allow, ValueError for a bug in the caller.
    """
    if manifest.kind not in KINDS:
        raise ValueError(f"unknown kind {manifest.kind!r}")
    if not all(0 < chunk.size <= limits.CHUNK_BYTES for entry in manifest.files for chunk in entry.chunks):
        raise ValueError("a chunk is empty or over the limit")
    check_paths(entry.path for entry in manifest.files)
    data = canonical.encode(
        {
            "files": [
                {"chunks": [[str(chunk.id), chunk.size] for chunk in entry.chunks], "path": entry.path}
                for entry in sorted(manifest.files, key=lambda entry: entry.path)
            ],
            "kind": manifest.kind,
            "meta": dict(manifest.meta),
            "recipe": None if manifest.recipe is None else _recipe_to_json(manifest.recipe),
            "version": VERSION,
        }
    )
    if len(data) > limits.MANIFEST_BYTES or len(manifest.files) > limits.MANIFEST_FILES:
        raise UsageError(
            f"a manifest of {len(manifest.files)} files and {len(data)} bytes is over the limits",
            hint="store the folder in several parts",
        )
    return data


def decode_manifest(data: bytes) -> Manifest:
    """Read a manifest strictly; raises UnknownVersion, Damaged (structure) or Unsafe (a path)."""
    if len(data) > limits.MANIFEST_BYTES:
        raise Damaged(f"a manifest of {len(data)} bytes is over the limit of {limits.MANIFEST_BYTES}")
    value = canonical.loads(data, "manifest")
    if isinstance(value, dict) and isinstance(value.get("version"), int) and value["version"] != VERSION:
        raise UnknownVersion(f"manifest version {value['version']} is unknown", hint="use a newer llmos")
    canonical.check_canonical(value, data, "manifest")
    top = _table(value, {"files", "kind", "meta", "recipe", "version"}, "manifest")
    if type(top["version"]) is not int:
        raise Damaged("manifest version is not a number")
    if top["kind"] not in KINDS:
        raise UnknownVersion(f"manifest kind {str(top['kind'])[:40]!r} is unknown", hint="use a newer llmos")
    files = _list(top["files"], "files")
    if len(files) > limits.MANIFEST_FILES:
        raise Damaged(f"a manifest names {len(files)} files, over the limit of {limits.MANIFEST_FILES}")
    entries = tuple(_file_from_json(item) for item in files)
    paths = [entry.path for entry in entries]
    if paths != sorted(paths):
        raise Damaged("manifest files are not sorted by path")
    check_paths(paths)
    meta = top["meta"]
    if not isinstance(meta, dict):
        raise Damaged("manifest meta is not a table")
    return Manifest(top["kind"], entries, meta, None if top["recipe"] is None else _recipe_from_json(top["recipe"]))


def listed_chunks(data: bytes) -> list[bytes]:
    """The ids of the chunks of a manifest whose bytes are proven by its own, two orders of magnitude faster than
    `decode_manifest`: what is not as a writer of this version leaves it is read strictly."""
    try:
        top = json.loads(data)
        if type(top["version"]) is int and top["version"] == VERSION:
            digits = [pair[0] for entry in top["files"] for pair in entry["chunks"]]
            ids = bytes.fromhex("".join(digits))
            if set(map(len, digits)) <= {2 * ID_BYTES} and len(ids) == ID_BYTES * len(digits):
                return [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        pass
    return [chunk.id for entry in decode_manifest(data).files for chunk in entry.chunks]


def _recipe_to_json(recipe: Recipe) -> dict[str, Json]:
    return {
        "command": recipe.command,
        "inputs": {role: str(oid) for role, oid in recipe.inputs.items()},
        "params": dict(recipe.params),
        "seed": recipe.seed,
        "sources": [[source.name, source.size, str(source.id)] for source in recipe.sources],
        "tools": dict(recipe.tools),
    }


def _recipe_from_json(value: Json) -> Recipe:
    table = _table(value, {"command", "inputs", "params", "seed", "sources", "tools"}, "recipe")
    command, seed, params = table["command"], table["seed"], table["params"]
    inputs, tools = table["inputs"], table["tools"]
    if not isinstance(command, str) or not isinstance(params, dict) or not (seed is None or type(seed) is int):
        raise Damaged("manifest recipe has a field of the wrong type")
    if (
        not isinstance(inputs, dict)
        or not isinstance(tools, dict)
        or not all(isinstance(v, str) for v in tools.values())
    ):
        raise Damaged("manifest recipe has a field of the wrong type")
    sources = []
    for item in _list(table["sources"], "sources"):
        if not isinstance(item, list) or len(item) != 3 or not isinstance(item[0], str):
            raise Damaged("manifest recipe has a malformed source")
        sources.append(Source(item[0], _size(item[1]), parse_id(item[2])))
    return Recipe(command, params, {role: parse_id(oid) for role, oid in inputs.items()}, tuple(sources), seed, tools)


def _file_from_json(value: Json) -> FileEntry:
    table = _table(value, {"chunks", "path"}, "file entry")
    path = table["path"]
    if not isinstance(path, str):
        raise Damaged("a file entry has no path")
    chunks = []
    for pair in _list(table["chunks"], "chunks"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Damaged(f"file {path[:200]!r} has a malformed chunk")
        size = _size(pair[1])
        if not 0 < size <= limits.CHUNK_BYTES:
            raise Damaged(f"file {path[:200]!r} has a chunk of {size} bytes")
        chunks.append(Chunk(parse_id(pair[0]), size))
    return FileEntry(path, tuple(chunks))


def _table(value: Any, keys: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        raise Damaged(f"{what} does not have exactly the fields {', '.join(sorted(keys))}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Damaged(f"manifest {what} is not a list")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise Damaged(f"{str(value)[:40]!r} is not a size")
    return value
