"""Work on an engine that takes nobody into a running batch: ctranslate2, and the reference.

There are `slots` slots, each a thread that runs one batch of the engine at a time. A free slot takes its fair share of what waits,
first come first served, up to `batch`, and up to the tokens that there is `room` for: the engine holds keys and values of each, on ctranslate2 138 KB a token
for SmolLM2-135M, and keeps the memory of the largest batches that it had. Requests that arrive within GATHER of each other start together.

Lengths. ctranslate2 encodes a batch's prompts together as far as the shortest goes, and the rest of a longer one a token a step, as if it were generated. So
a batch holds answers of about one length (NEAR): who has waited longest, and those nearest to it.

Latecomers. A batch is ended early when somebody waits and no slot is free: all its answers go to the end of the queue with the tokens that they have, and the
next batch holds the latecomer and those of them that fit. They have to be encoded again, and so a batch is left alone until its steps have cost PATIENCE
times as much as that does (`Turn.earned`): at worst a fifth of the work is encoding again, and a latecomer never waits for a long answer to end. It waits until
a batch is encoded, for PATIENCE times as much, and until its own is encoded. A batch is therefore only so large that all of it, at the pace of late, is what
may be expected until a first token (`Admission.aim`).

Measured without HTTP on SmolLM2-135M (`tests.bench.serve_ours … bare`), two slots on two cores, answers of about 25 tokens after prompts of 37 to 75, two runs
each; tokens a second, and the longest seconds to a first token:

    NEAR, PATIENCE    8 streams          16 streams         32 streams
    any, 1            157, 159  0.4      168, 165  2.4      192, 134  4.9
    0, 1              131, 126  0.3      151, 154  0.7      166, 163  1.5
    4, 1              161, 169  0.4      185, 186  0.9      225, 205  3.1
    8, 1              172, 164  0.3      187, 203  1.0      246, 255  2.1
    16, 1             166, 179  0.6      173, 157  1.6      223, 208  2.5
    8, 2              185, 201  0.4      207, 233  1.2      226, 252  2.2
    8, 4              210, 211  0.7      244, 260  1.6      241, 264  2.2
    8, never early    216, 234  0.6      256, 253  1.7      245, 229  2.1

Steered answers take turns of one draft each, alone in their slot: what a seed gives does not depend on who else asks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from conf.errors import ModelError
from stages.serve.admission import follow
from stages.serve.engine import Engine, Sampling
from stages.serve.jobs import Job, Queue

GATHER = 0.004
"""Seconds that an idle slot waits for more requests to start with."""
DRAFT = 8
"""Most tokens of a steered answer's turn."""
STEP, ROW = 14, 1
"""Cost of a decoding step, and of each answer in it, in tokens that are encoded: on SmolLM2-135M in int8 on one thread a step takes 15.5 ms for one
answer, 23 for eight and 32 for sixteen, and encoding takes 0.9 to 1.3 ms a token."""

