"""The database of events and ratings: where it is, its tables, and how it is opened.

It is in the file or database that `TRUNKLINE_EVENTS` names (a path, or a URL: `postgresql+psycopg://user:password@host/name`), else in
.dvc/tmp/trunkline/events.sqlite of a repository, else in ~/.local/state/trunkline/events.sqlite.

SQLite runs in WAL mode with `synchronous=FULL`, so that what is committed is on the disk, and `secure_delete`, so that what is deleted is
overwritten. PostgreSQL does the first by its own default, and the second when it vacuums. Several services may open one database at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Dialect,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    create_engine,
    event,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.sql.dml import Insert

from conf.errors import ConfigError

VARIABLE = "TRUNKLINE_EVENTS"
ALONE = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "SELECT pg_advisory_xact_lock(7472756)"}
"""Dialect -> what lets one process at a time make the tables."""


class Words(TypeDecorator[str]):
    """Text without NUL, which a model may say and PostgreSQL does not take."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """What is stored."""
        return None if value is None else value.replace("\0", "\N{REPLACEMENT CHARACTER}")


METADATA = MetaData()
"""Times are seconds since 1970, durations are seconds."""
EVENTS = Table(
    "events", METADATA,
    Column("id", String(64), primary_key=True), Column("at", Float, index=True, nullable=False), Column("digest", String(64), nullable=False),
    Column("commit", String(64)), Column("key", String(40)), Column("user", String(512), index=True), Column("route", String(32), nullable=False),
    Column("streamed", Boolean, nullable=False), Column("status", Integer, nullable=False), Column("finish_reason", String(16)),
    Column("prompt_tokens", Integer, nullable=False), Column("completion_tokens", Integer, nullable=False), Column("queue", Float),
    Column("prefill", Float), Column("first", Float), Column("total", Float, nullable=False), Column("verdict", JSON),
    Column("question", Words), Column("answer", Words),
)  # fmt: skip
"""One row a request."""
RATINGS = Table(
    "ratings", METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True), Column("at", Float, nullable=False),
    Column("answer_id", String(64), index=True, nullable=False),
    Column("rating", String(8), nullable=False), Column("comment", Words), Column("correction", Words), Column("user", String(512), index=True),
    Column("key", String(40)), Column("digest", String(64), nullable=False),
)  # fmt: skip
"""One row a rating."""
REMOVALS = Table(
    "removals", METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True), Column("at", Float, nullable=False), Column("why", String(16), nullable=False),
    Column("user_sha256", String(64)), Column("key", String(40)), Column("events", Integer, nullable=False), Column("ratings", Integer, nullable=False),
)  # fmt: skip
"""One row a removal: that it happened, and how much it took; nothing of what was removed. `why`: `retention` or `forgotten`."""


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


def connect(url: str, seconds: int = 10) -> Engine:
    """Open a database and make its tables.

    Args:
        url: of SQLAlchemy's form.
        seconds: that PostgreSQL may take for a statement, unless the URL has `options`.

    Raises:
        ConfigError: it is neither SQLite nor PostgreSQL, or cannot be opened.
    """
    name = url if url.startswith("sqlite") else url.partition("://")[0]  # a URL may hold a password
    try:
        engine = _engine(url, seconds)
        if engine.dialect.name not in ALONE:
            raise ConfigError(f"{VARIABLE}: {name} is not supported", "name a file, or a URL that begins with postgresql:// or sqlite:///")
        with engine.begin() as connection:
            connection.exec_driver_sql(ALONE[engine.dialect.name])
            METADATA.create_all(connection)
        return engine
    except (ArgumentError, SQLAlchemyError, ImportError, OSError) as error:
        raise ConfigError(
            f"{VARIABLE}: {name} cannot be opened: {type(error).__name__}", "name a file that can be written, or a database that answers"
        ) from error


def _engine(url: str, seconds: int) -> Engine:
    engine = create_engine(url, hide_parameters=True, pool_pre_ping=True)  # what a user wrote must not reach the log
    if engine.dialect.name == "sqlite":
        Path(engine.url.database or "").parent.mkdir(parents=True, exist_ok=True)
        event.listen(engine, "connect", _pragmas)
        return engine
    own = {"connect_timeout": "5", "options": f"-c statement_timeout={seconds}s"}
    given = {name: value for name, value in own.items() if name not in engine.url.query}
    return create_engine(url, hide_parameters=True, pool_pre_ping=True, connect_args=given)


def _pragmas(connection: object, _: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def insert_new(connection: Connection) -> Insert:
    """An insertion of events that leaves those alone that are there: a batch may be written again when nobody knows whether it was."""
    if connection.dialect.name == "sqlite":
        return sqlite.insert(EVENTS).on_conflict_do_nothing()
    return postgresql.insert(EVENTS).on_conflict_do_nothing()
