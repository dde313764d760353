"""What is looked for in an answer while it grows: each finder says where its finds are, and from where on the end may still become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from stages.serve.guard.folded import Folded
from stages.serve.guard.rules import WITHOUT_BLANKS, placeholder

CONTEXT = 256
"""Characters before the part that is not released yet that a finder reads again: what stands in front of a key says what it is."""


class Slow(Exception):
    """A finder took too long."""


@dataclass(frozen=True, order=True, kw_only=True)
class Span:
    """A find: `raw[start:end]` of an answer."""

    start: int
    end: int
    name: str
    action: str

    @property
    def mask(self) -> str:
        """What is read in its place."""
        return placeholder(self.name)


@dataclass
class Answer:
    """What a model has said so far."""

    raw: str
    folded: Folded
    _plainly: Folded = field(default_factory=lambda: Folded(plainly=True))

    def push(self, piece: str) -> None:
        """Add to the end."""
        self.raw += piece
        self.folded.push(piece)

    @property
    def plainly(self) -> Folded:
        """The same with look-alikes in their own script; folded when it is asked for."""
        self._plainly.push(self.raw[self._plainly.length :])
        return self._plainly


class Finder(Protocol):
    """One kind of find."""

    def hold(self, answer: Answer, start: int) -> int:
        """From where on, not before `start`, the text may still become a find; the length where it cannot."""

    def find(self, answer: Answer, start: int, final: bool) -> Iterable[Span]:
        """The finds that begin at `start` or later, or reach it."""


def word(raw: str, start: int) -> int:
    """Where the unfinished word at the end begins, not before `start`; scripts without blanks have none, and no finder's form is written in them."""
    at, least = len(raw), max(start, len(raw) - CONTEXT)
    while at > least and not raw[at - 1].isspace() and not WITHOUT_BLANKS.match(raw[at - 1]):
        at -= 1
    return at


def boundary(raw: str, start: int) -> int:
    """Where reading again begins: about `CONTEXT` characters before `start`, at a blank."""
    begin = max(start - CONTEXT, 0)
    blank = raw.find(" ", begin, start) if begin else -1
    return blank + 1 if blank >= 0 else begin
