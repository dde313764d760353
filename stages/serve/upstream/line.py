"""What is on its way to an upstream model, and what may be on it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from conf.schema import Classification
from stages.serve.admission import Admission, Full
from stages.serve.jobs import Job
from stages.serve.keys import Key

if TYPE_CHECKING:
    from stages.serve.upstream.engine import Client, UpstreamEngine

HEADER = "x-data-classification"
STRICTEST_LAST: tuple[Classification, ...] = get_args(Classification)


def classify(key: Key | None, stated: Sequence[str]) -> Classification:
    """Of a request: the strictest one of its key's and of what it states; the strictest of all with neither, or an unknown one."""
    known = [STRICTEST_LAST.index(key.classification)] if key is not None and key.classification is not None else []
    known += [STRICTEST_LAST.index(one) if one in STRICTEST_LAST else len(STRICTEST_LAST) - 1 for one in stated]
    return STRICTEST_LAST[max(known, default=len(STRICTEST_LAST) - 1)]


class Line:
    """What is on its way to the upstream: in the place of the scheduler."""

    def __init__(self, engine: UpstreamEngine, most: int) -> None:
        """Args: most: answers on their way."""
        self.engine, self._most, self.waiting = engine, most, 0
        self.admission = Admission(most, math.inf, lambda: self.waiting, lambda: 0)
        self._client: Client | None = None
        self._tasks = set[asyncio.Task[None]]()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def client(self) -> Client:
        """The client of the service's event loop."""
        if self._client is None:
            self._client, self._loop = self.engine.client(), asyncio.get_running_loop()
        return self._client

    def submit(self, jobs: Sequence[Job]) -> None:
        """Count the answers of one request in, all or none.

        Raises:
            Full: there is no room for them.
        """
        if self.waiting + len(jobs) > self._most:
            raise Full
        self.waiting += len(jobs)

    def send(self, task: asyncio.Task[None], jobs: Sequence[Job]) -> None:
        """Count them out when the task is over."""
        self._tasks.add(task)

        def over(_: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self.waiting -= len(jobs)

        task.add_done_callback(over)

    def close(self) -> None:
        """Give up what is on its way; called from any thread."""
        if self._loop is not None and self._loop.is_running():
            self._loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._client is not None:
            self._closing = asyncio.ensure_future(self._client.close())
