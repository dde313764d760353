"""A secret mark in a system prompt, and whether an answer holds it: in any case or spacing, backwards, in hexadecimal or in base64."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence

from stages.serve.guard.finders import Answer, Span
from stages.serve.guard.folded import fold

LEAST = 8
"""Letters of a form, and of the mark itself without its prefix, from which it is no chance."""


def forms(secret: str) -> tuple[set[str], set[str]]:
    """What to look for: on letters and digits alone, case-folded; and on the text without blanks as it came.

    A mark that is short without its prefix is looked for as a whole, and one that is short at all only in its long coded forms.
    """
    tail = secret.rpartition("-")[2]
    core = bare(tail if len(bare(tail)) >= LEAST else secret)
    plain = {core, core[::-1]}
    coded = {
        form
        for said in (secret, secret.lower(), secret.upper(), *((tail, tail.lower()) if len(bare(tail)) >= LEAST else ()))
        for form in (said.encode().hex(), *(base64.b64encode(b" " * shift + said.encode()).decode()[(4 * shift + 2) // 3 : -4] for shift in range(3)))
    }
    return {form for form in plain if len(form) >= LEAST}, {form for form in coded if len(form) >= LEAST}


def bare(text: str) -> str:
    """Letters and digits alone, as the rules read them."""
    return "".join(c for c in map(fold, text) for c in c if c.isascii() and c.isalnum())


def leaks(answer: str, secret: str) -> bool:
    """Whether an answer holds the secret."""
    plain, coded = forms(secret)
    said, dense = bare(answer), re.sub(r"\s", "", answer)
    return any(form in said for form in plain) or any(form in dense for form in coded)


class Canary:
    """The marks of one conversation's system prompt; a find is refused."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._plain, self._coded = set[str](), set[str]()
        for secret in secrets:
            plain, coded = forms(secret)
            self._plain |= plain
            self._coded |= coded
        self.any = bool(self._plain | self._coded)
        self._longest = max(map(len, self._plain | self._coded), default=0)

    def hold(self, answer: Answer, start: int) -> int:
        """From where the end is the beginning of a form."""
        places = [len(answer.raw)]
        for letters, wanted in self._views(answer.raw, start):
            text = "".join(c for c, _ in letters)
            size = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if any(form.startswith(text[-n:]) for form in wanted)), 0)
            if size:
                places.append(letters[-size][1])
        return min(places)

    def find(self, answer: Answer, start: int, final: bool) -> Iterable[Span]:
        """Each form where it stands."""
        for letters, wanted in self._views(answer.raw, start):
            text = "".join(c for c, _ in letters)
            for form in sorted(wanted):
                at = text.find(form)
                if at >= 0:
                    yield Span(start=letters[at][1], end=letters[at + len(form) - 1][1] + 1, name="canary", action="refuse")

    def _views(self, raw: str, start: int) -> Sequence[tuple[list[tuple[str, int]], set[str]]]:
        """The text from `start` on, in both ways of reading: characters with their places, and the forms."""
        plain = [(c, at) for at, char in enumerate(raw[start:], start) for c in bare(char)]
        dense = [(char, at) for at, char in enumerate(raw[start:], start) if not char.isspace()]
        return (plain, self._plain), (dense, self._coded)
