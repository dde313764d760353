"""A made test set for personal data: messages with one piece of it or one near-miss, from a seed; no person is in it.

The numbers and their check digits are drawn (`pii_drawn`); what a message says around them, and in which of many forms they are written, does not
come from the patterns that look for them. Some forms are ones that nobody finds by pattern (`jo at example dot com`): they count as misses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from conf.schema import PiiKind
from tests.bench.pii_drawn import KINDS
from tests.bench.pii_near import NEAR

SEED = 20_261
EACH = 200
"""Messages of each kind, and of each near-miss half as many."""
AROUND = (
    "{}", "My details: {}.", "please use {} from now on", "({})", "Hi, it's {}, thanks!", "contact={};", '{{"value": "{}", "ok": true}}', "| name | {} | open |",
    "Is {} right? I typed it twice.", "Ich habe {} angegeben, bitte prüfen.", "J'ai donné {} hier.", "the one on file is '{}'", "old: none\nnew: {}\nbye",
    "{} is mine", "We spoke on 2026-03-04 at 10:15 about order K-77120; {} again.", "reach me at {}, not before 9:00", "[{}]", "re: {} - still waiting",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One message."""

    text: str
    kind: PiiKind | None
    """Null: there is no personal data in it."""
    start: int
    end: int
    what: str
    """The form, or the near-miss."""


def samples(seed: int = SEED) -> list[Sample]:
    """The test set, always the same one."""
    rng, made = random.Random(seed), []
    for kind, make in KINDS.items():
        for _ in range(EACH):
            value, form = make(rng)
            before, _, after = rng.choice(AROUND).replace("{{", "\1").replace("}}", "\2").partition("{}")
            before, after = (part.replace("\1", "{").replace("\2", "}") for part in (before, after))
            after = {"expiry": " 12/27 737", "mailto": ">", "named": ">"}.get(form, "") + after
            before += {"mailto": "<mailto:", "named": "Jo Bloggs <"}.get(form, "")
            made.append(Sample(text=before + value + after, kind=kind, start=len(before), end=len(before) + len(value), what=form))
    for what, near in NEAR.items():
        for _ in range(EACH // 2):
            made.append(Sample(text=rng.choice(AROUND).format(near(rng)), kind=None, start=0, end=0, what=what))
    rng.shuffle(made)
    return made
