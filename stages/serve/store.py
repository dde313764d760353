"""What the service writes down: an event for each request, and ratings.

SQLite in WAL mode, in the file or database that `TRUNKLINE_EVENTS` names (a path, or a URL of SQLAlchemy's: `postgresql+psycopg://…`), else in
.dvc/tmp/trunkline/events.sqlite of a repository, else in ~/.local/state/trunkline/events.sqlite.

Acknowledged. A rating is acknowledged by the 200 of `/v1/feedback`: it is then committed and on the disk (`synchronous=FULL`), and no kill and no
power cut loses it. An event is written behind the answer, which never waits for it: it is acknowledged when `trunkline_events_total` has
counted it as `written`, FLUSH seconds after the answer at the latest, and a kill within that time loses it. When the database is slower than the
service for long, MOST_WAITING events wait, and further ones are counted as `dropped`.

    python -m stages.serve.store forget <user>    # remove the events and the ratings of a user
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ConfigError
from stages.serve.metrics import EVENTS

if TYPE_CHECKING:
    from sqlalchemy import Engine, Table

VARIABLE = "TRUNKLINE_EVENTS"
FLUSH = 0.2
"""Seconds for which events are gathered into one transaction."""
MOST_WAITING = 20_000
SWEEP = 3600.0
"""Seconds between two removals of what is too old."""

log = logging.getLogger(__name__)


def address(environment: Mapping[str, str]) -> str:
    """URL of the database.

    Raises:
        ConfigError: none is named, and there is no place for one.
    """
    value = environment.get(VARIABLE, "")
    if "://" in value:
        return value
    if value:
        path = Path(value)
    elif Path(".dvc").is_dir():
        path = Path(".dvc/tmp/trunkline/events.sqlite")
    else:
        try:
            path = Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "trunkline/events.sqlite"
        except RuntimeError as error:
            raise ConfigError(f"{VARIABLE} is not set, and there is no home directory", f"set {VARIABLE} to a file") from error
    return f"sqlite:///{path.resolve()}"


def tables() -> tuple[Table, Table]:
    """`events` and `ratings`; times are seconds since 1970, durations are seconds."""
    from sqlalchemy import JSON, Boolean, Column, Float, Integer, MetaData, String, Table, Text

    metadata = MetaData()
    events = Table(
        "events", metadata,
        Column("id", String(64), primary_key=True), Column("at", Float, index=True, nullable=False), Column("digest", String(64), nullable=False),
        Column("commit", String(64)), Column("key", String(40)), Column("user", String(512), index=True), Column("route", String(32), nullable=False),
        Column("streamed", Boolean, nullable=False), Column("status", Integer, nullable=False), Column("finish_reason", String(16)),
        Column("prompt_tokens", Integer, nullable=False), Column("completion_tokens", Integer, nullable=False), Column("queue", Float),
        Column("prefill", Float), Column("first", Float), Column("total", Float, nullable=False), Column("verdict", JSON),
        Column("question", Text), Column("answer", Text),
    )  # fmt: skip
    ratings = Table(
        "ratings", metadata,
        Column("number", Integer, primary_key=True, autoincrement=True), Column("at", Float, nullable=False),
        Column("answer_id", String(64), index=True, nullable=False),
        Column("rating", String(8), nullable=False), Column("comment", Text), Column("correction", Text), Column("user", String(512), index=True),
        Column("key", String(40)), Column("digest", String(64), nullable=False),
    )  # fmt: skip
    return events, ratings


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
        self.events, self.ratings = tables()
        self._queue: queue.Queue[dict[str, object] | None] = queue.Queue(MOST_WAITING)
        self._writer = threading.Thread(target=self._write, name="events")
        self._writer.start()

    def put(self, event: dict[str, object]) -> None:
        """Hand over an event; never waits."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            EVENTS.labels("dropped").inc()

    def rate(self, rating: Mapping[str, object]) -> None:
        """Write a rating; it is on the disk when this returns.

        Raises:
            SQLAlchemyError: it is not.
        """
        with self._engine.begin() as connection:
            connection.execute(self.ratings.insert(), [dict(rating)])

    def forget(self, user: str) -> int:
        """Remove what is kept of a user; returns the number of rows."""
        from sqlalchemy import select

        with self._engine.begin() as connection:
            answers = select(self.events.c.id).where(self.events.c.user == user)
            theirs = (self.ratings.c.user == user) | self.ratings.c.answer_id.in_(answers)
            ratings = connection.execute(self.ratings.delete().where(theirs)).rowcount
            return ratings + connection.execute(self.events.delete().where(self.events.c.user == user)).rowcount

    def close(self) -> None:
        """Write what waits, and end the writer."""
        self._queue.put(None)
        self._writer.join()
        self._engine.dispose()

    def _write(self) -> None:
        over, due = False, 0.0
        while not over:
            if time.monotonic() >= due:
                self._sweep()
                due = time.monotonic() + SWEEP
            batch, over = self._gather()
            if batch:
                self._commit(batch)

    def _gather(self) -> tuple[list[dict[str, object]], bool]:
        """What came within FLUSH of the first, and whether that was all."""
        batch: list[dict[str, object]] = []
        end: float | None = None
        while len(batch) < 1000:
            try:
                event = self._queue.get(timeout=0.5 if end is None else max(end - time.monotonic(), 0))
            except queue.Empty:
                if end is None and threading.main_thread().is_alive():
                    continue
                return batch, not threading.main_thread().is_alive()
            if event is None:
                return batch, True
            batch.append(event)
            end = end or time.monotonic() + FLUSH
        return batch, False

    def _commit(self, batch: list[dict[str, object]]) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with self._engine.begin() as connection:
                connection.execute(self.events.insert(), batch)
            EVENTS.labels("written").inc(len(batch))
        except SQLAlchemyError:  # the answers went out already; what is lost is counted, and the next batch is tried
            log.exception("%d events were not written", len(batch))
            EVENTS.labels("dropped").inc(len(batch))

    def _sweep(self) -> None:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with self._engine.begin() as connection:
                connection.execute(self.events.delete().where(self.events.c.at < time.time() - self._days * 86_400))
        except SQLAlchemyError:
            log.exception("old events were not removed")


