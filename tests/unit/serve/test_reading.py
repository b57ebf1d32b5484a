import base64
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

from llmos_cli.errors import Busy
from llmos_cli.serve.reader import BATCH_TOKENS, Read, Reader, ReadingRoom

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "soup", "was", "warm", "cold", "good", "bad", "and", "bread", "staff"]
TEXTS = ["the soup was warm", "bad", "the bread and the staff was good and the soup was cold"]


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def make(cls: Any = BertForSequenceClassification, **options: Any) -> Reader:
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24, initializer_range=0.4, **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Reader(cls(config), tokenizer(), classifies=cls is BertForSequenceClassification)


@pytest.fixture(scope="module")
def labelled() -> Reader:
    return make(id2label={0: "bad", 1: "good", 2: "so so"}, label2id={"bad": 0, "good": 1, "so so": 2})


@pytest.fixture(scope="module")
def embedder() -> Reader:
    return make(BertForMaskedLM)


def post(url: str, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json={"model": "tiny"} | body, timeout=60)


def test_a_text_is_read_as_transformers_reads_it_however_it_is_padded(labelled: Reader) -> None:
    reads = [labelled.text(text, field="input") for text in TEXTS]
    together = labelled.read(reads)
    for read, row in zip(reads, together, strict=True):
        with torch.inference_mode():
            expected = labelled._model(torch.tensor([read.ids])).logits[0].softmax(-1)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_classes_have_their_names_and_probabilities(serve: Callable[..., str], labelled: Reader) -> None:
    body = post(serve(labelled), "classify", {"input": TEXTS}).json()
    assert [entry["index"] for entry in body["data"]] == [0, 1, 2]
    for entry in body["data"]:
        assert sum(entry["probs"]) == pytest.approx(1, abs=1e-5)
        assert entry["label"] == ["bad", "good", "so so"][max(range(3), key=entry["probs"].__getitem__)]
    assert body["usage"]["prompt_tokens"] == 6 + 3 + 14
    assert body["model"] == "tiny:latest"


def test_vectors_have_length_one_and_the_official_client_takes_them(
    serve: Callable[..., str], embedder: Reader
) -> None:
    url = serve(embedder)
    found = post(url, "embeddings", {"input": TEXTS}).json()["data"]
    for entry in found:
        assert sum(value**2 for value in entry["embedding"]) == pytest.approx(1, abs=1e-5)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    theirs = client.embeddings.create(model="tiny", input=TEXTS)  # which asks for base64
    assert theirs.data[2].embedding == pytest.approx(found[2]["embedding"])
    packed = post(url, "embeddings", {"input": TEXTS[1], "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert list(struct.unpack("<32f", base64.b64decode(packed))) == pytest.approx(found[1]["embedding"], abs=1e-6)
    ids = embedder.text(TEXTS[0], field="x").ids
    by_ids = post(url, "embeddings", {"input": [ids, ids]}).json()["data"][1]["embedding"]
    assert by_ids == pytest.approx(found[0]["embedding"], abs=1e-6)


def test_documents_are_ranked_by_how_well_they_fit(serve: Callable[..., str]) -> None:
    reader = make(num_labels=1, problem_type="regression")
    url = serve(reader)
    ask = {"query": "warm soup", "documents": TEXTS}
    results = post(url, "rerank", ask).json()["results"]
    scores = [entry["relevance_score"] for entry in results]
    assert scores == sorted(scores, reverse=True)
    assert sorted(entry["index"] for entry in results) == [0, 1, 2]
    for entry in results:
        pair = reader.text("warm soup", TEXTS[entry["index"]], field="x")
        assert pair.first == 4
        assert entry["relevance_score"] == pytest.approx(float(reader.read([pair])[0, 0]), abs=1e-4)
        assert entry["document"]["text"] == TEXTS[entry["index"]]
    best = post(url, "rerank", ask | {"top_n": 1, "return_documents": False}).json()["results"]
    assert best == [{"index": results[0]["index"], "relevance_score": pytest.approx(scores[0], abs=1e-4)}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("classify", {"input": "soup " * 50}, "input"),
        ("classify", {"input": ["soup", "soup " * 50]}, "input[1]"),
        ("classify", {"input": []}, "input"),
        ("classify", {"input": 5}, "input"),
        ("classify", {}, "input"),
        ("classify", {"input": "x", "truncate": 5}, "truncate"),
        ("classify", {"input": ["x"] * 2000}, "input"),
        ("rerank", {"query": "x", "documents": ["y"]}, "model"),
        ("rerank", {"query": "x", "documents": ["y"], "top_n": 0}, "top_n"),
        ("classify", {"model": "other", "input": "x"}, "model"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    serve: Callable[..., str], labelled: Reader, path: str, body: Any, param: str
) -> None:
    response = post(serve(labelled), path, body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"].partition(".")[0] == param


def test_what_the_model_does_not_do_is_not_served(
    serve: Callable[..., str], labelled: Reader, embedder: Reader
) -> None:
    for reader, paths in ((labelled, ("embeddings", "completions")), (embedder, ("classify", "rerank"))):
        url = serve(reader)
        assert [post(url, path, {"input": "x"}).status_code for path in paths] == [404, 404]
        assert httpx.get(f"{url}/ready").status_code == 200


def test_tokens_that_the_model_does_not_know_are_refused(serve: Callable[..., str], embedder: Reader) -> None:
    for ids in ([99], [-1]):
        assert post(serve(embedder), "embeddings", {"input": ids}).json()["error"]["param"] == "input"


def test_texts_that_wait_are_computed_together_by_length(embedder: Reader) -> None:
    room = ReadingRoom(embedder)
    sizes: list[list[int]] = []
    read, go = embedder.read, threading.Event()

    def noted(texts: Any) -> torch.Tensor:
        go.wait(20)
        sizes.append([len(text.ids) for text in texts])
        return read(texts)

    embedder.read = noted  # type: ignore[method-assign]
    room.start()
    try:
        first = room.hand_in([Read([5] * 3)])
        more = room.hand_in([Read([5] * (2 + number % 20)) for number in range(300)])
        gone = room.hand_in([Read([7] * 9)])
        assert gone[0].cancel()
        go.set()
        rows = [future.result(20) for future in [*first, *more]]
    finally:
        embedder.read = read  # type: ignore[method-assign]
        room.stop()
    assert len(rows) == 301
    assert sum(map(len, sizes)) == 301
    assert len(sizes) <= 4
    for batch in sizes:
        assert len(batch) * max(batch) <= BATCH_TOKENS
    assert room.running == 0


def test_more_texts_than_may_wait_are_refused(serve: Callable[..., str], embedder: Reader) -> None:
    assert post(serve(embedder, waiting=2), "embeddings", {"input": TEXTS}).status_code == 503
    room = ReadingRoom(embedder, waiting=1)
    room.start()
    try:
        with pytest.raises(Busy):
            room.hand_in([Read([5]), Read([6])])
    finally:
        room.stop()


def test_many_clients_are_answered_as_one(serve: Callable[..., str], labelled: Reader) -> None:
    url = serve(labelled)
    expected = [post(url, "classify", {"input": text}).json()["data"][0]["probs"] for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: post(url, "classify", {"input": TEXTS[number % 3]}).json(), range(24)))
    for number, body in enumerate(found):
        assert body["data"][0]["probs"] == pytest.approx(expected[number % 3], abs=1e-5)
