"""Between the API and the engine: which answers are worked on together, and for how long.

Where the engine takes answers into a running batch, `stages.serve.joining` works on them; else `stages.serve.slots`. With either, a cancelled
or late answer ends at its next token, and its place in the batch is free.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

from stages.serve.engine import Engine
from stages.serve.jobs import Job, Queue
from stages.serve.joining import Joining
from stages.serve.slots import Slots


class Scheduler:
    """Runs jobs on an engine."""

    def __init__(
        self, engine: Engine, *, slots: int, batch: int, most_waiting: int, room: float = math.inf, first_token: float = math.inf, kept: Sequence[int] = ()
    ) -> None:
        """Start the work.

        Args:
            engine: opened with `batches`.
            slots: batches that run on it at a time, where they take nobody in.
            batch: most answers in one of those.
            most_waiting: bound of the queue, in answers.
            room: most tokens of such a batch, prompts and answers.
            first_token: seconds within which an answer that is let in shall have its first token.
            kept: what most prompts begin with; encoded once.
        """
        self._queue = Queue(most_waiting, first_token)
        self.admission = self._queue.admission
        engine.keep(kept)
        live = engine.live()
        worker = Slots(engine, self._queue, slots, batch, room, kept) if live is None else Joining(live, self._queue, engine.chat.eos_ids)
        self._threads = [threading.Thread(target=worker.run, name=f"slot-{i}") for i in range(worker.threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Answers that nobody works on."""
        return len(self._queue.waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the answers of one request, all or none.

        Raises:
            Full: there is no room for them.
        """
        self._queue.submit(jobs)

    def close(self) -> None:
        """Give up what runs and waits, and end the threads."""
        self._queue.close()
        for thread in self._threads:
            thread.join()
