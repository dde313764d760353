"""What the service writes down: an event for each request, and ratings (tables and database: stages/serve/database.py).

Acknowledged. A rating is acknowledged by the 200 of `/v1/feedback`: it is then committed and on the disk, and no kill and no power cut loses it.
An event is written behind the answer, which never waits for it: it is acknowledged when `trunkline_events_total` has counted it as `written`, FLUSH
seconds after the answer at the latest, and a kill within that time loses it. While the database does not answer, a batch is tried again for PATIENCE
seconds and MOST_WAITING events wait; what comes to nothing is counted as `dropped`. A row that the database does not take is counted as `refused`, and the
others of its batch are written.

SQLite is the embedded default because it is faster where the service waits or must delete, and loses where it is asked or stored, which a service does seldom.
Against Parquet files read by DuckDB, over 1,000,000 rows, two runs on two idle cores (`tests/bench/events.py`): one row is on the disk in 0.3 to 0.4 ms
(99th percentile 0.5 to 1.5) against 1.4 to 1.6 (2.2 to 2.4), and a user's rows are gone in 0.02 s against 0.6 to 0.7. But it writes 71,000 rows a second
in batches against 168,000 to 292,000, gives the 95th percentile by route in 1.6 to 1.7 s against 0.2, and takes 427 MiB against 61.
A kill -9 lost nothing of either.

    python -m stages.serve.store forget <user> [--key <id>]   # remove the events and the ratings of a user, or of a key
    python -m stages.serve.store removals                     # what was removed when, by retention and by `forget`, as JSON lines
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, stop_after_delay, wait_exponential

from conf.errors import ConfigError
from stages.serve import metrics
from stages.serve.database import RATINGS, address, connect, insert_new
from stages.serve.removal import expire, forget, removals

FLUSH = 0.2
"""Seconds for which events are gathered into one transaction."""
BATCH = 1000
"""Most events of a transaction."""
MOST_WAITING = 20_000
PATIENCE = 60.0
"""Seconds for which a batch is tried again while the database does not answer."""
SWEEP = 3600.0
"""Seconds between two looks for what is too old."""
AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeout)
"""What a database raises that is locked, full, restarting, read-only or gone."""
ROW = (SQLAlchemyError, ValueError, TypeError, OverflowError)
"""What is raised about a row; the last three by the drivers themselves."""

log = logging.getLogger(__name__)


class Store:
    """Events behind the answers, ratings at once."""

    def __init__(self, url: str, days: int) -> None:
        """Open, make what is missing, and start the writer.

        Args:
            url: of SQLAlchemy's form.
            days: after which an event is removed.

        Raises:
            ConfigError: the database cannot be opened.
        """
        self._engine, self._days = connect(url), days
        self._queue: queue.Queue[dict[str, object]] = queue.Queue(MOST_WAITING)
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write, name="events")
        self._writer.start()

    def put(self, event: dict[str, object]) -> None:
        """Hand over an event; never waits."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            metrics.EVENTS.labels("dropped").inc()

    def rate(self, rating: Mapping[str, object]) -> None:
        """Write a rating; it is on the disk when this returns.

        Raises:
            SQLAlchemyError: it is not.
        """
        with self._engine.begin() as connection:
            connection.execute(RATINGS.insert(), [dict(rating)])

    def close(self) -> None:
        """Write what waits, and end the writer."""
        self._closing.set()
        self._writer.join()
        self._engine.dispose()

    # ------------------------------------------------------------ the writer's thread

    def _over(self) -> bool:
        return self._closing.is_set() or not threading.main_thread().is_alive()

    def _write(self) -> None:
        due = 0.0
        while True:
            over = self._over()  # what was put before it was said is written
            if time.monotonic() >= due:
                due = time.monotonic() + (0 if self._sweep() else SWEEP)
            batch = self._gather()
            if batch:
                self._commit(batch)
            elif over:
                return

    def _gather(self) -> list[dict[str, object]]:
        """What comes within FLUSH of the first; nothing, when nothing comes for a while."""
        batch: list[dict[str, object]] = []
        end = time.monotonic() + FLUSH
        while len(batch) < BATCH:
            left = end - time.monotonic()
            try:
                event = self._queue.get(block=left > 0 and not self._over(), timeout=max(left, 0.001))
            except queue.Empty:
                return batch
            end = end if batch else time.monotonic() + FLUSH
            batch.append(event)
        return batch

    def _commit(self, batch: list[dict[str, object]]) -> None:
        """Write a batch, but for the rows that the database does not take: it is halved until they are alone."""
        try:
            self._insert(batch)
            metrics.EVENTS.labels("written").inc(len(batch))
        except AWAY as error:  # the answers went out already; what is lost is counted, and the next batch is tried
            log.error("%d events were dropped: %s", len(batch), type(error).__name__)
            metrics.EVENTS.labels("dropped").inc(len(batch))
        except ROW as error:  # its text may quote what a user wrote: it does not go to the log
            if len(batch) > 1:
                self._commit(batch[: len(batch) // 2])
                self._commit(batch[len(batch) // 2 :])
                return
            log.error("an event was refused: %s", type(error).__name__)
            metrics.EVENTS.labels("refused").inc()

    def _insert(self, batch: list[dict[str, object]]) -> None:
        """Write a batch in one transaction; where the database does not answer, again and again for PATIENCE seconds or until it is closed."""
        late = stop_after_delay(PATIENCE)

        def stop(state: RetryCallState) -> bool:
            return self._over() or late(state)

        waits = wait_exponential(0.1, max=5.0)
        for attempt in Retrying(retry=retry_if_exception_type(AWAY), stop=stop, wait=waits, sleep=sleep_using_event(self._closing), reraise=True):
            with attempt, self._engine.begin() as connection:
                connection.execute(insert_new(connection), batch)

    def _sweep(self) -> bool:
        """Remove a piece of what is too old; returns whether there may be more."""
        try:
            return expire(self._engine, self._days) > 0
        except SQLAlchemyError as error:
            log.error("old events were not removed: %s", type(error).__name__)
            return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Remove what is kept of a user or a key, or tell what was removed."""
    parser = argparse.ArgumentParser(prog="python -m stages.serve.store", description="Remove events and ratings, and tell what was removed.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    forgets = verbs.add_parser("forget", help="remove what is kept of a user, of a key, or of a user of a key")
    forgets.add_argument("user", nargs="?", help="as the requests named it in `user`; none: every user of the key")
    forgets.add_argument("--key", help="id of an API key")
    verbs.add_parser("removals", help="tell what was removed, as JSON lines")
    given = parser.parse_args(arguments)
    if given.verb == "forget" and not (given.user or given.key):
        forgets.error("name a user, a key (--key), or both")
    try:
        engine = connect(address(os.environ), seconds=3600)
        if given.verb == "removals":
            sys.stdout.writelines(f"{json.dumps(row)}\n" for row in removals(engine))
        else:
            removed = forget(engine, given.user or None, given.key or None)
            sys.stdout.write(f"removed {removed.events} events and {removed.ratings} ratings\n")
    except ConfigError as error:
        sys.exit(str(error))
    except SQLAlchemyError as error:
        sys.exit(f"nothing was removed: {type(error).__name__}. Is the database in use? Try again.")


if __name__ == "__main__":
    main()
