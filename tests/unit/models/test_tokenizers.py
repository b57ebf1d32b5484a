from collections.abc import Callable
from typing import Any

import pytest

from llmos_cli.errors import Damaged, LlmosError, Unsafe
from llmos_cli.formats.manifest import Manifest
from llmos_cli.models.tokenizers import load_tokenizer, tokenizer_entries
from llmos_cli.store.local import Store

Put = Callable[..., Manifest]


@pytest.mark.parametrize("kind", ["model", "tokenizer", "dataset"])
def test_a_tokenizer_comes_out_of_any_kind(
    store: Store, put: Put, tokenizer_files: dict[str, Any], kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = "tokenizer/" if kind == "dataset" else ""
    manifest = put(None, {folder + name: data for name, data in tokenizer_files.items()}, kind)
    tokenizer = load_tokenizer(store, manifest)
    assert tokenizer.decode(tokenizer("hä 1")["input_ids"]) == "hä 1"
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.model_max_length) == ("<eos>", 0, 64)
    assert tokenizer.name_or_path == ""
    assert sorted(entry.path for entry in tokenizer_entries(manifest)) == ["tokenizer.json", "tokenizer_config.json"]
    assert capfd.readouterr() == ("", "")


def test_the_chat_template_is_honoured_and_a_file_of_its_own_wins(
    store: Store, put: Put, tokenizer_files: dict[str, Any]
) -> None:
    chat = [{"role": "user", "content": "hi"}]
    tokenizer = load_tokenizer(store, put(None, tokenizer_files))
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[user]hi"
    own = tokenizer_files | {"chat_template.jinja": b"<{{ messages[0].content }}>"}
    assert load_tokenizer(store, put(None, own)).apply_chat_template(chat, tokenize=False) == "<hi>"


def test_tokenizer_json_is_enough(store: Store, put: Put, tokenizer_files: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(store, put(None, {"tokenizer.json": tokenizer_files["tokenizer.json"]}))
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"
    assert tokenizer.eos_token is None


def test_a_manifest_without_a_tokenizer_is_an_error(store: Store, put: Put) -> None:
    with pytest.raises(LlmosError, match=r"tokenizer\.json"):
        load_tokenizer(store, put(None, {"config.json": {}}))


def test_code_that_comes_with_a_tokenizer_is_refused(store: Store, put: Put, tokenizer_files: dict[str, Any]) -> None:
    evil = tokenizer_files | {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.T", None]}}}
    with pytest.raises(Unsafe, match="auto_map"):
        load_tokenizer(store, put(None, evil))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": 3}'),
        ("tokenizer_config.json", b""),
        ("tokenizer_config.json", b"[]"),
    ],
)
def test_a_damaged_tokenizer_is_named(
    store: Store, put: Put, tokenizer_files: dict[str, Any], name: str, content: bytes
) -> None:
    with pytest.raises(Damaged, match=name):
        load_tokenizer(store, put(None, tokenizer_files | {name: content}))
