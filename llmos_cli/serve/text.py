"""Tokens in, text out: detokenises one token at a time, holds back unfinished characters, cuts at stop strings.

What comes out, joined, is `decode(tokens)` up to the first stop string. A piece never ends inside a character and
never shows the beginning of what may still become a stop string. Knows nothing of models.
"""

from collections.abc import Callable, Sequence
from typing import Final

_UNFINISHED: Final = "�"  # what decoders show for bytes that are not (yet) a character
_CHARACTER_TOKENS: Final = 4  # a character has at most 4 bytes, so it spans at most 4 tokens
_CONTEXT_MAX: Final = 64
_CONTEXT_TOKENS: Final = 5  # of the prompt: decoders that join words look at what stands before


class Detokenizer:
    """Decodes only the few tokens that are not settled yet, after those before them: constant work a token."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        context = list(prompt[-_CONTEXT_TOKENS:])
        self._settled = [] if decode(context).endswith(_UNFINISHED) else context
        self._open: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; may be empty."""
        self._open.append(token)
        text = self._text(len(self._open))
        if not text.endswith(_UNFINISHED):
            return self._settle(len(self._open), text)
        if len(self._open) > _CHARACTER_TOKENS:
            # too long for one character: the oldest of it will never be one, only the newest may
            count = len(self._open) - (_CHARACTER_TOKENS - 1)
            return self._settle(count, self._text(count))
        return ""

    def flush(self) -> str:
        """What was held back, as the decoder shows it."""
        return self._settle(len(self._open), self._text(len(self._open)))

    def _text(self, count: int) -> str:
        before = self._decode(self._settled)
        return self._decode(self._settled + self._open[:count])[len(before) :]

    def _settle(self, count: int, text: str) -> str:
        # a token without text (a special one) must not become the whole context of the next
        self._settled = self._open[:count] if text else (self._settled + self._open[:count])[-_CONTEXT_MAX:]
        self._open = self._open[count:]
        return text


class TextStream:
    """A detokenizer with stop strings; `stopped` is set once one was met, and nothing comes after."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(decode, prompt)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that may be shown now."""
        return self._release(self._detokenizer.push(token), final=False)

    def flush(self) -> str:
        """The rest, at the end."""
        return self._release(self._detokenizer.flush(), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
