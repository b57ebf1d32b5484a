from hypothesis import given
from hypothesis import strategies as st

from llmos_cli.serve.text import Detokenizer, TextStream


def latin(ids: list[int]) -> str:
    """A decoder of bytes, as byte-level tokenizers have it."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(data: bytes, stop: tuple[str, ...] = (), prompt: list[int] | None = None) -> list[str]:
    stream = TextStream(latin, prompt or [], stop)
    found = []
    for byte in data:
        found.append(stream.push(byte))
        if stream.stopped:
            return found
    return [*found, stream.flush()]


def test_a_character_comes_whole_when_its_last_byte_has_come() -> None:
    assert pieces("a€🙂b".encode()) == ["a", "", "", "€", "", "", "", "🙂", "b", ""]


def test_bytes_that_are_no_character_are_shown_without_waiting_for_ever() -> None:
    stream = Detokenizer(latin, [])
    shown = [stream.push(0xFF) for _ in range(20)]
    assert "".join(shown) + stream.flush() == "\ufffd" * 20
    assert len("".join(shown)) >= 16


def test_an_unfinished_character_at_the_end_is_shown_as_the_decoder_shows_it() -> None:
    assert "".join(pieces("é".encode() + b"\xe2\x82")) == "é\ufffd"


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert "".join(pieces(text.encode("utf-8"))) == text


@given(st.binary(max_size=64))
def test_any_bytes_come_back_as_the_decoder_shows_them(data: bytes) -> None:
    assert "".join(pieces(data)) == data.decode("utf-8", errors="replace")


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_prompt_is_context_and_not_part_of_the_text(prompt: str, text: str) -> None:
    assert "".join(pieces(text.encode(), prompt=list(prompt.encode()))) == text


def test_a_stop_string_across_tokens_is_never_shown_nor_its_beginning() -> None:
    found = pieces(b"say END and more", ("END",))
    assert found == ["s", "a", "y", " ", "", "", ""]


def test_text_held_for_a_stop_string_comes_when_it_turns_out_otherwise() -> None:
    assert "".join(pieces(b"ENENDX", ("ENDY",))) == "ENENDX"
    assert "".join(pieces(b"EN", ("END",))) == "EN"


@given(st.text(alphabet="abc", max_size=40), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4))
def test_the_text_ends_where_the_first_stop_string_is_completed(text: str, stops: list[str]) -> None:
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    found = pieces(text.encode(), tuple(stops))
    assert "".join(found) == expected
    assert not any(stop in "".join(found) for stop in stops)


def test_real_tokens_give_the_tokenizers_own_text(build_tokenizer) -> None:
    tokenizer = build_tokenizer()
    text = "Grüße 🙂 你好 fox 鯨 the end"
    ids = tokenizer.encode(text)
    decode = tokenizer.backend_tokenizer.decode
    stream = TextStream(decode, [], ())
    shown = [stream.push(token) for token in ids]
    assert "".join(shown) + stream.flush() == text
    assert "\ufffd" not in "".join(shown)
