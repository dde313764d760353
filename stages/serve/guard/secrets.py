"""Keys, tokens and private keys in an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from conf.errors import ConfigError
from conf.schema import Consequence
from stages.serve.guard.finders import Answer, Span, boundary, word

if TYPE_CHECKING:
    from kingfisher_sdk import Scanner

BEGIN, END = "-----BEGIN", "-----END"
HEAD = 60
"""Characters in which the head of a private key names it as one."""


class Secrets:
    """Keys and tokens, by Kingfisher's 488 rules.

    On 21 kinds of made keys and 2,158 harmless texts (`python -m tests.bench guard_runtime`): Kingfisher 1.5.0 finds 18 kinds (not AWS's key id without its
    secret, Telegram's, a password in an address) in 0.01 ms for 2,000 characters, detect-secrets 1.5.0 16 kinds in 0.56 ms; neither has a false alarm.
    """

    def __init__(self, action: Consequence) -> None:
        self._action = action

    def hold(self, answer: Answer, start: int) -> int:
        """From the last word on, or from the head of a key that has no end yet."""
        head = self.head(answer, start)
        return word(answer.raw, start) if head is None else head

    def head(self, answer: Answer, start: int) -> int | None:
        """Where a private key begins that has no end yet."""
        return next((head for head, end in self._keys(answer.raw, start) if end is None), None)

    def _keys(self, raw: str, start: int) -> Iterator[tuple[int, int | None]]:
        """Private keys from `start` on: where each begins, and where it ends; what begins within one is a part of it."""
        at = start if self._action != "flag" else len(raw)
        while (head := raw.find(BEGIN, at)) >= 0:
            end = raw.find(END, head)
            close = raw.find("-----", end + len(END)) if end >= 0 else -1
            if "PRIVATE KEY" in raw[head : head + HEAD]:
                yield head, close + 5 if close >= 0 else None
            elif len(raw) - head < HEAD:
                yield head, None  # it may still say so
                return
            at = close + 5 if close >= 0 else head + len(BEGIN)

    def find(self, answer: Answer, start: int, final: bool) -> Iterable[Span]:
        """All under one name; a key that is cut off counts to the end."""
        begin = boundary(answer.raw, start)
        data = answer.raw[begin:].encode()
        for finding in scanner().scan(data):
            at = finding.location
            first, last = (begin + len(data[: at[key]].decode(errors="ignore")) for key in ("start_offset", "end_offset"))
            if finding.visible and last > start:
                yield Span(start=first, end=last, name="secret", action=self._action)
        for head, end in self._keys(answer.raw, start):
            if end is not None or final:
                yield Span(start=head, end=len(answer.raw) if end is None else end, name="secret", action=self._action)


@lru_cache(maxsize=1)
def scanner() -> Scanner:
    """Kingfisher with all its rules: 0.3 s to load where they are compiled already, else 3 s.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from kingfisher_sdk import Rules as Catalogue
    from kingfisher_sdk import Scanner

    try:
        return Scanner(Catalogue(), dedup=False, base64=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"serve.guard.answer.secrets: the rules for secrets cannot be loaded: {error}", "install it anew, or set it to null") from error
