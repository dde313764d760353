"""Who is let in: as many requests as the queue holds, and as will have their first tokens in time.

A request is turned away at once when its first token would come too late: how many it finds in the house (at the guard, in the queue, in a slot) times the
seconds that each of them has cost lately, from the door to the first token. Those follow what is measured, up quickly and down slowly, so that they stand
for the slow ones among the answers. When nothing waits, nobody is turned away, and they are measured anew.

What was expected may come otherwise, on a machine that others use too. So a request that waits is turned away as well, as late as that, when it would have
its first token too late even if work on it began now: nothing was begun, and nobody gets an answer later than was promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio

from stages.serve.refusals import Refused

RISE, FALL = 1 / 8, 1 / 64
"""Weights of a cost that is above, and below, the one that is believed."""
AIM = 0.55
"""Share of the time that may be expected: what comes is spread around it. At ten times the load that the default model holds, on two idle cores, 0.7 gave a
first token within 5.8 s (99th percentile) and 6.1 answers a second, 0.55 within 4.5 s and 6.4, where 5 s is the aim (`python -m tests.bench.load`).
Whoever has waited for less of it is not turned away again."""
THREADS = 2
"""In which requests are made ready: more of them would take turns at Python's lock, and the event loop, which turns requests away, would wait for it."""


class Full(Exception):
    """There is no room in the queue, or the first token would come too late."""


class Admission:
    """Before the queue of one engine; all but `learn` is called in the event loop."""

    def __init__(self, most: int, first_token: float, waiting: Callable[[], int], working: Callable[[], int]) -> None:
        """Open it.

        Args:
            most: answers that wait.
            first_token: seconds within which an answer that is let in shall have its first token.
            waiting: how many wait now.
            working: how many are in a slot now.
        """
        self._most, self._first_token, self._waiting, self._working = most, first_token, waiting, working
        self._entering, self._cost, self._begin = 0, 0.0, 0.0
        self.threads = anyio.CapacityLimiter(THREADS)

    @property
    def aim(self) -> float:
        """Seconds within which a first token may be expected."""
        return AIM * self._first_token

    def wait(self, count: int = 1) -> float:
        """Seconds until the first tokens of so many more answers, about."""
        return (self._working() + self._waiting() + self._entering + count) * self._cost

    def full(self, count: int = 1) -> bool:
        """Whether so many more answers are too many."""
        ahead = self._waiting() + self._entering
        return ahead + count > self._most or (ahead > 0 and self.wait(count) > self.aim)

    @contextmanager
    def entering(self, count: int) -> Iterator[int]:
        """Keep room for the answers of a request while it is made ready; gives how many there were in the house before it.

        Raises:
            Full: there is none.
        """
        if self.full(count):
            raise Full
        before = self._working() + self._waiting() + self._entering
        self._entering += count
        try:
            yield before
        finally:
            self._entering -= count

    def learn(self, place: int, seconds: float, begin: float | None = None) -> None:
        """Take in that an answer, the first, second, … in the house when it came, had its first token.

        Args:
            seconds: after which it had it.
            begin: those of them for which it was worked on; the slowest is remembered, and forgotten at FALL. Null: it was turned away after so long.
        """
        self._cost = follow(self._cost, seconds / place)
        if begin is not None:
            self._begin = max(begin, self._begin + (begin - self._begin) * FALL)

    def late(self, seconds: float) -> bool:
        """Whether an answer that has waited so long would have its first token too late if work on it began now."""
        return seconds > self.aim and seconds + self._begin > self._first_token

    def refusal(self) -> Refused:
        """For a request that was not let in: nothing was begun."""
        return Refused(429, "the service has as much to do as it can hold: come again", code="overloaded", retry_after=self.wait())


def follow(believed: float, measured: float) -> float:
    """What is believed after a measurement: up quickly and down slowly."""
    more = measured - believed
    return believed + more * (RISE if more > 0 else FALL)
