"""Ollama's store, as it lays it out."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llmos_cli.errors import Damaged, NotFound, Unsafe, UsageError
from llmos_cli.formats.names import parse_ref
from llmos_cli.progress import Silent
from llmos_cli.store.handle import Store
from llmos_cli.store.intake.add import AddPlan, execute_add, plan_add
from llmos_cli.store.intake.adopt import HARDLINK, REFLINK
from llmos_cli.store.intake.ollama import find_ollama
from llmos_cli.store.refs.refs import ref_names

# Version 3, no tensors, no keys; then whatever a file may end in.
GGUF = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)


class Models:
    """`~/.ollama/models`, filled as `ollama pull` does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)

    def blob(self, data: bytes) -> str:
        digits = hashlib.sha256(data).hexdigest()
        (self.root / "blobs" / f"sha256-{digits}").write_bytes(data)
        return f"sha256:{digits}"

    def layer(self, kind: str, data: bytes) -> dict[str, Any]:
        return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": self.blob(data), "size": len(data)}

    def write(self, name: str, *layers: dict[str, Any], registry: str = "registry.ollama.ai/library") -> Path:
        path = self.root / "manifests" / registry / name
        path.parent.mkdir(parents=True, exist_ok=True)
        config = self.layer("config", b"{}") | {"mediaType": "application/vnd.docker.container.image.v1+json"}
        path.write_text(json.dumps({"schemaVersion": 2, "config": config, "layers": layers}))
        return path


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path / "models")


def add(store: Store, path: Path, **options: Any) -> AddPlan:
    plan = plan_add([path])
    execute_add(store, plan, parse_ref("x"), Silent(), **options)
    return plan


def test_a_model_comes_with_what_belongs_to_it(store: Store, models: Models, lab: Any) -> None:
    path = models.write(
        "llama3.2/1b",
        models.layer("model", GGUF + b"weights"),
        models.layer("template", b"{{ .Prompt }}"),
        models.layer("license", b"one"),
        models.layer("license", b"two"),
        models.layer("params", b'{"stop": []}'),
        models.layer("hologram", b"?"),
    )
    plan = add(store, path)
    assert lab.read("x") == {
        "llama3.2-1b.gguf": GGUF + b"weights",
        "template.txt": b"{{ .Prompt }}",
        "LICENSE": b"one",
        "LICENSE-2": b"two",
        "params.json": b'{"stop": []}',
    }
    assert [reason for _, reason in plan.skipped] == ["a layer of a kind that is not known here (hologram)"]


def test_a_model_is_found_by_its_name(models: Models, tmp_path: Path) -> None:
    layer = models.layer("model", GGUF)
    latest, one = models.write("llama3.2/latest", layer), models.write("llama3.2/1b", layer)
    other = models.write("mine/v1", layer, registry="registry.ollama.ai/me")
    remote = models.write("mine/v1", layer, registry="host:5000/me")
    folders = [tmp_path / "nowhere", models.root]
    assert find_ollama("ollama:llama3.2", folders) == latest
    assert find_ollama("ollama:llama3.2:1b", folders) == one
    assert find_ollama("ollama:me/mine:v1", folders) == other
    assert find_ollama("ollama:host:5000/me/mine:v1", folders) == remote
    with pytest.raises(NotFound, match="no ollama:llama4"):
        find_ollama("ollama:llama4", folders)


@pytest.mark.parametrize(
    "text", ["ollama:", "ollama:../x", "ollama:a:../../b", "ollama:a/b/c/d", "ollama:a:", "ollama:a b"]
)
def test_a_malformed_name_is_refused(models: Models, text: str) -> None:
    with pytest.raises(UsageError, match="malformed name"):
        find_ollama(text, [models.root])


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../../../etc/passwd",
        "sha256:" + "A" * 64,
        "sha256-" + "0" * 63,
        "sha256:" + "0" * 64 + "/..",
        "",
        5,
        None,
    ],
)
def test_a_digest_that_is_none_makes_no_path(models: Models, digest: object) -> None:
    path = models.write("a/latest", models.layer("model", GGUF) | {"digest": digest})
    with pytest.raises(Unsafe, match="no digest"):
        plan_add([path])


def test_a_blob_whose_bytes_are_others_is_refused(store: Store, models: Models) -> None:
    layer = models.layer("model", GGUF + b"weights")
    path = models.write("a/latest", layer)
    (models.root / "blobs" / layer["digest"].replace(":", "-")).write_bytes(GGUF + b"Weights")
    with pytest.raises(Damaged, match="does not have the bytes"):
        add(store, path)
    assert ref_names(store) == []


@pytest.mark.parametrize("data", [b"<html>", b"PK\3\4 a zip"])
def test_a_model_that_is_no_gguf_is_refused(models: Models, data: bytes) -> None:
    with pytest.raises(Damaged, match="not a GGUF file"):
        plan_add([models.write("a/latest", models.layer("model", data))])


def test_what_is_not_whole_is_refused(models: Models) -> None:
    layer = models.layer("model", GGUF)
    (models.root / "blobs" / layer["digest"].replace(":", "-")).unlink()
    with pytest.raises(Damaged, match="which is not there"):
        plan_add([models.write("a/latest", layer)])
    with pytest.raises(Damaged, match="its manifest says 99"):
        plan_add([models.write("a/latest", models.layer("model", GGUF) | {"size": 99})])
    with pytest.raises(UsageError, match="names no GGUF file"):
        plan_add([models.write("a/latest", models.layer("tensor", b"a tensor by itself"))])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": {}}', '{"layers": [5]}', '{"layers": [], "layers": []}'])
def test_a_broken_manifest_is_refused(models: Models, text: str) -> None:
    path = models.write("a/latest")
    path.write_text(text)
    with pytest.raises((Damaged, Unsafe)):
        plan_add([path])


def test_blobs_are_adopted_where_they_lie(store: Store, models: Models, lab: Any) -> None:
    data = GGUF + lab.noise(1_200_000)
    path = models.write("a/q4", models.layer("model", data), models.layer("license", b"MIT"))
    plan = plan_add([path])
    done = execute_add(store, plan, parse_ref("x"), Silent(), adopt=True)
    assert {item.how for item in done.adoptions if item.size > 1_000_000} <= {HARDLINK, REFLINK}
    assert lab.read("x") == {"a-q4.gguf": data, "LICENSE": b"MIT"}
