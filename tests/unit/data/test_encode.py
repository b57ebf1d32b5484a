import numpy as np

from llmos_cli.data.corpus import Piece
from llmos_cli.data.encode import encode_pieces
from llmos_cli.data.tokenizer import Encoding

WORDS = 1000


def encoding() -> Encoding:
    """A tokenizer that gives a text's words, which are numbers, as they are."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(WORDS)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Encoding(tokenizer, eos_id=WORDS, vocab_size=WORDS + 1, piece_chars=100)


def run(pieces: list[Piece]) -> tuple[list[int], list[int], int, int]:
    ids: list[int] = []
    ends: list[int] = []
    text_bytes = batches = 0
    for tokens in encode_pieces(iter(pieces), encoding(), np.dtype("<u2")):
        assert tokens.ids.dtype == np.dtype("<u2")
        ends += [len(ids) + end for end in tokens.ends]
        ids += tokens.ids.tolist()
        text_bytes += tokens.text_bytes
        batches += 1
    return ids, ends, text_bytes, batches


def test_every_document_ends_once_however_many_pieces_it_has() -> None:
    pieces = [Piece("1 2 3", True), Piece("4 5", False), Piece(" 6", False), Piece(" 7", True), Piece("8", True)]
    ids, ends, text_bytes, _ = run(pieces)
    assert ids == [1, 2, 3, WORDS, 4, 5, 6, 7, WORDS, 8, WORDS]
    assert ends == [4, 9, 11]
    assert text_bytes == sum(len(piece.text) for piece in pieces)


def test_order_holds_across_batches() -> None:
    pieces = [Piece(" ".join(str((number + k) % WORDS) for k in range(5000)), True) for number in range(150)]
    ids, ends, _, batches = run(pieces)
    assert batches > 1
    expected = [[(number + k) % WORDS for k in range(5000)] + [WORDS] for number in range(150)]
    assert ids == [token for document in expected for token in document]
    assert ends == [5001 * (number + 1) for number in range(150)]


def test_bytes_are_counted_not_characters() -> None:
    assert run([Piece("你", True)])[2] == 3


def test_no_text_gives_no_tokens() -> None:
    assert run([]) == ([], [], 0, 0)
