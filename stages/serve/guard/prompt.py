"""Long pieces of the system prompt in an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from conf.schema import Consequence
from stages.serve.guard.finders import Answer, Span
from stages.serve.guard.folded import Folded


class Prompt:
    """So many words in a row of a system prompt."""

    def __init__(self, system: str, count: int, action: Consequence) -> None:
        words = _words(Folded(system).text)
        self._system, self._count, self._action = " " + " ".join(w for w, _, _ in words) + " ", count, action
        self.any = len(words) >= count

    def hold(self, answer: Answer, start: int) -> int:
        """From the first word on of the longest end that stands in the system prompt too."""
        text, at = answer.folded.text, answer.folded.at(start)
        words = _words(text[at:])
        closing = "" if words and words[-1][2] == len(text) - at else " "
        for first in range(max(0, len(words) - self._count - 1), len(words)):
            if " " + " ".join(w for w, _, _ in words[first:]) + closing in self._system:
                return answer.folded.place(at + words[first][1])
        return len(answer.raw)

    def find(self, answer: Answer, start: int, final: bool) -> Iterable[Span]:
        """Runs, joined where they overlap."""
        at = answer.folded.at(start)
        words, last = _words(answer.folded.text[at:]), -1
        begin = 0
        for first in range(len(words) - self._count + 1):
            if " " + " ".join(w for w, _, _ in words[first : first + self._count]) + " " in self._system:
                if first > last:
                    if last >= 0:
                        yield self._span(answer, at, words, begin, last)
                    begin = first
                last = first + self._count - 1
        if last >= 0:
            yield self._span(answer, at, words, begin, last)

    def _span(self, answer: Answer, at: int, words: Sequence[tuple[str, int, int]], first: int, last: int) -> Span:
        start, end = answer.folded.span(at + words[first][1], at + words[last][2])
        return Span(start=start, end=end, name="prompt", action=self._action)


def _words(text: str) -> list[tuple[str, int, int]]:
    """The words of a folded text, with their places."""
    return [(m[0], m.start(), m.end()) for m in re.finditer(r"\w+", text)]
