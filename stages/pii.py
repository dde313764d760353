"""Personal data in text: found by checksums and numbering plans, written over by its kind (`<EMAIL>`).

What must be exact comes from a library: telephone numbers from phonenumbers, everything with check digits from python-stdnum,
addresses of machines from ipaddress. Both import in 0.15 s and 22 MB; presidio's recognisers, which check the same digits,
bring spaCy and took 12 s and 444 MB, in every worker and in the service.

Time grows with the length of a text and no faster, whatever stands in it: a find never reaches over the end of a line, and ROUNDS bounds
how often a line is looked at.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conf.schema import PiiKind
from stages.pii_finders import FINDERS, has_url

DIGIT = re.compile(r"\d")
WORD = re.compile(r"\s*\S+|\s+")
ROUNDS = 4
"""Most times that finds in a line are replaced, each time after another look. Ordinary text takes one, a row of four card numbers four."""


@dataclass(frozen=True, order=True)
class Span:
    """One piece of personal data: `text[start:end]`."""

    start: int
    end: int
    kind: PiiKind


def find(text: str, kinds: Sequence[PiiKind], regions: Sequence[str]) -> list[Span]:
    """Personal data of these kinds, in order, without overlap.

    Args:
        text: what is searched.
        kinds: what is searched for.
        regions: ISO 3166 codes of the countries whose national forms of telephone and identity numbers count.
    """
    if not worth_a_look(text):
        return []
    found: list[Span] = []
    for kind, finder in FINDERS.items():
        if kind in kinds:
            for start, end in finder(text, tuple(regions)):
                at = bisect_left(found, start, key=lambda span: span.start)
                if (at == 0 or found[at - 1].end <= start) and (at == len(found) or end <= found[at].start):
                    found.insert(at, Span(start, end, kind))
    return found


def worth_a_look(text: str) -> bool:
    """Whether there is anything that all personal data has one of."""
    return "@" in text or "::" in text or has_url(text) or DIGIT.search(text) is not None


def redact(text: str, kinds: Sequence[PiiKind], regions: Sequence[str]) -> str:
    """The text with `<KIND>` in the place of each find, until there is none left."""
    return rewrite(text, kinds, regions, lambda kind, _: f"<{kind.upper()}>")


def rewrite(text: str, kinds: Sequence[PiiKind], regions: Sequence[str], write: Callable[[PiiKind, str], str]) -> str:
    """The text with another one in the place of each find, until there is none left.

    Args:
        write: from the kind of a find and the find itself to what stands in its place: in angle brackets, so that no find reaches into it.
    """
    return "\n".join(_rewrite(line, kinds, regions, write) for line in text.split("\n")) if worth_a_look(text) else text


def _rewrite(line: str, kinds: Sequence[PiiKind], regions: Sequence[str], write: Callable[[PiiKind, str], str]) -> str:
    """What was hidden behind a find may come to light when it is gone: a line in which that goes on loses all words that could be personal data."""
    done = line
    for _ in range(ROUNDS):
        if not (spans := find(done, kinds, regions)):
            return done
        pieces, last = [], 0
        for span in spans:
            pieces += [done[last : span.start], write(span.kind, done[span.start : span.end])]
            last = span.end
        done = "".join([*pieces, done[last:]])
    if not (spans := find(done, kinds, regions)):
        return done
    pieces = []
    for suspect, words in itertools.groupby(WORD.findall(line), worth_a_look):
        run = "".join(words)
        blank = len(run) - len(run.lstrip())
        pieces += [run[:blank], write(spans[0].kind, run[blank:]) if suspect else run[blank:]]
    return "".join(pieces)


def pseudonym(key: str, kinds: Sequence[PiiKind], regions: Sequence[str]) -> str:
    """The key, or a digest of it if it holds personal data: it still keeps rows together, and names nobody."""
    return hashlib.sha256(key.encode()).hexdigest()[:16] if find(key, kinds, regions) else key
