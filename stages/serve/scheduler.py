"""Between the API and the engine: which answers are worked on together, and for how long.

Slots. There are `slots` of them, each a thread that runs one batch of the engine at a time. A free slot takes its fair share of what waits,
first come first served, up to `batch`. Requests that arrive within GATHER of each other start together.

Latecomers. ctranslate2 takes nobody into a running batch. So a batch is ended early when somebody waits and no slot is free: all its
answers go to the end of the queue with the tokens that they have, and the next batch holds the latecomer and those of them that fit. They
have to be encoded again, and so a batch is left alone until its steps have cost as much as that does (`Turn.earned`): at worst half of the
work is encoding, and a latecomer waits for a few dozen tokens and never for a long answer to end. Measured without HTTP on SmolLM2-135M, eight
streams of answers of about 25 tokens after prompts of 58, two slots: 86 tokens for each second of processor time and at worst 1.8 s to a first
token, against 117 and 4.0 s when a batch is never ended early; with 16 streams 146 and 4.0 s, against 175 and 3.7 s at four times the patience.

Steered answers (a seed, penalties, log-probabilities, a JSON schema) take turns of one draft each, alone in their slot: what a
seed gives does not depend on who else asks.

A cancelled or late answer ends at its next token, and its place in the batch is free.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from conf.errors import ModelError
from stages.serve.admission import Admission, Full
from stages.serve.engine import Engine, Sampling
from stages.serve.refusals import Refused
from stages.serve.steering import Steering, TokenLogprob
from stages.serve.text import TextStream

Reason = Literal["stop", "length", "content_filter", "cancelled", "timeout", "failed"]

GATHER = 0.004
"""Seconds that an idle slot waits for more requests to start with."""
DRAFT = 8
"""Most tokens of a steered answer's turn."""
STEP, ROW = 14, 1
"""Cost of a decoding step, and of each answer in it, in tokens that are encoded: on SmolLM2-135M in int8 on one thread a step takes 15.5 ms for one
answer, 23 for eight and 32 for sixteen, and encoding takes 0.9 to 1.3 ms a token."""

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Job:
    """One answer in the making. The slot's thread writes it, others read it and may set `cancelled`."""

    prompt: list[int]
    sampling: Sampling
    text: TextStream
    on_text: Callable[[str], None]
    """Gets each piece of text that is certain, in the slot's thread."""
    on_end: Callable[[], None]
    """Called once, when `reason` is set."""
    deadline: float
    """Monotonic time at which it is given up."""
    steering: Steering | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cancelled: bool = False
    reason: Reason | None = None
    error: str = ""
    failure: Refused | None = None
    """What an upstream model said in place of an answer."""
    arrived: float = field(default_factory=time.monotonic)
    place: int = 1
    """Which in the house it was when it came; 1: nobody was there."""
    started: float | None = None
    """When a slot first took it."""
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


@dataclass(eq=False)
class Turn:
    """One batch at work."""

    jobs: list[Job]
    spent: int = 0
    """What its steps have cost."""

    def earned(self, kept: int) -> bool:
        """Whether it has cost as much as it takes to encode its answers again; `kept`: tokens of a prompt that are never encoded again."""
        return self.spent >= sum(len(job.prompt) + len(job.tokens) - kept for job in self.jobs if job.reason is None)