NEAR = 8
"""Most tokens by which an answer of a batch is longer or shorter than the one that has waited longest."""
PATIENCE = 4
"""How many times what its encoding costs a batch is left alone for."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Turn:
    """One batch at work."""

    jobs: list[Job]
    spent: int = 0
    """What its steps have cost."""

    def earned(self, kept: int) -> bool:
        """Whether it has cost PATIENCE times what it takes to encode its answers again; `kept`: tokens of a prompt that are never encoded again."""
        return self.spent >= PATIENCE * sum(len(job.prompt) + len(job.tokens) - kept for job in self.jobs if job.reason is None)


class Slots:
    """Batches side by side."""

    def __init__(self, engine: Engine, queue: Queue, slots: int, batch: int, room: float, kept: Sequence[int]) -> None:
        """Args: those of `Scheduler`."""
        self.threads = slots
        self._engine, self._queue, self._batch, self._room, self._kept = engine, queue, batch, room, len(kept)
        self._busy = 0
        self._pace = 0.0
        """Seconds that a token takes that is encoded."""

    def run(self) -> None:
        """A slot's thread."""
        queue = self._queue
        while True:
            with queue.change:
                while not queue.waiting and not queue.stopping():
                    queue.change.wait(0.5)
                if queue.stopping():
                    queue.sift()
                    return
                end = time.monotonic() + GATHER
                while self._busy == 0 and (left := end - time.monotonic()) > 0:
                    queue.change.wait(left)
                jobs = self._take()
                if not jobs:
                    continue
                self._busy, queue.working = self._busy + 1, queue.working + len(jobs)
            try:
                self.work(jobs)
            except Exception:  # one answer must not take the slot with it: it is told, and the log has the traceback
                log.exception("a batch of %d failed", len(jobs))
                for job in jobs:
                    job.end("failed")
            with queue.change:
                self._busy, queue.working = self._busy - 1, queue.working - len(jobs)
                queue.waiting.extend(job for job in jobs if job.reason is None)
                queue.change.notify_all()

    def _take(self) -> list[Job]:
        """The next batch, out of the queue."""
        self._queue.sift()
        waiting = self._queue.waiting
        if not waiting:
            return []
        first = waiting[0]
        same = [first] if first.steering else [job for job in waiting if job.steering is None and job.key() == first.key()]
        apart = sorted(((abs(self._fresh(job) - self._fresh(first)), job) for job in same), key=lambda pair: pair[0])
        near = [job for distance, job in apart if distance <= NEAR]
        chosen = near[: min(self._batch, self._fitting(near), -(-len(same) // (self.threads - self._busy)))]
        for job in chosen:
            waiting.remove(job)
            job.begin()
        return chosen

    def _fitting(self, jobs: Sequence[Job]) -> int:
        """How many of the first fit into a batch: there is room for what they may come to, and they are encoded in time. One alone is always taken."""
        most = self._queue.admission.aim / (PATIENCE + 2) / self._pace if self._pace else math.inf
        rooms, encoded = accumulate(len(job.prompt) + job.sampling.max_tokens for job in jobs), accumulate(map(self._fresh, jobs))
        return max(sum(room <= self._room and tokens <= most for room, tokens in zip(rooms, encoded, strict=True)), 1)

    def _fresh(self, job: Job) -> int:
        """Tokens of it that have to be encoded."""
        return len(job.prompt) + len(job.tokens) - self._kept

    def work(self, jobs: list[Job]) -> None:
        """Run one batch."""
        if jobs[0].steering is None:
            self._decode(Turn(jobs))
        else:
            self._draft(jobs[0])

    def _decode(self, turn: Turn) -> None:
        jobs, ends = turn.jobs, self._engine.chat.eos_ids
        began, encoded = time.monotonic(), max(sum(map(self._fresh, jobs)), 1)

        def on_token(index: int, token: int) -> bool:
            job = jobs[index]
            if not turn.spent:
                self._pace = follow(self._pace, (time.monotonic() - began) / encoded)
            if job.reason is not None:
                return True
            turn.spent += ROW
            if self._queue.push(job, token, ends) or leave:
                return True
            if index == last_alive():
                turn.spent += STEP
                if self._queue.stopping() or (self._queue.waiting and self._busy == self.threads and turn.earned(self._kept)):
                    leave.append(True)  # each answer takes one more token and leaves the batch with it
            return False

        def last_alive() -> int:
            return next(i for i in reversed(range(len(jobs))) if jobs[i].reason is None)

        leave: list[bool] = []
        most = max(job.sampling.max_tokens - len(job.tokens) for job in jobs)
        sampling = Sampling(max_tokens=most + 1, temperature=jobs[0].sampling.temperature, top_p=jobs[0].sampling.top_p)
        self._engine.decode([job.prompt + job.tokens for job in jobs], sampling, on_token)

    def _draft(self, job: Job) -> None:
        count, ends = min(DRAFT, job.sampling.max_tokens - len(job.tokens)), self._engine.chat.eos_ids
        try:
            for drafted, logits in zip(*self._engine.draft(job.prompt + job.tokens, count), strict=True):
                token, complete = job.choose(logits, ends)
                if self._queue.push(job, token, ends, complete) or token != drafted:
                    break
        except ModelError as error:  # of the grammar
            job.end("failed", error=error.what)
