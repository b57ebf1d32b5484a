"""From records to a measured classifier on the command line: a body learns words, gets a head and an adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llmos = Callable[..., Any]


@pytest.fixture
def moods(llmos: Llmos, folder: Path) -> None:
    """The datasets `words` (mlm) and `moods` (classify), and `body`, trained a little on the first."""
    rows = [f"{'good' if n % 2 else 'bad'} food {n % 5},{('sad', 'glad')[n % 2]}" for n in range(60)]
    (folder / "moods.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    assert llmos("init").code == 0
    assert llmos("shard", "moods.csv", "words", "--task", "mlm", "--tokenizer", "train:270", "--seq-len", 24).code == 0
    shard = ("shard", "moods.csv", "moods", "--task", "classify", "--tokenizer", "words", "--seq-len", 24)
    assert llmos(*shard, "--split", "valid=0.2").code == 0
    assert llmos("train", "body", "--data", "words", "--depth", 1, "--steps", 3, "--batch", 4).code == 0


def test_a_classifier_and_an_adapter(llmos: Llmos, moods: None) -> None:
    train = ("train", "judge", "--data", "moods", "--model", "body", "--steps", 40, "--batch", 16, "--lr", 3e-3)
    ran = llmos(*train)
    assert ran.code == 0, ran.err
    assert "BertForSequenceClassification" in ran.err
    assert "40 steps of 16 examples" in ran.err
    assert "new weights, drawn by the seed: bert.pooler.dense.bias" in ran.err
    ran = llmos("eval", "judge", "--data", "moods", "--split", "valid", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["task"], ran.json["accuracy"], ran.json["made_before"]) == ("classify", 1.0, False)
    assert "accuracy    1.0000" in llmos("eval", "judge", "--data", "moods", "--split", "valid").out

    ran = llmos(*("small" if word == "judge" else word for word in train), "--lora", 2, "--json")
    assert ran.json["kind"] == "adapter"
    assert llmos("eval", "small", "--data", "moods").code == 0
    ran = llmos("merge", "small", "whole", "--json")
    assert 0 < ran.json["changed"] < ran.json["tensors"]
    for ref in ("small", "whole"):
        assert llmos("eval", ref, "--data", "moods", "--json").json["accuracy"] > 0.5
    ran = llmos("generate", "judge", "the soup", "--json")
    assert ran.code == 2
    assert "does not write" in ran.error["message"]


def test_what_does_not_fit_is_said_before_training(llmos: Llmos, moods: None) -> None:
    for words, code, message in (
        (("--lora", 4), 2, "--lora trains an adapter for a model"),
        (("--optimizer", "lion"), 2, "--optimizer lion is not offered"),
        (("--model", "body", "--eval-every", 0), 2, "--eval-every 0 is not a whole number"),
    ):
        ran = llmos("train", "x", "--data", "moods", *words, "--json")
        assert (ran.code, ran.out) == (code, "")
        assert message in ran.error["message"]
    ran = llmos("eval", "body", "--data", "moods", "--json")
    assert ran.code == 2
    assert "a BertForMaskedLM is not trained for the task classify" in ran.error["message"]
