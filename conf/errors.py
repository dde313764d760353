"""The errors a user can cause, with what happened, the value and the remedy.

TrunklineError
├── ConfigError     conf/ or params.yaml            (exit 2)
├── SourceError     a source cannot be had or read  (exit 1)
│   ├── DigestMismatch   it is not what was pinned
│   └── PolicyBreach     it may not be used for this
├── DataError       rows break a rule               (exit 1)
├── ModelError      weights, tokenizer or engine    (exit 1)
└── Held            a gate says no                  (exit 1)
"""

from __future__ import annotations


class TrunklineError(Exception):
    """A user's mistake or a failed check: told in a sentence, without a traceback."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        """Args: what: the fact, with the value and the file and key. remedy: the next thing to do."""
        super().__init__(f"{what}\n  → {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class ConfigError(TrunklineError):
    """conf/ or params.yaml is wrong."""

    exit_code = 2


class SourceError(TrunklineError):
    """A source cannot be fetched or read."""


class DigestMismatch(SourceError):
    """A source is not what was pinned."""

    def __init__(self, name: str, expected: str, actual: str, remedy: str = "") -> None:
        """Name the source and both digests."""
        super().__init__(
            f"{name}: the digest is not the pinned one\n  pinned {expected}\n  actual {actual}",
            remedy or "if the new content is right, review it and pin its digest; otherwise the source was altered or cut short",
        )
        self.expected, self.actual = expected, actual


class PolicyBreach(SourceError):
    """The access policy does not allow this use."""


class DataError(TrunklineError):
    """Rows break a rule."""


class ModelError(TrunklineError):
    """Weights, tokenizer or engine cannot be used."""


class Held(TrunklineError):
    """A gate says no."""
