"""Guessing the next tokens from the text itself: what followed the last few tokens the last time they stood there.

Checking a guess costs little more than a step, since a step's time is spent reading weights (prompt lookup decoding,
Saxena 2023). Greedy texts are the same with and without it.
"""

from collections.abc import Sequence
from typing import Final

TOKENS: Final = 4  # guessed at once
_LONGEST: Final = 3
_WINDOW: Final = 2048


def guess(tokens: Sequence[int]) -> list[int]:
    """Up to TOKENS tokens that may follow; empty if the end of `tokens` has not stood there before."""
    text = list(tokens[-_WINDOW:])
    for size in range(_LONGEST, 1, -1):
        end = text[-size:]
        for at in range(len(text) - size - 1, -1, -1):
            if text[at] == end[0] and text[at : at + size] == end:
                return text[at + size : at + size + TOKENS]
    return []
