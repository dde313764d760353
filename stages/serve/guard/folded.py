"""A text as the rules read it, with the way back: which characters of the original a match stands for.

`normalise` character by character, so that a text may grow at its end. What needs more than one character to be undone (a payload in base64, say)
is found by `normalise` on the whole text, and has no place here.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache

from stages.serve.guard.normalise import normalise, plain


@lru_cache(maxsize=8192)
def fold(character: str) -> str:
    """One character as the rules read it; nothing for an invisible one."""
    return " " if character.isspace() else normalise(character)


@lru_cache(maxsize=8192)
def fold_plainly(character: str) -> str:
    """One character in its own script."""
    return " " if character.isspace() else plain(character)


class Folded:
    """A text that grows.

    Attributes:
        text: the folded text so far.
        length: of the original so far.
    """

    def __init__(self, text: str = "", *, plainly: bool = False) -> None:
        """Args: plainly: leave look-alikes in their own script."""
        self.text, self._places, self.length = "", list[int](), 0
        self._fold = fold_plainly if plainly else fold
        self.push(text)

    def push(self, text: str) -> None:
        """Add to the end."""
        pieces = []
        blank = self.text.endswith(" ")
        for at, character in enumerate(text, self.length):
            piece = self._fold(character)
            if piece == " " and blank:
                continue
            if piece:
                blank = piece == " "
                pieces.append(piece)
                self._places += [at] * len(piece)
        self.text += "".join(pieces)
        self.length += len(text)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Where a part of the folded text, which is not empty, stands in the original."""
        return self._places[start], self._places[end - 1] + 1

    def place(self, at: int) -> int:
        """Where a position of the folded text is in the original."""
        return self._places[at] if at < len(self._places) else self.length

    def at(self, place: int) -> int:
        """The first position of the folded text that stands for `place` of the original, or for what follows it."""
        return bisect_left(self._places, place)
