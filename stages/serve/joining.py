"""Work on an engine whose batch takes answers in at any step: continuous batching.

One thread steps the batch. Before each step it ends what nobody wants any more and takes in what waits, first come first served, while there
is room: a latecomer waits for one step, and nothing is encoded again. Steered answers ride in the same batch: each token is chosen here, from
the logits of its answer. An answer that goes frees its place at once.
"""

from __future__ import annotations

import logging
import time

from conf.errors import ModelError
from stages.serve.engine import LiveBatch
from stages.serve.jobs import Job, Queue

log = logging.getLogger(__name__)


class Joining:
    """The one batch."""

    threads = 1

    def __init__(self, batch: LiveBatch, queue: Queue, ends: set[int]) -> None:
        """Args: ends: tokens that end an answer."""
        self._batch, self._queue, self._ends = batch, queue, ends
        self._working: dict[int, Job] = {}

    def run(self) -> None:
        """The thread."""
        queue = self._queue
        while True:
            with queue.change:
                while not queue.waiting and not self._working and not queue.stopping():
                    queue.change.wait(0.5)
                queue.sift()
                if queue.stopping():
                    self._leave({place: job.end("cancelled") for place, job in self._working.items()})
                    return
                self._take()
            self._step()

    def _take(self) -> None:
        """Take in what there is room for."""
        waiting = self._queue.waiting
        while waiting:
            job = waiting[0]
            try:
                place = self._batch.join(job.prompt, job.sampling.max_tokens)
            except ModelError as error:
                place, _ = None, job.end("failed", error=error.what)
            except Exception:
                log.exception("an answer could not be begun")
                place, _ = None, job.end("failed")
            if place is not None:
                self._working[place] = job
                job.begin()
                self._queue.working = len(self._working)
            elif job.reason is None:
                return
            waiting.popleft()

    def _step(self) -> None:
        """One step of all."""
        now = time.monotonic()
        self._leave({place: job.given_up(now) for place, job in self._working.items()})
        try:
            found = self._batch.step()
        except Exception:  # the answers are told, and the log has the traceback: the next ones may do better
            log.exception("a batch of %d failed", len(self._working))
            self._leave({place: job.end("failed") for place, job in self._working.items()})
            return
        over = {}
        for place, logits in found.items():
            job = self._working[place]
            try:
                token, complete = job.choose(logits, self._ends)
                over[place] = self._queue.push(job, token, self._ends, complete)
            except ModelError as error:  # of the grammar
                over[place] = job.end("failed", error=error.what)
            except Exception:
                log.exception("a token could not be chosen")
                over[place] = job.end("failed")
            if not over[place]:
                self._batch.push(place, token)
        self._leave(over)

    def _leave(self, over: dict[int, bool]) -> None:
        """Free the places of the answers that are over."""
        for place in [place for place, is_over in over.items() if is_over]:
            self._batch.leave(place)
            del self._working[place]
        self._queue.working = len(self._working)