def connect(url: str) -> Engine:
    """Open a database and make its tables.

    Raises:
        ConfigError: it cannot be opened.
    """
    from sqlalchemy import create_engine, event
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        engine = create_engine(url, hide_parameters=True)  # what a user wrote must not reach the log
        if engine.dialect.name == "sqlite":
            Path(engine.url.database or "").parent.mkdir(parents=True, exist_ok=True)

            @event.listens_for(engine, "connect")
            def _pragmas(connection: object, _: object) -> None:
                cursor = connection.cursor()  # type: ignore[attr-defined]
                for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
                    cursor.execute(f"PRAGMA {pragma}")
                cursor.close()

        tables()[0].metadata.create_all(engine)
        return engine
    except (ArgumentError, SQLAlchemyError, ImportError, OSError) as error:
        name = url if url.startswith("sqlite") else url.partition("://")[0]  # a URL may hold a password
        raise ConfigError(
            f"{VARIABLE}: {name} cannot be opened: {type(error).__name__}", "name a file that can be written, or a database that answers"
        ) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Remove what is kept of a user."""
    parser = argparse.ArgumentParser(prog="python -m stages.serve.store", description="Remove the events and ratings of a user.")
    parser.add_argument("verb", choices=["forget"])
    parser.add_argument("user", help="as the requests named it in `user`")
    given = parser.parse_args(arguments)
    try:
        store = Store(address(os.environ), days=36_500)
    except ConfigError as error:
        sys.exit(str(error))
    try:
        sys.stdout.write(f"removed {store.forget(given.user)} rows\n")
    finally:
        store.close()


if __name__ == "__main__":
    main()
