"""Ollama's store, read where it lies: `manifests/HOST/NAMESPACE/NAME/TAG` is JSON that names blobs by SHA-256, and they
lie in `blobs/sha256-DIGITS`. A digest is checked before a path is made of it, and the bytes before they are believed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llmos_cli.errors import Damaged, NotFound, Unsafe, UsageError, from_os_error
from llmos_cli.formats import canonical, limits
from llmos_cli.store.intake.proof import SHA256

SCHEME: Final = "ollama:"
MANIFESTS: Final = "manifests"
_REGISTRY: Final = ("registry.ollama.ai", "library")
_DIGEST: Final = re.compile(r"sha256[:-]([0-9a-f]{64})\Z")
_PART: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(?::[0-9]{1,5})?\Z")
_MANIFEST_BYTES: Final = limits.MiB
_IMAGE: Final = "application/vnd.ollama.image."
# What a layer is called in the store; "{name}" is the model's, and several of one kind are numbered.
_NAMES: Final = {
    "model": "{name}.gguf",
    "projector": "mmproj-{name}.gguf",
    "adapter": "adapter-{name}.gguf",
    "license": "LICENSE",
    "template": "template.txt",
    "system": "system.txt",
    "params": "params.json",
    "messages": "messages.json",
}
_GGUF: Final = ("model", "projector", "adapter")


@dataclass(frozen=True)
class OllamaModel:
    """`files` are (name in the store, blob, digest); `skipped` are (layer, reason)."""

    files: tuple[tuple[str, Path, str], ...]
    skipped: tuple[tuple[str, str], ...]


def find_ollama(text: str, folders: Sequence[Path]) -> Path:
    """The manifest of ollama:[[HOST/]NAMESPACE/]NAME[:TAG] in the first of the models' `folders` that has it.

    Raises UsageError for a malformed name, NotFound.
    """
    path, colon, tag = text.removeprefix(SCHEME).rpartition(":")
    if not colon or "/" in tag:
        path, tag = text.removeprefix(SCHEME), "latest"
    parts = path.split("/")
    parts = [*_REGISTRY[: max(0, 3 - len(parts))], *parts]
    if len(parts) != 3 or not _HOST.match(parts[0]) or not all(_PART.match(part) for part in (*parts[1:], tag)):
        raise UsageError(f"malformed name {text[:200]!r}", hint="write ollama:NAME or ollama:NAME:TAG")
    for folder in folders:
        manifest = folder.joinpath(MANIFESTS, *parts, tag)
        if manifest.is_file():
            return manifest
    looked = ", ".join(str(folder) for folder in folders)
    raise NotFound(f"no {text} in {looked}", hint="list what there is: ollama list; OLLAMA_MODELS says where it lies")


def models_folder(path: Path) -> Path | None:
    """The folder of models that this file is a manifest in; None if it is none."""
    for parent in path.absolute().parents:
        if parent.name == MANIFESTS and (parent.parent / "blobs").is_dir():
            return parent.parent
    return None


def read_ollama(manifest: Path, folder: Path) -> OllamaModel:
    """What a manifest names. Raises Damaged for one that is malformed or lacks a blob, Unsafe for a digest that is
    none."""
    value = _read(manifest)
    layers = value.get("layers")
    if not isinstance(layers, list) or not layers or len(layers) > limits.MANIFEST_FILES:
        raise Damaged(f"{manifest} names no layers")
    name = _model_name(manifest)
    found: list[tuple[str, Path, str]] = []
    skipped: list[tuple[str, str]] = []
    counts: dict[str, int] = {}
    for layer in layers:
        kind, blob, digest = _read_layer(layer, manifest, folder)
        if kind not in _NAMES:
            skipped.append((blob.name, f"a layer of a kind that is not known here ({kind[:80]})"))
            continue
        counts[kind] = counts.get(kind, 0) + 1
        found.append((_file_name(kind, name, counts[kind]), blob, digest))
    if not any(kind in counts for kind in _GGUF):
        raise UsageError(f"{manifest} names no GGUF file", hint="only models that ollama keeps as GGUF can be added")
    for path, blob, _ in found:
        if path.endswith(".gguf"):
            _check_gguf(blob)
    return OllamaModel(tuple(found), tuple(skipped))


def _read(manifest: Path) -> dict[str, Any]:
    try:
        with open(manifest, "rb") as file:
            data = file.read(_MANIFEST_BYTES + 1)
    except OSError as exc:
        raise from_os_error(exc, f"reading {manifest}") from exc
    if len(data) > _MANIFEST_BYTES:
        raise Damaged(f"{manifest} is larger than {_MANIFEST_BYTES} bytes")
    value = canonical.loads(data, str(manifest))
    if not isinstance(value, dict):
        raise Damaged(f"{manifest} is no manifest of ollama")
    return value


def _read_layer(layer: Any, manifest: Path, folder: Path) -> tuple[str, Path, str]:
    """A layer's kind, its blob and the blob's digest."""
    media, size, digest = (
        (layer.get(key) for key in ("mediaType", "size", "digest")) if isinstance(layer, dict) else ("",) * 3
    )
    match = _DIGEST.match(digest) if isinstance(digest, str) else None
    if not match:
        raise Unsafe(f"{manifest} names a blob by {json.dumps(digest)[:100]}, which is no digest")
    if not isinstance(media, str) or type(size) is not int:
        raise Damaged(f"{manifest} does not say kind and size of {match[0][:19]}")
    blob = folder / "blobs" / f"sha256-{match[1]}"
    try:
        there = blob.stat().st_size
    except FileNotFoundError:
        raise Damaged(f"{manifest} names {blob.name}, which is not there", hint="pull it again: ollama pull") from None
    except OSError as exc:
        raise from_os_error(exc, f"looking at {blob}") from exc
    if there != size:
        raise Damaged(f"{blob} has {there} bytes, and its manifest says {size}", hint="pull it again: ollama pull")
    return media.removeprefix(_IMAGE), blob, f"{SHA256}:{match[1]}"


def _model_name(manifest: Path) -> str:
    """NAME-TAG, or NAME alone for the tag that everybody means."""
    name, tag = manifest.parent.name, manifest.name
    if not _PART.match(name) or not _PART.match(tag):
        raise Unsafe(f"{manifest} has a name that no file can have")
    return name if tag == "latest" else f"{name}-{tag}"


def _file_name(kind: str, name: str, number: int) -> str:
    path = _NAMES[kind].format(name=name)
    if number == 1:
        return path
    stem, dot, suffix = path.rpartition(".")
    return f"{stem}-{number}{dot}{suffix}" if dot else f"{path}-{number}"


def _check_gguf(blob: Path) -> None:
    try:
        with open(blob, "rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise from_os_error(exc, f"reading {blob}") from exc
    if magic != b"GGUF":
        raise Damaged(f"{blob} is not a GGUF file")
