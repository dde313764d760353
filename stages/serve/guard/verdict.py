"""What the guard says of a request or of an answer, as its caller acts on it and as the event keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from conf.schema import Action

SEVERITY: tuple[Action, ...] = ("allow", "flag", "mask", "refuse")
"""From the mildest action on."""
MOST_TOLD = 32
"""Documents of a verdict that an event keeps: those with findings first."""


def worst(actions: Iterable[Action]) -> Action:
    """The severest of these actions; `allow` of none."""
    return max(actions, key=SEVERITY.index, default="allow")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One reason."""

    tier: str
    """`rules`, `classifier`, `answer` …"""
    name: str
    """Of the rule or finder; `budget`: the tier took longer than it may."""
    action: Action
    """What follows from it."""


@dataclass(frozen=True, kw_only=True)
class DocumentVerdict:
    """Of one quoted document."""

    index: int
    """Among the documents of the request, from 0."""
    turn: int
    """Index of the message that quotes it."""
    kind: str
    """By what it is known as a quotation: `tag`, `fence`, `quote`, `forward`, `name`."""
    findings: tuple[Finding, ...]
    score: float

    @property
    def action(self) -> Action:
        """What becomes of it."""
        return worst(f.action for f in self.findings)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one request, or of one answer."""

    direction: Literal["in", "out"]
    findings: tuple[Finding, ...] = ()
    """In the user's own words or in the answer, each once."""
    documents: tuple[DocumentVerdict, ...] = ()
    score: float = 0.0
    """The classifier's worst passage, documents included: 0 harmless, 1 an attack."""
    ms: dict[str, float] = field(default_factory=dict)
    """Tier -> milliseconds of processor time."""

    @property
    def action(self) -> Action:
        """What follows from all of it."""
        return worst([*(f.action for f in self.findings), *(d.action for d in self.documents)])

    @property
    def allowed(self) -> bool:
        """Whether it may pass, masked or not."""
        return self.action != "refuse"

    @property
    def reasons(self) -> list[str]:
        """Names of the rules and finders, sorted; what is found in a document counts too."""
        found = [*self.findings, *(f for d in self.documents for f in d.findings)]
        return sorted({f.name for f in found})

    def facts(self) -> dict[str, object]:
        """For the event: plain data."""
        told = sorted(self.documents, key=lambda d: (-SEVERITY.index(d.action), d.index))[:MOST_TOLD]
        return {
            "action": self.action, "direction": self.direction, "reasons": _by_tier(self.findings), "score": round(self.score, 4),
            "ms": {tier: round(value, 3) for tier, value in self.ms.items()},
            "documents": [{"index": d.index, "turn": d.turn, "kind": d.kind, "action": d.action, "reasons": _by_tier(d.findings), "score": round(d.score, 4)}
                          for d in told],
        }  # fmt: skip


def _by_tier(findings: Iterable[Finding]) -> dict[str, dict[str, str]]:
    """Tier -> name -> action."""
    told: dict[str, dict[str, str]] = {}
    for finding in findings:
        told.setdefault(finding.tier, {})[finding.name] = finding.action
    return told
