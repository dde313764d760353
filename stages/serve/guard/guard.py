"""The guard on what comes in: rules and a classifier on the user's own words and on each document that he quotes, and the verdict on them.

The service loads the very classifier that the pipeline trained and measured. A message is read in passages: the writer's own words, each quotation,
and, where it quotes something, the whole by the rules once more, so that nothing is hidden by cutting it in two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from conf.schema import Consequence, ServeGuard
from stages.serve.guard.classifier import Classifier
from stages.serve.guard.normalise import LEET, normalise, plain, views
from stages.serve.guard.quoted import NAMES, Quotation, own_words, quotations
from stages.serve.guard.rules import Rule, Rules, declared, overwrite
from stages.serve.guard.verdict import DocumentVerdict, Finding, Verdict, worst

REMOVED = "<DOCUMENT REMOVED>"
SYSTEM = ("system", "developer")
"""Roles of a system prompt, of which the second is the newer name."""


class Scorer(Protocol):
    """A classifier of any kind."""

    def score(self, text: str) -> float:
        """The probability of an attack; `text` as it came."""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A classifier and what follows from it."""

    name: str
    scorer: Scorer
    threshold: float
    action: Consequence
    budget_ms: float


@dataclass(frozen=True, kw_only=True)
class Message:
    """One text of a request."""

    text: str
    role: str = "user"
    name: str | None = None
    """Both as of OpenAI's messages."""
    trusted: bool = False
    """A system prompt of one who may write it: an instruction by trade. No classifier reads it and no rule refuses it; masks and documents stay."""


@dataclass(frozen=True, kw_only=True)
class Screened:
    """A request that was read."""

    verdict: Verdict
    texts: list[str]
    """What the model may read in the place of each message: masked where a rule says so."""
    own: str
    """What users wrote themselves, without quotations."""
    system: str = ""
    """The system prompt that the client brought."""


@dataclass
class Clock:
    """What the tiers have cost of one request, in milliseconds of this thread's processor time."""

    budgets: dict[str, float]
    spent: dict[str, float] = field(default_factory=dict)

    def over(self, tier: str) -> bool:
        """Whether a tier has used up its budget."""
        return self.spent.get(tier, 0.0) > self.budgets[tier]

    def add(self, tier: str, began: float) -> None:
        """Count what a tier took since `began`, which is of `time.thread_time`."""
        self.spent[tier] = self.spent.get(tier, 0.0) + (time.thread_time() - began) * 1e3


