"""A BERT of Keras goes through the store and back: what was brought in by train comes out by export, equal."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining

from llmos_cli.export.keras import keras_file

CONFIG = {
    "vocab_size": 120,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


def llmos(folder: Path, *words: str, code: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "llmos_cli", *words, "--json"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return json.loads((done.stdout if code == 0 else done.stderr).splitlines()[-1])


ROOT = Path(__file__).parents[3]


def weights_of(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def test_a_bert_of_keras_is_trained_on_and_comes_out_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {name: value.numpy() for name, value in BertForPreTraining(BertConfig(**CONFIG)).state_dict().items()}
    source = tmp_path / "keras"
    source.mkdir()
    (source / "tf_model.h5").write_bytes(keras_file({k: v for k, v in state.items() if v.dtype.kind == "f"}))
    (source / "config.json").write_text(json.dumps(CONFIG))
    rows = [f"good plot and fun {n},1\nbad plot and dull {n},0\n" for n in range(40)]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(rows))
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    (source / "vocab.txt").write_text("\n".join([*letters, *(f"##{x}" for x in letters[5:])]))
    llmos(tmp_path, "init")
    spec = f"keras:{source / 'tf_model.h5'}"
    (tmp_path / "text.txt").write_text("good plot " * 40)
    llmos(tmp_path, "shard", "text.txt", "text", "--tokenizer", "train:300", "--seq-len", "16")
    error = llmos(tmp_path, "train", "tuned", "--data", "text", "--init", spec, code=2)["error"]
    assert "the 120 of tuned-init:latest" in error["message"], "what was brought in stays, to shard with its tokenizer"
    options = ["--data", "reviews", "--init", spec, "--steps", "2", "--batch", "4"]
    words = ("--task", "classify", "--tokenizer", "tuned-init", "--seq-len", "16")
    llmos(tmp_path, "shard", "reviews.csv", "reviews", *words)
    trained = llmos(tmp_path, "train", "tuned", *options)
    assert trained["step"] == 2
    assert llmos(tmp_path, "train", "again", *options)["id"] == trained["id"]

    out = llmos(tmp_path, "export", "tuned-init", "--to", "out", "--format", "keras")
    assert out["format"] == "keras"
    ours, theirs = weights_of(tmp_path / "out" / "tf_model.h5"), weights_of(source / "tf_model.h5")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    head = weights_of(tmp_path / "out" / "tf_model.h5")
    assert "bert/tf_bert_for_pre_training/bert/encoder/layer_._0/output/dense/kernel:0" in head
    llmos(tmp_path, "export", "tuned", "--to", "tuned-out", "--format", "keras")
    assert any("classifier/kernel" in name for name in weights_of(tmp_path / "tuned-out" / "tf_model.h5"))


@pytest.mark.parametrize("fmt", ["kers"])
def test_a_format_that_is_none_names_the_nearest(tmp_path: Path, fmt: str) -> None:
    assert llmos(tmp_path, "export", "x", "--to", "y", "--format", fmt, code=2)["error"]["hint"] == "use --format keras"