class Scheduler:
    """Runs jobs on an engine."""

    def __init__(self, engine: Engine, *, slots: int, batch: int, most_waiting: int, first_token: float = float("inf"), kept: Sequence[int] = ()) -> None:
        """Start the slots.

        Args:
            engine: opened with `batches`; `slots` batches run on it at a time.
            batch: most answers in one.
            most_waiting: bound of the queue, in answers.
            first_token: seconds within which an answer that is let in shall have its first token.
            kept: what most prompts begin with; encoded once.
        """
        self._engine, self._batch, self._most, self._kept = engine, batch, most_waiting, list(kept)
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._busy, self._working, self._closed, self._slots = 0, 0, False, slots
        engine.keep(self._kept)
        self.admission = Admission(most_waiting, first_token, lambda: len(self._waiting), lambda: self._working)
        self._threads = [threading.Thread(target=self._run, name=f"slot-{i}") for i in range(slots)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Answers that no slot has taken."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the answers of one request, all or none.

        Raises:
            Full: there is no room for them.
        """
        with self._change:
            if self._closed or len(self._waiting) + len(jobs) > self._most:
                raise Full
            for job in jobs:
                self._waiting.append(job)
                job.place = self._working + len(self._waiting)
            self._change.notify_all()

    def close(self) -> None:
        """Give up what runs and waits, and end the threads."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    # ------------------------------------------------------------ a slot's thread

    def _stopping(self) -> bool:
        return self._closed or not threading.main_thread().is_alive()  # a thread in ctranslate2 when Python ends aborts the process

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._stopping():
                    self._change.wait(0.5)
                if self._stopping():
                    self._give_up()
                    return
                end = time.monotonic() + GATHER
                while self._busy == 0 and (left := end - time.monotonic()) > 0:
                    self._change.wait(left)
                jobs = self._take()
                if not jobs:
                    continue
                self._busy, self._working = self._busy + 1, self._working + len(jobs)
            try:
                self._work(jobs)
            except Exception as error:  # one answer must not take the slot with it: it is told, and the log has the traceback
                log.exception("a batch of %d failed", len(jobs))
                for job in jobs:
                    job.end("failed", error=str(error))
            with self._change:
                self._busy, self._working = self._busy - 1, self._working - len(jobs)
                self._waiting.extend(job for job in jobs if job.reason is None)
                self._change.notify_all()

    def _give_up(self) -> None:
        for job in self._waiting:
            job.end("cancelled")
        self._waiting.clear()

    def _take(self) -> list[Job]:
        """The next batch, out of the queue."""
        now = time.monotonic()
        for job in [job for job in self._waiting if job.given_up(now)]:
            self._waiting.remove(job)
        if not self._waiting:
            return []
        first = self._waiting[0]
        same = [first] if first.steering else [job for job in self._waiting if job.steering is None and job.key() == first.key()]
        chosen = same[: min(self._batch, -(-len(same) // (self._slots - self._busy)))]
        for job in chosen:
            self._waiting.remove(job)
            job.started = job.started or now
        return chosen

    def _work(self, jobs: list[Job]) -> None:
        if jobs[0].steering is None:
            self._decode(Turn(jobs))
        else:
            self._draft(jobs[0], jobs[0].steering)

    def _push(self, job: Job, token: int, complete: bool = False) -> bool:
        """Give a job its token; returns whether the answer is over."""
        new, over = job.first is None, job.push(token, self._engine.chat.eos_ids, complete)
        if new and job.first is not None:
            self.admission.learn(job.place, job.first - job.arrived)
        return over

    def _decode(self, turn: Turn) -> None:
        jobs = turn.jobs

        def on_token(index: int, token: int) -> bool:
            job = jobs[index]
            if job.reason is not None:
                return True
            turn.spent += ROW
            if self._push(job, token) or leave:
                return True
            if index == last_alive():
                turn.spent += STEP
                if self._stopping() or (self._waiting and self._busy == self._slots and turn.earned(len(self._kept))):
                    leave.append(True)  # each answer takes one more token and leaves the batch with it
            return False

        def last_alive() -> int:
            return next(i for i in reversed(range(len(jobs))) if jobs[i].reason is None)

        leave: list[bool] = []
        most = max(job.sampling.max_tokens - len(job.tokens) for job in jobs)
        sampling = Sampling(max_tokens=most + 1, temperature=jobs[0].sampling.temperature, top_p=jobs[0].sampling.top_p)
        self._engine.decode([job.prompt + job.tokens for job in jobs], sampling, on_token)

    def _draft(self, job: Job, steering: Steering) -> None:
        count = min(DRAFT, job.sampling.max_tokens - len(job.tokens))
        try:
            for drafted, logits in zip(*self._engine.draft(job.prompt + job.tokens, count), strict=True):
                token, complete, told = steering.choose(logits)
                if told is not None and token not in self._engine.chat.eos_ids:
                    job.logprobs.append(told)
                if self._push(job, token, complete) or token != drafted:
                    break
        except ModelError as error:  # of the grammar
            job.end("failed", error=error.what)
