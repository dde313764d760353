"""Answers in the making, and the bounded queue of those that wait."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from stages.serve.admission import Admission, Full
from stages.serve.engine import Sampling
from stages.serve.refusals import Refused
from stages.serve.sampling import choose
from stages.serve.steering import Steering, TokenLogprob
from stages.serve.text import TextStream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

Reason = Literal["stop", "length", "content_filter", "cancelled", "timeout", "late", "failed"]


@dataclass(eq=False, kw_only=True)
class Job:
    """One answer in the making. The thread that works on it writes it, others read it and may set `cancelled`."""

    prompt: list[int]
    sampling: Sampling
    text: TextStream
    on_text: Callable[[str], None]
    """Gets each piece of text that is certain, in that thread."""
    on_end: Callable[[], None]
    """Called once, when `reason` is set."""
    deadline: float
    """Monotonic time at which it is given up."""
    on_begin: Callable[[], None] = lambda: None
    """Called once, when work on it begins."""
    steering: Steering | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cancelled: bool = False
    seed: int = field(default_factory=lambda: secrets.randbits(62))
    """Of its draws where it is not steered."""
    reason: Reason | None = None
    error: str = ""
    failure: Refused | None = None
    """What is said in place of an answer: by an upstream model, or that it would come too late."""
    arrived: float = field(default_factory=time.monotonic)
    place: int = 1
    """Which in the house it was when it came; 1: nobody was there."""
    lead: Job | None = None
    """The first answer of the same request; none: it is itself."""
    begun: bool = False
    """Work on an answer of its request began; of the first one."""
    started: float | None = None
    """When work on it began."""
    first: float | None = None
    """When its first token came."""
    ended: float | None = None

    @property
    def tokens(self) -> list[int]:
        """What is there of the answer."""
        return self.text.tokens

    def key(self) -> tuple[float, float]:
        """Answers with the same key can share a batch."""
        return self.sampling.temperature, self.sampling.top_p

    def choose(self, logits: NDArray[np.float32], ends: set[int]) -> tuple[int, bool]:
        """The next token, and whether the answer is complete with it; keeps its log-probability if they are told.

        Args:
            logits: shape (vocabulary,).

        Raises:
            ModelError: the grammar grew too complex.
        """
        if self.steering is None:
            return choose(logits, self.sampling, self.seed, len(self.tokens)), False
        token, complete, told = self.steering.choose(logits)
        if told is not None and token not in ends:
            self.logprobs.append(told)
        return token, complete

    def begin(self) -> None:
        """Say that work on it begins; only the first time counts."""
        if self.started is None:
            self.started = time.monotonic()
            (self.lead or self).begun = True
            self.on_begin()

    def push(self, token: int, ends: set[int], complete: bool = False) -> bool:
        """Take a token; returns whether the answer is over."""
        now = time.monotonic()
        self.first = self.first or now
        if token in ends:
            return self.end("stop", self.text.finish())
        piece = self.text.push(token)
        if self.text.stopped or complete:
            return self.end("stop", piece + self.text.finish())
        if len(self.tokens) >= self.sampling.max_tokens:
            return self.end("length", piece + self.text.finish())
        if piece:
            self.on_text(piece)
        return self.given_up(now)

    def given_up(self, now: float) -> bool:
        """End it if nobody wants it any more."""
        if self.cancelled:
            return self.end("cancelled")
        if now > self.deadline:
            return self.end("timeout")
        return False

    def end(self, reason: Reason, piece: str = "", error: str = "") -> bool:
        """Say how it ended, once; returns true."""
        if self.reason is None:
            if piece:
                self.on_text(piece)
            self.reason, self.error, self.ended = reason, error, time.monotonic()
            self.on_end()
        return True


class Queue:
    """Answers that wait for the engine.

    Attributes:
        waiting: first come first; for who holds `change`.
        change: told when something is to be looked at.
        working: how many are worked on.
        admission: before it.
    """

    def __init__(self, most: int, first_token: float) -> None:
        """Args: most: bound, in answers. first_token: as of `Admission`."""
        self.waiting: deque[Job] = deque()
        self.change = threading.Condition()
        self._most, self._closed, self.working = most, False, 0
        self.admission = Admission(most, first_token, lambda: len(self.waiting), lambda: self.working)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the answers of one request, all or none.

        Raises:
            Full: there is no room for them.
        """
        with self.change:
            if self._closed or len(self.waiting) + len(jobs) > self._most:
                raise Full
            for job in jobs:
                self.waiting.append(job)
                job.lead = jobs[0]
            self.change.notify_all()

    def push(self, job: Job, token: int, ends: set[int], complete: bool = False) -> bool:
        """Give a job its token; returns whether the answer is over."""
        new = job.first is None
        try:
            over = job.push(token, ends, complete)
        except Exception:  # of who reads the answer: it must not take the others with it
            log.exception("an answer could not be passed on")
            over = job.end("failed")
        if new and job.first is not None:
            self.admission.learn(job.place, job.first - job.arrived, job.first - (job.started or job.arrived))
        return over

    def close(self) -> None:
        """Take nobody in any more; who works is told."""
        with self.change:
            self._closed = True
            self.change.notify_all()

    def stopping(self) -> bool:
        """Whether the work ends: closed, or Python itself ends, which a thread in an engine would abort."""
        return self._closed or not threading.main_thread().is_alive()

    def sift(self) -> None:
        """End those that nobody wants any more, or all when the work ends. For who holds `change`."""
        now = time.monotonic()
        for job in list(self.waiting):
            if job.given_up(now) or (self.stopping() and job.end("cancelled")) or self._late(job, now):
                self.waiting.remove(job)

    def _late(self, job: Job, now: float) -> bool:
        """End it if its first token would come too late. Of a request that was begun with, all answers are made, and so is one that found nobody before it."""
        waited, lead = now - job.arrived, job.lead or job
        if lead.begun or lead.place == 1 or not self.admission.late(waited):
            return False
        self.admission.learn(job.place, waited)  # at least as long
        job.failure = self.admission.refusal()
        return job.end("late")
