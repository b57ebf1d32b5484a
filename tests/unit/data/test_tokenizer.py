import json
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.data.corpus import CUT_BEFORE, PIECE_CHARS, Corpus, plan_corpus
from llmos_cli.data.inputs import find_inputs
from llmos_cli.data.survey import read_texts
from llmos_cli.data.tokenizer import END_OF_TEXT, Encoding, make_encoding, read_folder, train_tokenizer
from llmos_cli.errors import Damaged, LlmosError, NotFound, UsageError
from llmos_cli.progress import Progress, Silent

TINY = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "</s>",
    },
    "added_tokens": [
        {
            "id": 3,
            "content": "</s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
    ],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "BPE",
        "dropout": 0.9,
        "unk_token": "?",
        "vocab": {"a": 0, "b": 1, "?": 2, "</s>": 3, "ab": 7},
        "merges": [["a", "b"]],
    },
}


def plan(folder: Path) -> Corpus:
    return plan_corpus(find_inputs([str(folder)], Silent()), skip_bad=False, progress=Silent())


def train(folder: Path, vocab_size: int, progress: Progress | None = None, **options: Any) -> dict[str, bytes]:
    corpus = plan(folder)
    return train_on(corpus, vocab_size, progress, **options)


def train_on(corpus: Corpus, vocab_size: int, progress: Progress | None = None, **options: Any) -> dict[str, bytes]:
    texts = read_texts(corpus, "lm", {"text": "text"}, set(), PIECE_CHARS)
    return train_tokenizer(texts, corpus.size, vocab_size, progress or Silent(), **options)


def given_files(table: object = TINY, **config: object) -> dict[str, bytes]:
    config = config or {"eos_token": "</s>"}
    return {"tokenizer.json": json.dumps(table).encode(), "tokenizer_config.json": json.dumps(config).encode()}


