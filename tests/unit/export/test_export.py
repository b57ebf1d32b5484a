"""What is exported is the model: others read it and answer the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmos_cli.app import main
from llmos_cli.errors import Damaged, LlmosError, UsageError
from llmos_cli.export.run import Exported, export
from llmos_cli.export.tokens import CONTROL, NORMAL, UNUSED, read_vocabulary
from llmos_cli.formats.ids import ObjectId
from llmos_cli.formats.names import parse_ref
from llmos_cli.models.load import load_model
from llmos_cli.models.schemes import INT8, Form, int4
from llmos_cli.progress import Silent
from llmos_cli.quantize.run import Request, quantize
from llmos_cli.store.local import Store
from llmos_cli.store.packs.objects import read_file, read_manifest

Put = Callable[..., ObjectId]
FAMILIES = ["llama-tied", "llama-untied", "mistral", "qwen2", "qwen3", "gpt2"]


def run(store: Store, source: ObjectId, fmt: str = "gguf", kind: str | None = None) -> Exported:
    return export(store, source, "tiny", fmt, kind, None, progress=Silent())


def parity(made: Exported) -> dict[str, Any]:
    found = made.manifest.meta["parity"]
    assert isinstance(found, dict)
    return found


def written(store: Store, made: Exported, folder: Path) -> Path:
    (entry,) = made.manifest.files
    (folder / entry.path).write_bytes(read_file(store, entry))
    return folder / entry.path


@pytest.mark.parametrize("config", FAMILIES)
def test_a_gguf_file_answers_as_the_model_does(store: Store, put_model: Put, config: str) -> None:
    found = parity(run(store, put_model(config=config), kind="f32"))
    assert found["reason"] is None
    assert found["same_top"] == 1.0
    assert found["kl"] < 1e-6


@pytest.mark.parametrize(
    ("kind", "most"), [("f16", 1e-4), ("bf16", 1e-3), ("q8_0", 1e-2), ("q4_0", 1.0), ("q4_1", 1.0), ("mxfp4", 2.0)]
)
def test_every_type_is_near(store: Store, put_model: Put, kind: str, most: float) -> None:
    made = run(store, put_model(), kind=kind)
    assert made.manifest.files[0].path == f"model-{kind}.gguf"
    assert parity(made)["kl"] < most


@pytest.mark.parametrize(("form", "kind"), [(INT8, "q8_0"), (int4(32), "q4_0"), (int4(64), "q4_0")], ids=str)
@pytest.mark.parametrize("config", ["llama-untied", "gpt2"])
def test_quantized_weights_keep_their_values(
    store: Store, put_model: Put, form: Form, kind: str, config: str, tmp_path: Path
) -> None:
    request = Request(form, "search" if form.group else "rtn")
    small = quantize(store, put_model(config=config), request, parse_ref("small"), progress=Silent())
    made = run(store, small.id)
    assert made.manifest.meta["type"] == kind
    # Only the scales are rounded, to float16.
    assert parity(made)["kl"] < 1e-4
    reader = gguf.GGUFReader(written(store, made, tmp_path))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == kind.upper()
    with pytest.raises(UsageError, match="would lose twice"):
        run(store, small.id, kind="q4_1")


def test_the_file_says_what_llama_cpp_wants_to_know(store: Store, put_model: Put, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(store, run(store, put_model()), tmp_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == 2
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert len(fields["tokenizer.ggml.tokens"]) == 512
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}, "tied: it is the embedding"


def test_the_second_time_it_comes_out_of_the_store(
    store: Store, put_model: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = put_model()
    first = run(store, source)
    monkeypatch.setattr("llmos_cli.export.gguf.write_gguf", None)
    again = run(store, source)
    assert (again.id, again.made_before, first.made_before) == (first.id, True, False)


def test_a_hugging_face_folder_loads_and_leaves_training_behind(
    root: Path, store: Store, put_model: Put, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = put_model()
    assert main(["--store", str(root), "export", "tiny", "--to", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (result["source"], result["format"], result["made_before"]) == (str(source), "hf", False)
    assert not (tmp_path / "out" / "training").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, load_model(store, read_manifest(store, source))(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("--format", "guff"), 2, "use --format gguf"),
        (("--format", "gguf", "--type", "q8"), 2, "use --type q8_0"),
        (("--type", "q8_0"), 2, "--type is for --format gguf"),
    ],
)
def test_bad_words_get_a_hint(
    root: Path, put_model: Put, arguments: tuple[str, ...], code: int, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    put_model()
    assert main(["--store", str(root), "export", "tiny", "--to", str(root.parent / "out"), *arguments]) == code
    assert why in capfd.readouterr().err
    assert not (root.parent / "out").exists()


def test_what_gguf_has_no_words_for_is_refused(tokenizer: bytes) -> None:
    table = json.loads(tokenizer)
    with pytest.raises(LlmosError, match="BPE tokenizers, not WordPiece"):
        read_vocabulary(table | {"model": {"type": "WordPiece", "vocab": {}}}, {}, None, 320)
    odd = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated"}
    with pytest.raises(LlmosError, match="no name for the rule"):
        read_vocabulary(
            table | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [odd, {"type": "ByteLevel"}]}},
            {},
            None,
            320,
        )
    with pytest.raises(Damaged, match="the model 100 tokens"):
        read_vocabulary(table, {}, None, 100)
    with pytest.raises(Damaged, match="form of a tokenizer"):
        read_vocabulary({"model": {}}, {}, None, 100)


def test_tokens_have_their_kinds(tokenizer: bytes) -> None:
    found = read_vocabulary(json.loads(tokenizer), {"eos_token": {"content": "<|endoftext|>"}}, None, 320)
    assert found.kinds[0] == CONTROL
    assert found.kinds[5] == NORMAL
    assert found.kinds[-1] == UNUSED
    assert found.special == {"eos": 0}
    assert all(" " in merge for merge in found.merges)