class Guard:
    """Reads a request before the model does."""

    def __init__(self, folder: Path | None, settings: ServeGuard) -> None:
        """Args: folder: the classifier's; null: rules alone. settings: `serve.guard`.

        Raises:
            ConfigError: a rule masks with what it matches itself.
            ModelError: the folder is incomplete or damaged, or the transformers classifier cannot be had.
        """
        self.settings, self.rules = settings, Rules(declared(settings, "in"))
        self.tiers: list[Tier] = []
        if folder is not None:
            classifier = Classifier(folder, settings.window)
            budget = settings.budget_ms.classifier
            self.tiers.append(Tier(name="classifier", scorer=classifier, threshold=settings.threshold, action=settings.classifier, budget_ms=budget))
        if (named := settings.transformer) is not None:
            from stages.serve.guard.transformer import Transformer

            tier = Tier(name="transformer", scorer=Transformer(named), threshold=named.threshold, action=named.action, budget_ms=settings.budget_ms.transformer)
            self.tiers.append(tier)

    def check(self, text: str) -> Verdict:
        """Whether a message may reach the model, and why not."""
        return self.screen([Message(text=text)]).verdict

    def screen(self, messages: Sequence[Message]) -> Screened:
        """Read a request, and say what of it the model may read."""
        if not self.settings.enabled:
            return self._screened(Verdict(direction="in"), messages, [m.text for m in messages], [m.text for m in messages])
        clock = Clock({"rules": self.settings.budget_ms.rules} | {tier.name: tier.budget_ms for tier in self.tiers})
        findings: set[Finding] = set()
        documents: list[DocumentVerdict] = []
        texts, own, score = [], [], 0.0
        for turn, message in enumerate(messages):
            text = message.text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text to RE2
            quoted = [Quotation(kind="name", start=0, end=len(text))] if message.name in NAMES else quotations(text)
            words = own_words(text, quoted)
            own.append(words)
            said, worst_score = (self._by_rules(words, clock), 0.0) if message.trusted else self._read(words, clock)
            score = max(score, worst_score)
            first = len(documents)
            for quotation in quoted:
                documents.append(self._document(text, quotation, len(documents), turn, clock))
            if quoted:
                known = {f.name for f in said} | {f.name for d in documents[first:] for f in d.findings}
                said |= {f for f in self._by_rules(text, clock) if f.name not in known}
            if message.trusted:
                said = {f for f in said if f.action != "refuse" or f.name == "budget"}
            masked = self._mask(text, quoted, said, documents[first:])
            if masked is None:
                said.add(Finding(tier="rules", name="unmaskable", action="refuse"))
            findings |= said
            texts.append(text if masked is None else masked)
        ordered = tuple(sorted(findings, key=lambda f: (f.tier, f.name)))
        verdict = Verdict(direction="in", findings=ordered, documents=tuple(documents), score=max([score, *(d.score for d in documents)]), ms=clock.spent)
        return self._screened(verdict, messages, texts, own)

    @staticmethod
    def _screened(verdict: Verdict, messages: Sequence[Message], texts: list[str], own: list[str]) -> Screened:
        system = "\n".join(m.text for m in messages if m.role in SYSTEM)
        return Screened(verdict=verdict, texts=texts, own="\n".join(t for t, m in zip(own, messages, strict=True) if m.role == "user"), system=system)

    # ------------------------------------------------------------ one passage

    def _read(self, text: str, clock: Clock, documents: bool = False) -> tuple[set[Finding], float]:
        """What a passage is found to be, by every tier, and its worst score."""
        if not text:
            return set(), 0.0
        findings, score = self._by_rules(text, clock), 0.0
        left: str | None = None
        for tier in self.tiers:
            if clock.over(tier.name):
                findings.add(self._late(tier.name))
                continue
            began = time.thread_time()
            left = self.rules.without_excused(text) if left is None else left
            scored = tier.scorer.score(left)
            clock.add(tier.name, began)
            score = max(score, scored)
            limit = self.settings.documents.threshold if documents and self.settings.documents.threshold is not None else tier.threshold
            if scored >= limit:
                findings.add(Finding(tier=tier.name, name=tier.name, action="refuse" if documents else tier.action))
        return findings, score

    def _by_rules(self, text: str, clock: Clock) -> set[Finding]:
        began = time.thread_time()
        findings = set()
        if clock.over("rules"):
            return {self._late("rules")}
        known: dict[str, list[tuple[int, int]]] = {}
        read = views(text)
        if read.unread:
            findings.add(self._late("rules"))
        for view in dict.fromkeys([*read, plain(text)]) if self.rules.plainly else read:
            # leetspeak is rewritten letter by letter: what is excused as it was written is excused at the same place as it may be meant
            letters = view.translate(LEET)
            excused = known[letters] = [*known.get(letters, ()), *self.rules.excused(view)]
            for rule in self.rules.rules:
                if next(self.rules.found(rule, view, excused), None) is not None:
                    findings.add(Finding(tier="rules", name=rule.name, action=rule.action))
        clock.add("rules", began)
        return findings

    def _late(self, tier: str) -> Finding:
        return Finding(tier=tier, name="budget", action=self.settings.budget_ms.exceeded)

    # ------------------------------------------------------------ documents and masks

    def _document(self, text: str, quotation: Quotation, index: int, turn: int, clock: Clock) -> DocumentVerdict:
        """A quotation's verdict: what would refuse the user's own words does what `documents.action` says."""
        found, score = self._read(text[quotation.start : quotation.end], clock, documents=True)
        action = self.settings.documents.action
        findings = {f if f.action != "refuse" or f.name == "budget" else Finding(tier=f.tier, name=f.name, action=action) for f in found}
        return DocumentVerdict(index=index, turn=turn, kind=quotation.kind, findings=tuple(sorted(findings, key=lambda f: (f.tier, f.name))), score=score)

    def _mask(self, text: str, quoted: Sequence[Quotation], said: set[Finding], documents: Sequence[DocumentVerdict]) -> str | None:
        """The message as the model may read it; null where what must be masked cannot be found in the text as it came."""
        masking: dict[str, Rule] = {rule.name: rule for rule in self.rules.rules if rule.action == "mask"}
        removed = []
        for quotation, document in zip(quoted, documents, strict=True):
            if document.action == "mask" and worst(f.action for f in document.findings if f.name not in masking) == "mask":
                removed.append((quotation.start, quotation.end, f"{REMOVED}\n"))
        text = overwrite(text, removed)
        found = [f.name for f in (*said, *(f for d in documents for f in d.findings)) if f.name in masking]
        if not found:
            return text
        rules = [rule for rule in self.rules.rules if rule.name in found]
        masked = self.rules.mask(text, rules)
        if masked is None:
            return None
        for normal in {normalise(masked), plain(masked)} if self.rules.plainly else {normalise(masked)}:
            excused = self.rules.excused(normal)
            if any(next(self.rules.found(rule, normal, excused), None) for rule in rules):
                return None
        return masked
