"""BERTs of TensorFlow and Keras come in with their values in the right places, and nothing else does."""

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining

from llmos_cli.errors import Damaged, LlmosError, NotFound, UsageError
from llmos_cli.export.keras import keras_file
from llmos_cli.formats.names import parse_ref
from llmos_cli.formats.tfbundle import MAGIC, read_bundle
from llmos_cli.models.foreign.bert import canonical_names, from_torch, to_torch
from llmos_cli.models.foreign.bring import bring
from llmos_cli.models.weights import load_state_dict
from llmos_cli.store.local import Store, init_store, open_store
from llmos_cli.store.packs.objects import read_file, read_manifest

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "hidden_act": "gelu",
}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """transformers' state of a random BERT, norms and biases too."""
    torch.manual_seed(1)
    model = BertForPreTraining(BertConfig(**CONFIG))
    state = {
        name: torch.randn_like(value) * 0.3 for name, value in model.state_dict().items() if value.is_floating_point()
    }
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    return {name: value.numpy() for name, value in state.items()}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    init_store(tmp_path / ".llmos")
    with open_store(tmp_path / ".llmos") as opened:
        yield opened


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def block(entries: Mapping[bytes, bytes]) -> bytes:
    """A block of a table whose keys share their beginnings, as LevelDB writes it, with its trailer."""
    data, last = b"", b""
    for key, value in sorted(entries.items()):
        shared = next((n for n, (a, b) in enumerate(zip(key, last, strict=False)) if a != b), min(len(key), len(last)))
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return data + struct.pack("<II", 0, 1) + bytes(5)


