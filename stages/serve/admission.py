"""Who is let in: as many requests as the queue holds, and as will have their first tokens in time.

A request is turned away at once when its first token would come too late: so many seconds for each that it finds in the house (at the guard, in the queue,
in a slot), and some more however many there are (`Expected`). Both follow what is measured, up quickly and down slowly, so that they stand for the slow ones
among the answers. When nothing waits, nobody is turned away, and they are measured anew.

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
ALONE = 0.02
"""How much less is believed in what all wait for, whoever is before them: where the answers say nothing of it, all of the time is that of the others."""
AIM = 0.5
"""Share of the time that may be expected: what comes is spread around it. At ten times the load that the default model holds, on two idle cores, 0.55 gave a
first token within 4.9 s (99th percentile) and 0.5 within 4.8, both with 10.6 answers a second, where 5 is the aim (`python -m tests.bench.load`).
Whoever has waited for less of it is not turned away again."""
THREADS = 2
"""In which requests are made ready: more of them would take turns at Python's lock, and the event loop, which turns requests away, would wait for it."""


class Full(Exception):
    """There is no room in the queue, or the first token would come too late."""


class Expected:
    """Seconds to the first token of the second, third, … in the house: a line through what was measured lately.

    Some wait is the same for all (the batch at work has to end), some grows with the answers before. A line through the origin would take the first for the
    second, and turn sixteen away because two waited for a batch. It is a regression with weights that fall with the age of a measurement, and that are larger
    for those above the line: an expectile (Newey and Powell, 1987).
    """

    def __init__(self) -> None:
        """Nothing is known."""
        self._means = [0.0] * 5
        """Of 1, place, seconds, place squared and place times seconds, by weight."""
        self._base, self._each = 0.0, 0.0

    def seconds(self, place: int) -> float:
        """Of the `place`-th; 0 before anything is known."""
        return self._base + self._each * place

    def learn(self, place: int, seconds: float) -> None:
        """Take in a measurement."""
        weight = RISE if seconds > self.seconds(place) else FALL
        measured = (1.0, place, seconds, place * place, place * seconds)
        self._means = [mean + (one - mean) * weight for mean, one in zip(self._means, measured, strict=True)]
        ones, places, times, squares, products = self._means
        base = (times * squares - places * products) / ((1 + ALONE) * ones * squares - places * places)
        self._base = min(max(base, 0.0), times / ones)  # neither part is negative
        self._each = max((products - self._base * places) / squares, 0.0)


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
        self._entering, self._begin, self._expected = 0, 0.0, Expected()
        self.threads = anyio.CapacityLimiter(THREADS)

    @property
    def aim(self) -> float:
        """Seconds within which a first token may be expected."""
        return AIM * self._first_token

    def wait(self, count: int = 1) -> float:
        """Seconds until the first tokens of so many more answers, about."""
        return self._expected.seconds(self._working() + self._waiting() + self._entering + count)

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
        if place > 1:  # the first waits for nobody
            self._expected.learn(place, seconds)
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
