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
        self._plainly = [rule for rule in rules if rule.plainly]
        try:
            self._patterns = [(rule, regex.compile(rule.lookaround, flags)) for rule in self._rules]
            self._open, self._open_plainly = (
                regex.compile(f"(?:{'|'.join(rule.lookaround for rule in some)}){IMPOSSIBLE}", flags) for some in (rules, self._plainly or rules)
            )
        except regex.error as error:
            raise ConfigError(f"serve.guard: a rule or topic for what goes out cannot be read in pieces: {error}", "write it without that construct") from error

    def hold(self, answer: Answer, start: int) -> int:
        """From the first place on from which a match may go beyond the end."""
        places = [len(answer.raw)]
        try:
            for folded, pattern in ((answer.folded, self._open), *([(answer.plainly, self._open_plainly)] if self._apart(answer) else [])):
                match = pattern.search(folded.text, folded.at(start), partial=True, timeout=self._budget)
                places += [folded.place(match.start())] if match else []
        except TimeoutError as error:
            raise Slow from error
        return min(places)

    def _apart(self, answer: Answer) -> bool:
        """Whether the answer is read with look-alikes in their own script, too."""
        return bool(self._plainly) and not answer.raw.isascii()

    def find(self, answer: Answer, start: int, final: bool) -> Iterable[Span]:
        """Matches that no exception covers."""
        try:
            for folded in (answer.folded, answer.plainly) if self._apart(answer) else (answer.folded,):
                at, excused = folded.at(start), self._excuses.excused(folded.text)
                for rule, pattern in self._patterns:
                    if folded is answer.folded or rule.plainly:
                        for match in pattern.finditer(folded.text, at, timeout=self._budget):
                            if match.end() > match.start() and not any(s <= match.start() and match.end() <= e for s, e in excused):
                                first, last = folded.span(match.start(), match.end())
                                yield Span(start=first, end=last, name=rule.name, action=rule.action)
        except TimeoutError as error:
            raise Slow from error
