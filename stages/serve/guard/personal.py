"""Personal data in an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from conf.schema import Consequence, PiiKind
from stages.serve.guard.finders import CONTEXT, Answer, Span, boundary, word

GROUP = re.compile(r"[^\W_]+|[\W_]+")
OPENING = "+("
EXTENSION = frozenset({"x", "ext", "extension"})


def number(raw: str, start: int) -> int:
    """Where the number in groups at the end begins, of a card, an account or a telephone, that more groups may follow; the length where there is none."""
    least, found = max(start, len(raw) - CONTEXT), len(raw)
    for match in reversed(list(GROUP.finditer(raw, least))):
        group = match[0]
        if group[0].isalnum():
            if not (any(c.isdigit() for c in group) or (group.isupper() and len(group) <= 4) or any(word.startswith(group.lower()) for word in EXTENSION)):
                break
            found = match.start()
        else:
            found = min(found, match.start() + min((group.find(c) for c in OPENING if c in group), default=len(group)))
            if len(group) > 4 or "\n" in group:
                break
    return found


class Personal:
    """Personal data, by `stages.pii`; what the user himself wrote does not count."""

    def __init__(self, kinds: dict[PiiKind, Consequence], regions: Sequence[str], said: str) -> None:
        self._kinds, self._regions, self._said = kinds, regions, said

    def hold(self, answer: Answer, start: int) -> int:
        """From the last word on, or the last groups of a number."""
        return min(word(answer.raw, start), number(answer.raw, start))

    def find(self, answer: Answer, start: int, final: bool) -> Iterable[Span]:
        """By kind; what one hides that stands before it too."""
        from stages.pii import ROUNDS, find

        begin = boundary(answer.raw, start)
        left = answer.raw[begin:]
        for _ in range(ROUNDS):
            for span in (found := find(left, list(self._kinds), self._regions)):
                if begin + span.end > start and answer.raw[begin + span.start : begin + span.end] not in self._said:
                    yield Span(start=begin + span.start, end=begin + span.end, name=span.kind, action=self._kinds[span.kind])
                left = left[: span.start] + "<" * (span.end - span.start) + left[span.end :]
            if not found:
                break