def write_checkpoint(prefix: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A tensor bundle of one shard: what TensorFlow's BundleWriter writes."""
    data, entries = b"", {b"": b"\x08\x01" + b"\x1a\x02\x08\x01"}
    for name, value in tensors.items():
        shape = b"".join(b"\x12" + varint(len(dim)) + dim for dim in (b"\x08" + varint(n) for n in value.shape))
        raw = value.astype("<f4").tobytes()
        entry = b"\x08\x01" + b"\x12" + varint(len(shape)) + shape
        entry += (b"\x20" + varint(len(data)) if data else b"") + b"\x28" + varint(len(raw)) + b"\x35" + bytes(4)
        entries[name.encode()] = entry
        data += raw
    names = sorted(entries)
    index, table = {}, b""
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        body = block({name: entries[name] for name in part})
        index[part[-1]] = varint(len(table)) + varint(len(body) - 5)
        table += body
    listed = block(index)
    footer = varint(0) + varint(0) + varint(len(table)) + varint(len(listed) - 5)
    table += listed + footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    prefix.with_name(prefix.name + ".index").write_bytes(table)
    prefix.with_name(prefix.name + ".data-00000-of-00001").write_bytes(data)


def write_h5(target: Path, state: Mapping[str, np.ndarray]) -> None:
    """Names as TFBertForPreTraining of transformers 4 wrote them, spelled out here by hand."""
    renamed = {
        ".LayerNorm.weight": ".LayerNorm.gamma",
        ".LayerNorm.bias": ".LayerNorm.beta",
        "word_embeddings.weight": "word_embeddings.weight",
        "position_embeddings.weight": "position_embeddings.embeddings",
        "token_type_embeddings.weight": "token_type_embeddings.embeddings",
    }
    with h5py.File(target, "w") as file:
        for name, value in state.items():
            if "decoder" in name:
                continue
            for old, new in renamed.items():  # noqa: B007
                if name.endswith(old):
                    break
            else:
                old, new = (".weight", ".kernel") if value.ndim == 2 else ("", "")
            spelled = name.removesuffix(old) + new if old else name
            group = {"bert": "bert", "cls": "nsp___cls" if "seq_rel" in name else "mlm___cls"}[name.split(".")[0]]
            parts = [group, *spelled.split(".")[1:]]
            path = "/".join(parts).replace("/layer/", "/layer_._")
            turned = value.T if new == ".kernel" else value
            file.create_dataset(f"{group}/tf_bert_for_pre_training/{path}:0", data=turned)


def stored(store: Store, name: str) -> dict[str, np.ndarray]:
    manifest = read_manifest(store, bring_id(store, name))
    return {key: value.numpy() for key, value in load_state_dict(store, manifest).items()}


def bring_id(store: Store, name: str):  # type: ignore[no-untyped-def]
    from llmos_cli.store.refs.refs import read_ref

    entry = read_ref(store, parse_ref(name))
    assert entry is not None
    return entry.id


def same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    kept = {name: value for name, value in expected.items() if "decoder" not in name}
    return found.keys() == kept.keys() and all(np.array_equal(found[name], kept[name]) for name in kept)


def test_names_go_there_and_back(weights: dict[str, np.ndarray]) -> None:
    foreign = from_torch(weights)
    assert foreign["bert/encoder/layer_0/attention/self/query/kernel"].shape == (16, 16)
    assert foreign["bert/encoder/layer_1/intermediate/dense/kernel"].shape == (16, 24)
    back = to_torch(canonical_names({f"x/{name}:0": value for name, value in foreign.items()}))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


def test_a_checkpoint_of_tensorflow_comes_in(store: Store, tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    foreign = from_torch(weights) | {"bert/pooler/dense/kernel/adam_m": np.zeros((16, 16)), "global_step": np.ones(())}
    write_checkpoint(tmp_path / "bert_model.ckpt", foreign)
    (tmp_path / "bert_config.json").write_text(json.dumps(CONFIG))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "##x"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    brought = bring(store, f"tf:{tmp_path / 'bert_model.ckpt'}", parse_ref("b"))
    assert brought.difference < 1e-4
    assert same(stored(store, "b"), weights)
    manifest = read_manifest(store, brought.id)
    config = manifest.file("config.json")
    assert config is not None
    assert json.loads(read_file(store, config))["architectures"] == ["BertForPreTraining"]
    assert manifest.file("tokenizer.json") is not None
    assert bring(store, f"tf:{tmp_path}", parse_ref("c")).id == brought.id, "a folder with one checkpoint will do"


@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_weights_of_keras_come_in(store: Store, tmp_path: Path, weights: dict[str, np.ndarray], suffix: str) -> None:
    write_h5(tmp_path / "tf_model.h5", weights)
    path = tmp_path / f"tf_model.{suffix}"
    if suffix == "keras":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "tf_model.h5", "model.weights.h5")
            archive.writestr("config.json", "{}")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "bert"}))
    bring(store, f"keras:{path}", parse_ref("b"))
    assert same(stored(store, "b"), weights)


