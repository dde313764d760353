"""What is asked of each side of `tests.bench.serve`, and what is made of the answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVELS = (1, 8, 16, 32)
TOKENS = 48
"""Longest answer."""
REQUESTS = {1: 6, 8: 2, 16: 2, 32: 1}
"""Streams -> requests of each."""
SYSTEM = "You are the Kestrel support desk. Name the intent, then answer."


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer; times in seconds from its request."""

    tokens: int
    first: float
    last: float


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One side at one number of streams."""

    tokens: float
    """A second, of all streams together."""
    first: float
    """Median seconds to the first token."""
    worst: float
    """The longest of them."""
    pace: float
    """Median over the answers of the seconds between two tokens after the first."""
    work: float
    """Tokens for each second of processor time of the side, which other processes of the machine disturb less."""


def figure(answers: Sequence[Answer], seconds: float, spent: float) -> Figure:
    """Of all answers of one number of streams; `spent`: processor time."""
    firsts, tokens = [answer.first for answer in answers], sum(answer.tokens for answer in answers)
    paces = [(answer.last - answer.first) / (answer.tokens - 1) for answer in answers if answer.tokens > 1]
    return Figure(tokens=tokens / seconds, first=statistics.median(firsts), worst=max(firsts), pace=statistics.median(paces or [0.0]), work=tokens / spent)


def chosen(texts: Sequence[str], streams: int, number: int, request: int) -> str:
    """Each number of streams has texts of its own, or a server that keeps old prompts would not have to read them."""
    return texts[(streams * 4 + number * REQUESTS[streams] + request) % len(texts)]
