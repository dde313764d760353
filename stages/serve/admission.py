"""Who is let in: as many requests as the queue holds, and as will have their first tokens in time.

A request is turned away at once when its first token would come too late: how many it finds in the house (at the guard, in the queue, in a slot) times the
seconds that each of them has cost lately. Those follow what is measured, up quickly and down slowly, so that they stand for the slow ones
among the answers. When nothing waits, nobody is turned away, and they are measured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio

from stages.serve.refusals import Refused

RISE, FALL = 1 / 8, 1 / 64
"""Weights of a cost that is above, and below, the one that is believed."""
AIM = 0.7
"""Share of the time that may be expected: what comes is spread around it."""
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
        self._entering, self._cost = 0, 0.0
        self.threads = anyio.CapacityLimiter(THREADS)

    def wait(self, count: int = 1) -> float:
        """Seconds until the first tokens of so many more answers, about."""
        return (self._working() + self._waiting() + self._entering + count) * self._cost

    def full(self, count: int = 1) -> bool:
        """Whether so many more answers are too many."""
        ahead = self._waiting() + self._entering
        return ahead + count > self._most or (ahead > 0 and self.wait(count) > AIM * self._first_token)

    @contextmanager
    def entering(self, count: int) -> Iterator[None]:
        """Keep room for the answers of a request while it is made ready.

        Raises:
            Full: there is none.
        """
        if self.full(count):
            raise Full
        self._entering += count
        try:
            yield
        finally:
            self._entering -= count

    def learn(self, place: int, seconds: float) -> None:
        """Take in that an answer, the first, second, … in the house when it came, had its first token after so many seconds."""
        more = seconds / place - self._cost
        self._cost += more * (RISE if more > 0 else FALL)

    def refusal(self) -> Refused:
        """For a request that was not let in: nothing was begun."""
        return Refused(429, "the service has as much to do as it can hold: come again", code="overloaded", retry_after=self.wait())