def test_what_is_exported_comes_back_the_same(store: Store, tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    data = keras_file(weights)
    assert data == keras_file(weights), "no time is in it"
    (tmp_path / "tf_model.h5").write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    bring(store, f"keras:{tmp_path / 'tf_model.h5'}", parse_ref("b"))
    assert same(stored(store, "b"), weights)
    with pytest.raises(UsageError, match="is not a weight of a BERT"):
        keras_file({"model.layers.0.weight": np.zeros((2, 2))})


def test_weights_in_the_wrong_place_do_not_pass(store: Store, tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    foreign = from_torch(weights)
    query, key = (f"bert/encoder/layer_0/attention/self/{name}/kernel" for name in ("query", "key"))
    (tmp_path / "bert_config.json").write_text(json.dumps(CONFIG | {"hidden_act": "relu", "layer_norm_eps": 0.5}))
    write_checkpoint(tmp_path / "a.ckpt", foreign)
    assert bring(store, f"tf:{tmp_path / 'a.ckpt'}", parse_ref("a")).difference < 1e-4
    write_checkpoint(tmp_path / "b.ckpt", {name: value for name, value in foreign.items() if name not in (query, key)})
    with pytest.raises(Damaged, match="layer_0/attention/self/query"):
        bring(store, f"tf:{tmp_path / 'b.ckpt'}", parse_ref("b"))
    (tmp_path / "bert_config.json").write_text(json.dumps(CONFIG | {"hidden_act": "silu"}))
    with pytest.raises(UsageError, match="silu"):
        bring(store, f"tf:{tmp_path / 'a.ckpt'}", parse_ref("b"))
    (tmp_path / "bert_config.json").write_text(json.dumps(CONFIG | {"vocab_size": 41}))
    with pytest.raises(Damaged, match="the weights have 40 words"):
        bring(store, f"tf:{tmp_path / 'a.ckpt'}", parse_ref("b"))


def test_a_turned_matrix_is_noticed(
    store: Store, tmp_path: Path, weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "a.ckpt", from_torch(weights))
    (tmp_path / "bert_config.json").write_text(json.dumps(CONFIG))

    def turned(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = "bert.encoder.layer.1.attention.self.value.weight"
        state = to_torch(tensors)
        return state | {name: np.ascontiguousarray(state[name].T)}

    monkeypatch.setattr("llmos_cli.models.foreign.bring.to_torch", turned)
    with pytest.raises(LlmosError, match="hidden states differ by"):
        bring(store, f"tf:{tmp_path / 'a.ckpt'}", parse_ref("a"))


def test_what_is_no_bert_is_refused_by_name(store: Store, tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    with h5py.File(tmp_path / "cnn.h5", "w") as file:
        file["conv/kernel:0"] = np.zeros((3, 3))
    (tmp_path / "torn.h5").write_bytes((tmp_path / "cnn.h5").read_bytes()[:400])
    (tmp_path / "torn.index").write_bytes(b"\x00" * 60)
    for source, kind, message in (
        (f"keras:{tmp_path / 'cnn.h5'}", UsageError, "no word embeddings among conv/kernel:0"),
        (f"keras:{tmp_path / 'torn.h5'}", Damaged, "torn.h5 is not a readable HDF5 file"),
        (f"keras:{tmp_path / 'none.h5'}", NotFound, "none.h5"),
        (f"tf:{tmp_path / 'none.ckpt'}", NotFound, "none.ckpt.index"),
        (f"tf:{tmp_path / 'torn'}", Damaged, "torn.index is not the index of a TensorFlow checkpoint"),
        ("torch:x", UsageError, "--init torch:x names no file"),
    ):
        with pytest.raises(kind) as caught:
            bring(store, source, parse_ref("x"))
        assert message in caught.value.message


def test_an_index_cut_anywhere_is_damage_and_never_a_crash(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    write_checkpoint(tmp_path / "a.ckpt", from_torch(weights))
    data = (tmp_path / "a.ckpt.index").read_bytes()
    assert len(read_bundle(data, "it").variables) == len(from_torch(weights))
    tried = 0
    for at in range(0, len(data), 7):
        flipped = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        for torn in (data[:at] + data[-48:], flipped):
            try:
                read_bundle(torn, "it")
            except (Damaged, UsageError):
                tried += 1
    assert tried > 100


def test_an_index_that_tensorflow_wrote_is_read() -> None:
    """tests/golden/tensorflow: saved by tf.compat.v1.train.Saver of TensorFlow 2.21.0, with a BERT's names."""
    path = Path(__file__).parents[2] / "golden" / "tensorflow" / "bert-2.21.0.index"
    bundle = read_bundle(path.read_bytes(), path.name)
    shapes = {variable.name: variable.shape for variable in bundle.variables}
    assert (bundle.shards, len(shapes)) == (1, 47)
    assert shapes["bert/embeddings/word_embeddings"] == (60, 32)
    assert shapes["bert/encoder/layer_1/intermediate/dense/kernel"] == (32, 48)
    assert shapes["global_step"] == ()
    end = 0
    for variable in sorted(bundle.variables, key=lambda variable: variable.offset):
        assert variable.offset == end, "one lies behind the other"
        end += variable.size
