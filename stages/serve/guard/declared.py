"""The declared rules and topics on an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conf.errors import ConfigError
from stages.serve.guard.finders import Answer, Slow, Span
from stages.serve.guard.rules import Rule, Rules

IMPOSSIBLE = r"[^\x00-\U0010FFFF]"
"""Matches no character; after a pattern it makes every match that reaches the end of the text an unfinished one."""


class Declared:
    """The rules and topics for answers, by `regex`, which can say that a text may still become a match."""

    def __init__(self, rules: Sequence[Rule], budget_ms: float) -> None:
        """Raises: ConfigError: a pattern is none for `regex`."""
        import regex

        self._budget = budget_ms / 1e3
        self._excuses = Rules(rules)
        self._rules = [rule for rule in rules if rule.action != "allow"]
        flags = regex.IGNORECASE | regex.ASCII
        try:
            self._patterns = [(rule, regex.compile(rule.lookaround, flags)) for rule in self._rules]
            self._open = regex.compile(f"(?:{'|'.join(rule.lookaround for rule in rules)}){IMPOSSIBLE}", flags)
        except regex.error as error:
            raise ConfigError(f"serve.guard: a rule or topic for what goes out cannot be read in pieces: {error}", "write it without that construct") from error

    def hold(self, answer: Answer, start: int) -> int:
        """From the first place on from which a match may go beyond the end."""
        try:
            match = self._open.search(answer.folded.text, answer.folded.at(start), partial=True, timeout=self._budget)
        except TimeoutError as error:
            raise Slow from error
        return answer.folded.place(match.start()) if match else len(answer.raw)

    def find(self, answer: Answer, start: int, final: bool) -> Iterable[Span]:
        """Matches that no exception covers."""
        text, at = answer.folded.text, answer.folded.at(start)
        excused = self._excuses.excused(text)
        try:
            for rule, pattern in self._patterns:
                for match in pattern.finditer(text, at, timeout=self._budget):
                    if match.end() > match.start() and not any(s <= match.start() and match.end() <= e for s, e in excused):
                        first, last = answer.folded.span(match.start(), match.end())
                        yield Span(start=first, end=last, name=rule.name, action=rule.action)
        except TimeoutError as error:
            raise Slow from error
