"""The guard on what goes out: it reads an answer while the model says it, and lets go only of what can no longer become a find.

What a client gets of a stream is thus what it would get of the whole answer, however it was cut into pieces (up to `hold` characters). What is held back
is the unfinished word at the end, mostly one token: `python -m tests.bench guard_runtime` measures it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from conf.patterns import compile_pattern
from conf.schema import ServeGuard
from stages.pii import redact
from stages.serve.guard.canary import Canary
from stages.serve.guard.declared import Declared
from stages.serve.guard.finders import CONTEXT, Answer, Finder, Slow, Span
from stages.serve.guard.folded import Folded
from stages.serve.guard.personal import Personal
from stages.serve.guard.prompt import Prompt
from stages.serve.guard.rules import declared
from stages.serve.guard.secrets import Secrets, scanner
from stages.serve.guard.verdict import Finding, Verdict

LOOK = 512
"""Most characters of an answer that are taken at a time: a long one is many looks, each within the budget."""
LEAVES = CONTEXT // 2
"""Least characters that leave at a time of a long part that is held back, a column of numbers say: each look reads `CONTEXT` characters again."""
EXAMPLES = "+1 201 555 0123, GB29 NWBK 6016 1331 9268 19, 4111 1111 1111 1111, 943 476 5919, 078-05-1120"
"""Made numbers: the first look at their like loads the plans that they are checked with, and that is no answer's fault."""


class Outgoing:
    """What is looked for in every answer."""

    def __init__(self, settings: ServeGuard) -> None:
        """Args: settings: `serve.guard`.

        Raises:
            ConfigError: a rule or topic is wrong, or the rules for secrets cannot be loaded.
        """
        self.settings = settings
        rules = declared(settings, "out")
        self._declared = Declared(rules, settings.budget_ms.answer) if any(rule.action != "allow" for rule in rules) else None
        self._canary = compile_pattern(settings.answer.canary) if settings.answer.canary else None
        if settings.enabled and settings.answer.secrets:
            scanner()
        if settings.enabled and settings.answer.personal:
            redact(EXAMPLES, list(settings.answer.personal), settings.answer.phone_regions)

    def watch(self, system: str = "", said: str = "") -> Watch:
        """What reads one answer.

        Args:
            system: the system prompt of the conversation.
            said: what the user wrote in his own words.
        """
        wanted = self.settings.answer
        finders: list[Finder] = []
        if not self.settings.enabled:
            return Watch(finders, self.settings)
        if wanted.personal:
            finders.append(Personal(wanted.personal, wanted.phone_regions, said))
        if wanted.secrets:
            finders.append(Secrets(wanted.secrets))
        if wanted.prompt and (prompt := Prompt(system, wanted.prompt_words, wanted.prompt)).any:
            finders.append(prompt)
        if self._canary is not None and (canary := Canary(m[0] for m in self._canary.finditer(system))).any:
            finders.append(canary)
        if self._declared is not None:
            finders.append(self._declared)
        return Watch(finders, self.settings)


class Watch:
    """Reads one answer.

    Attributes:
        refused: nothing more may leave.
        text: what was let go.
        settled: characters of the model's own text up to which it was let go, masked or not.
        masked: parts of the model's own text that were written over, sorted.
        longest_ms: the longest look, in milliseconds of processor time.
    """

    def __init__(self, finders: Sequence[Finder], settings: ServeGuard) -> None:
        self._finders, self._settings = finders, settings
        self._answer = Answer("", Folded())
        self._findings: set[Finding] = set()
        self._ms = 0.0
        self.refused, self.text, self.settled, self.longest_ms = False, "", 0, 0.0
        self.masked: list[tuple[int, int]] = []

    def push(self, piece: str) -> str:
        """Take what the model said next; returns what may leave now."""
        return "".join(self._step(piece[at : at + LOOK], final=False) for at in range(0, len(piece), LOOK))

    def finish(self) -> str:
        """The model says no more; returns the rest that may leave."""
        return self._step("", final=True)

    def whole(self, text: str) -> str:
        """A whole answer as it may leave; where it is refused, what left before."""
        self.push(text)
        self.finish()
        return self.text

    def verdict(self) -> Verdict:
        """What was found so far."""
        return Verdict(direction="out", findings=tuple(sorted(self._findings, key=lambda f: f.name)), ms={"answer": self._ms})

    def _step(self, piece: str, final: bool) -> str:
        if self.refused:
            return ""
        began = time.thread_time()
        self._answer.push(piece)
        try:
            given = self._look(final)
        except Slow:
            given = self._late(final)
        took = (time.thread_time() - began) * 1e3
        self._ms += took
        self.longest_ms = max(self.longest_ms, took)
        if took > self._settings.budget_ms.answer and not self.refused:
            given = given if self._budget() else ""
        self.text += given
        return given

    def _budget(self) -> bool:
        """Note that a look took too long; returns whether the answer may go on."""
        self._findings.add(Finding(tier="answer", name="budget", action=self._settings.budget_ms.exceeded))
        self.refused = self._settings.budget_ms.exceeded == "refuse"
        return not self.refused

    def _late(self, final: bool) -> str:
        """What may leave of a text that could not be read in time."""
        if not self._budget():
            return ""
        start, self.settled = self.settled, len(self._answer.raw)
        return self._answer.raw[start:]

    def _look(self, final: bool) -> str:
        answer, start, most = self._answer, self.settled, self._settings.answer.hold
        end = len(answer.raw)
        hold = end if final else min((finder.hold(answer, start) for finder in self._finders), default=end)
        forced = final or end - hold > most
        if end - hold > most:
            if any(isinstance(finder, Secrets) and finder.head(answer, start) is not None for finder in self._finders):
                return self._refuse("secret")
            hold = end - most // 2
        if hold <= start or (not forced and hold - start < LEAVES < end - start):
            return ""
        spans = sorted(span for finder in self._finders for span in finder.find(answer, start, final) if span.start < hold)
        if not forced:
            for span in reversed(spans):
                if span.end > hold:
                    hold = span.start
        return self._release([span for span in spans if span.start < hold], hold)

    def _refuse(self, name: str) -> str:
        self._findings.add(Finding(tier="answer", name=name, action="refuse"))
        self.refused = True
        return ""

    def _release(self, spans: Sequence[Span], hold: int) -> str:
        start = self.settled
        if hold <= start:
            return ""
        for span in spans:
            self._findings.add(Finding(tier="answer", name=span.name, action=span.action))  # type: ignore[arg-type]
            if span.action == "refuse":
                self.refused = True
        if self.refused:
            return ""
        pieces = []
        for span in spans:
            if span.action == "mask":
                if span.start >= start:
                    pieces += [self._answer.raw[start : span.start], span.mask]
                elif span.end > start and not pieces:
                    pieces.append(span.mask)
                start = max(start, span.end)
                self.masked.append((span.start, span.end))
        end = max(hold, start)
        pieces.append(self._answer.raw[start:end])
        self.settled = end
        return "".join(pieces)
