"""`llmos add ollama:NAME`: where ollama's models are looked for."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GGUF = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)


def fill(models: Path) -> None:
    digits = hashlib.sha256(GGUF).hexdigest()
    manifest = models / "manifests/registry.ollama.ai/library/tiny/latest"
    for path, data in ((models / "blobs" / f"sha256-{digits}", GGUF), (manifest, b"")):
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digits}", "size": len(GGUF)}
    manifest.write_text(json.dumps({"layers": [layer]}))


def test_in_the_home_folder_and_where_the_environment_says(
    store: Path, llmos: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    assert llmos("add", "ollama:tiny", "tiny").code == 10
    fill(folder.parent / "home/.ollama/models")
    assert llmos("add", "ollama:tiny", "tiny", "--json").json["files"] == 1
    monkeypatch.setenv("OLLAMA_MODELS", str(folder / "elsewhere"))
    failed = llmos("add", "ollama:tiny", "tiny", "--json")
    assert (failed.code, "OLLAMA_MODELS" in failed.error["hint"]) == (10, True)
    fill(folder / "elsewhere")
    assert llmos("add", "ollama:tiny", "tiny").code == 0
    assert llmos("checkout", "tiny", "out").code == 0
    assert (folder / "out/tiny.gguf").read_bytes() == GGUF


def test_a_malformed_name_is_a_usage_error(store: Path, llmos: Callable[..., Any]) -> None:
    assert llmos("add", "ollama:a:b:../c", "tiny").code == 2