def ids(encoding: Encoding, text: str) -> list[int]:
    return list(encoding.tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("the cat sat on the mat, the dog sat on the cat\n" * 50)
    (folder / "b.py").write_text("def f(x):\n    return {'x': x + 1}\n" * 50)
    return train(folder, 280)


def test_training_twice_gives_the_same_bytes(folder: Path) -> None:
    assert train(folder, 300) == train(folder, 300)


def test_ctrl_c_is_answered_while_native_code_computes(folder: Path) -> None:
    main = threading.current_thread()

    class PressesCtrlC(Silent):
        def task(self, label: str, *, total: int | None = None, unit: str = "B") -> AbstractContextManager[Any]:
            return nullcontext(self)

        def advance(self, amount: int = 1) -> None:
            if threading.current_thread() is main:
                raise KeyboardInterrupt

        def note(self, text: str) -> None:
            pass

    corpus = plan(folder)
    with pytest.raises(KeyboardInterrupt):
        train_on(corpus, 300, PressesCtrlC())


def test_a_file_that_changes_under_the_training_is_named(folder: Path) -> None:
    corpus = plan(folder)
    (folder / "a.txt").write_text("other words")
    with pytest.raises(LlmosError, match=r"a\.txt"):
        train_on(corpus, 300)


@given(text=st.text())
def test_any_text_comes_back_from_its_tokens(trained: dict[str, bytes], text: str) -> None:
    encoding = make_encoding(trained, "it")
    assert encoding.tokenizer.decode(ids(encoding, text), skip_special_tokens=False) == text
    assert encoding.eos_id not in ids(encoding, text)


def test_the_vocabulary_holds_every_byte_and_merges(trained: dict[str, bytes]) -> None:
    encoding = make_encoding(trained, "it")
    assert encoding.vocab_size == 280
    assert len(ids(encoding, " the")) == 1


def test_a_small_corpus_gives_a_small_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    assert make_encoding(train(tmp_path, 4096), "it").vocab_size == 258


def test_the_end_of_text_written_in_a_text_is_text(trained: dict[str, bytes]) -> None:
    encoding = make_encoding(trained, "it")
    text = f"a {END_OF_TEXT} b"
    assert encoding.eos_id not in ids(encoding, text)
    assert encoding.tokenizer.decode(ids(encoding, text), skip_special_tokens=False) == text


def test_transformers_loads_what_was_trained(trained: dict[str, bytes], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, data in trained.items():
        (tmp_path / name).write_bytes(data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.eos_token_id == make_encoding(trained, "it").eos_id
    text = "the  cat\n\treturn x, 你好"
    assert tokenizer(text)["input_ids"] == ids(make_encoding(trained, "it"), text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(
    left=st.text(alphabet="abz09é你", min_size=1, max_size=8),
    mark=st.sampled_from(CUT_BEFORE),
    right=st.text(alphabet="abz0 \n\r\t.,'é你。", max_size=8),
)
def test_byte_level_tokens_do_not_reach_across_a_cut(
    trained: dict[str, bytes], left: str, mark: str, right: str
) -> None:
    encoding = make_encoding(trained, "it")
    assert encoding.piece_chars == PIECE_CHARS
    assert ids(encoding, left) + ids(encoding, mark + right) == ids(encoding, left + mark + right)


def test_a_tokenizer_that_marks_where_text_begins_gets_documents_whole() -> None:
    table = {**TINY, "normalizer": {"type": "Prepend", "prepend": "a"}}
    assert make_encoding(given_files(table), "it").piece_chars > PIECE_CHARS


def test_a_given_tokenizer_neither_cuts_nor_pads_nor_drops() -> None:
    encoding = make_encoding(given_files(), "it")
    assert [ids(encoding, "abababab") for _ in range(20)] == [[7, 7, 7, 7]] * 20
    assert ids(encoding, "a") == [0]


def test_an_end_of_text_that_is_not_marked_special_is_still_not_read_from_text() -> None:
    encoding = make_encoding(given_files(), "it")
    assert encoding.eos_id == 3
    assert 3 not in ids(encoding, "a</s>b")


def test_vocab_size_counts_holes_in_the_ids() -> None:
    assert make_encoding(given_files(), "it").vocab_size == 8


@pytest.mark.parametrize("config", [{"eos_token": "</s>"}, {"eos_token": {"content": "</s>", "lstrip": False}}])
def test_the_end_of_text_is_a_string_or_a_table(config: dict[str, object]) -> None:
    assert make_encoding(given_files(**config), "it").eos_id == 3


def test_the_end_of_text_may_stand_in_the_special_tokens_map() -> None:
    files = given_files(eos_token=None) | {"special_tokens_map.json": b'{"eos_token": "</s>"}'}
    assert make_encoding(files, "it").eos_id == 3


@pytest.mark.parametrize("config", [{"model_max_length": 5}, {"eos_token": None}, {"eos_token": ""}])
def test_a_tokenizer_without_an_end_of_text_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="tokenizer of it does not say which token ends a text"):
        make_encoding(given_files(**config), "it")


def test_an_end_of_text_that_is_no_token_is_refused() -> None:
    with pytest.raises(UsageError, match="no token '<eot>'"):
        make_encoding(given_files(eos_token="<eot>"), "it")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"model": {"type": "Nope"}}', b"\xff"])
def test_a_broken_tokenizer_file_is_named(data: bytes) -> None:
    with pytest.raises(Damaged, match=r"the tokenizer\.json of it"):
        make_encoding(given_files() | {"tokenizer.json": data}, "it")


def test_a_folder_gives_its_tokenizer_files_byte_for_byte(tmp_path: Path) -> None:
    files = given_files() | {"chat_template.jinja": b"{{ x }}"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_bytes(b"{}")
    assert read_folder(tmp_path) == files


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no tokenizer\.json in"):
        read_folder(tmp_path)


def test_a_wordpiece_is_berts_own_kind(folder: Path, tmp_path: Path) -> None:
    files = train(folder, 300, method="wordpiece")
    assert files == train(folder, 300, method="wordpiece")
    encoding = make_encoding(files, "it")
    assert (encoding.pad_id, encoding.begin_id, encoding.eos_id, encoding.mask_id) == (0, 2, 3, 4)
    assert encoding.tokenizer.encode("The cat, 你好").tokens == ["[CLS]", "the", "cat", ",", "你", "好", "[SEP]"]
    assert 4 not in encoding.tokenizer.encode("a [MASK]").ids
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert loaded.mask_token_id == 4
    assert loaded("the cat", "sat")["input_ids"] == encoding.tokenizer.encode("the cat", "sat").ids
