"""What is removed of the database: what is too old, and what is kept of a user or of a key. Each removal leaves a row in `removals`.

Rows are named by a digest of the user, so that a removal can be shown to have happened without keeping whom it was about.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Engine, Table, and_, select

from conf.errors import ConfigError
from stages.serve.database import EVENTS, RATINGS, REMOVALS

PIECE = 5000
"""Most events that one transaction of the retention removes: new ones wait for it."""


@dataclass(frozen=True, kw_only=True)
class Removed:
    """How many rows went."""

    events: int
    ratings: int


def expire(engine: Engine, days: int) -> int:
    """Remove up to PIECE events that are older than so many days; returns how many there were."""
    old = select(EVENTS.c.id).where(EVENTS.c.at < time.time() - days * 86_400).limit(PIECE)
    with engine.begin() as connection:
        owner = select(EVENTS.c.user).where(EVENTS.c.id == RATINGS.c.answer_id).scalar_subquery()
        unnamed = RATINGS.c.user.is_(None) & RATINGS.c.answer_id.in_(old)
        connection.execute(RATINGS.update().where(unnamed).values(user=owner))  # or nobody could find them for this user
        events = connection.execute(EVENTS.delete().where(EVENTS.c.id.in_(old))).rowcount
        if events:
            _tell(connection, "retention", Removed(events=events, ratings=0))
    return events


def forget(engine: Engine, user: str | None, key: str | None = None) -> Removed:
    """Remove the events and ratings of a user, of a key, or of a user of a key (user names are a tenant's own), and the ratings of those events.

    Args:
        user: as the requests named it in `user`; null: every user of the key.
        key: id of the API key; null: any.

    Raises:
        ConfigError: somebody reads the database, so that SQLite's log cannot be cut.
        ValueError: neither is given.
    """
    if user is None and key is None:
        raise ValueError("neither a user nor a key")
    with engine.begin() as connection:
        answers = select(EVENTS.c.id).where(_theirs(EVENTS, user, key))
        ratings = connection.execute(RATINGS.delete().where(_theirs(RATINGS, user, key) | RATINGS.c.answer_id.in_(answers))).rowcount
        removed = Removed(events=connection.execute(EVENTS.delete().where(_theirs(EVENTS, user, key))).rowcount, ratings=ratings)
        _tell(connection, "forgotten", removed, user, key)
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            if connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar_one():  # the log still holds what was deleted
                raise ConfigError("the rows are removed, but the write-ahead log still holds them: somebody reads the database", "run it again later")
    return removed


def _theirs(table: Table, user: str | None, key: str | None) -> ColumnElement[bool]:
    return and_(*(table.c[name] == value for name, value in (("user", user), ("key", key)) if value is not None))


def _tell(connection: Connection, why: str, removed: Removed, user: str | None = None, key: str | None = None) -> None:
    digest = None if user is None else hashlib.sha256(user.encode()).hexdigest()
    row = {"at": time.time(), "why": why, "user_sha256": digest, "key": key, "events": removed.events, "ratings": removed.ratings}
    connection.execute(REMOVALS.insert(), [row])


def removals(engine: Engine) -> Iterator[dict[str, object]]:
    """All removals, the oldest first, as rows of the table."""
    with engine.connect() as connection:
        for row in connection.execute(select(REMOVALS).order_by(REMOVALS.c.number)).mappings():
            yield dict(row)
