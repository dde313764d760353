"""The embedded database of events: SQLite in WAL mode (ours) against Parquet files read by DuckDB.

    python -m tests.bench.events

Ours is `stages.serve.store` as the service runs it. The other side writes what a writer like ours would: a batch is a Parquet file, written under another name, synced,
renamed, and the folder synced; DuckDB reads the folder, and a user's rows are deleted by writing each file that holds them anew. Measured: rows a second that
are on the disk, in batches of BATCH; how long one row takes to be there; the 95th percentile of the answer time by route over a day of DAY rows, the removal of a user, and
the size on disk; and what a kill -9 loses of what was acknowledged.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sqlalchemy import text

from stages.serve.database import connect, insert_new
from stages.serve.removal import forget
from stages.serve.store import BATCH
from tests.bench.load import centiles
from tests.bench.rows import Row, show

Event = dict[str, object]
T = TypeVar("T")
DAY = 1_000_000
SINGLES = 200
"""Rows that are written one at a time."""
BULK = 100
"""Batches that are written in a row."""
USERS = 10_000


class Side(Protocol):
    """A way to keep events."""

    def write(self, rows: Sequence[Event]) -> None:
        """Put them on the disk."""

    def slow(self) -> dict[str, float]:
        """Route -> 95th percentile of the answer time."""

    def forget(self, user: str) -> int:
        """Remove a user's rows; returns how many."""

    def ids(self) -> set[str]:
        """Every row's."""


class Sqlite:
    """Ours."""

    def __init__(self, folder: Path) -> None:
        """Open it."""
        self._engine = connect(f"sqlite:///{folder / 'events.sqlite'}")

    def write(self, rows: Sequence[Event]) -> None:
        """As the store's writer does."""
        with self._engine.begin() as connection:
            connection.execute(insert_new(connection), list(rows))

    def slow(self) -> dict[str, float]:
        """By the rank of each row in its route; DuckDB has a function for it."""
        ranked = "select route, total, cume_dist() over (partition by route order by total) as share from events"
        with self._engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(text(f"select route, min(total) from ({ranked}) where share >= 0.95 group by route"))}

    def forget(self, user: str) -> int:
        """As `python -m stages.serve.store forget` does."""
        return forget(self._engine, user).events

    def ids(self) -> set[str]:
        """Every row's."""
        with self._engine.connect() as connection:
            return {row[0] for row in connection.execute(text("select id from events"))}


@dataclass
class Parquet:
    """The other side."""

    folder: Path
    count: int = field(default=0)

    def write(self, rows: Sequence[Event]) -> None:
        """A file of its own."""
        self.count += 1
        self._put(self.folder / f"{self.count:08}.parquet", pa.Table.from_pylist(list(rows)))

    def _put(self, path: Path, table: pa.Table) -> None:
        fresh = path.with_suffix(".fresh")
        with fresh.open("wb") as out:
            pq.write_table(table, out, compression="zstd")
            out.flush()
            os.fsync(out.fileno())
        fresh.rename(path)
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _sql(self, query: str, *values: object) -> list[tuple[object, ...]]:
        with duckdb.connect() as connection:
            return connection.execute(query.replace("events", f"read_parquet('{self.folder}/*.parquet', filename = true)"), values).fetchall()

    def slow(self) -> dict[str, float]:
        """By DuckDB's own function."""
        return {
            str(route): float(str(value)) for route, value in self._sql('select route, quantile_disc(total, 0.95) from events where "at" >= 0 group by route')
        }

    def forget(self, user: str) -> int:
        """Writes anew each file that holds the user."""
        removed = 0
        for (name,) in self._sql('select distinct filename from events where "user" = ?', user):
            table = pq.read_table(str(name), partitioning=None)
            kept = table.filter(pc.not_equal(table["user"], user))
            removed += table.num_rows - kept.num_rows
            self._put(Path(str(name)), kept)
        return removed

    def ids(self) -> set[str]:
        """Every row's."""
        return {str(row[0]) for row in self._sql("select id from events")}


SIDES: dict[str, Callable[[Path], Side]] = {"SQLite": Sqlite, "Parquet": Parquet}


def events(count: int, first: int = 0) -> list[Event]:
    """So many, as the service writes them; the same for the same `first`."""
    rng = random.Random(first)
    return [
        {
            "id": f"chatcmpl-{first + i:032x}", "at": 1.7e9 + (first + i) * 0.0864, "digest": "d" * 64, "commit": "c" * 40, "key": f"key-{rng.randrange(20)}",
            "user": f"user-{rng.randrange(USERS)}", "route": rng.choice(("/v1/chat/completions", "/v1/completions")), "streamed": True, "status": 200,
            "finish_reason": "stop", "prompt_tokens": rng.randrange(20, 200), "completion_tokens": rng.randrange(1, 128), "queue": rng.expovariate(20),
            "prefill": rng.expovariate(10), "first": rng.expovariate(5), "total": rng.expovariate(1),
            "verdict": {"allowed": True, "reasons": ["classifier"], "score": rng.random()}, "question": None, "answer": None,
        }
        for i in range(count)
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One side."""

    rate: float
    """Rows a second, in batches."""
    single: list[float]
    """Seconds until one row is on the disk: median, 99th percentile."""
    query: float
    """Seconds of the 95th percentiles over DAY rows."""
    forget: float
    """Seconds of the removal of a user."""
    size: int
    """Bytes on the disk of DAY rows."""
    lost: int
    """Acknowledged rows that a kill lost."""
    answer: dict[str, float]
    """Of the query: both sides must say the same."""
    removed: int


def measure(name: str, folder: Path) -> Figures:
    """All of it, in this folder."""
    side, batches = SIDES[name](folder), [events(BATCH, first) for first in range(0, BULK * BATCH, BATCH)]
    began = time.perf_counter()
    for batch in batches:
        side.write(batch)
    rate = BULK * BATCH / (time.perf_counter() - began)
    for first in range(BULK * BATCH, DAY, BATCH):
        side.write(events(BATCH, first))
    size = sum(file.stat().st_size for file in folder.iterdir())
    answer, query = timed(side.slow)
    removed, gone = timed(lambda: side.forget("user-7"))
    shutil.rmtree(folder)
    folder.mkdir()
    few = SIDES[name](folder)
    waits = [timed(functools.partial(few.write, [row]))[1] for row in events(SINGLES)]
    return Figures(rate=rate, single=centiles(waits), query=query, forget=gone, size=size, lost=killed(name), answer=answer, removed=removed)


def timed(do: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the seconds that it took."""
    began = time.perf_counter()
    found = do()
    return found, time.perf_counter() - began


def killed(name: str) -> int:
    """Acknowledged rows that are gone after a kill -9 of the process that writes them."""
    with tempfile.TemporaryDirectory() as scratch:
        reader, writer = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=write_on, args=(name, scratch, writer))
        process.start()
        told = [reader.recv() for _ in range(50)]
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        while reader.poll():
            told.append(reader.recv())
        return len(set(told) - SIDES[name](Path(scratch)).ids())


def write_on(name: str, folder: str, acknowledge: Connection) -> None:
    """Write rows until somebody ends it, and tell of each when it is on the disk."""
    side, number = SIDES[name](Path(folder)), 0
    while True:
        (row,) = events(1, number)
        side.write([row])
        acknowledge.send(row["id"])
        number += 1


def rows() -> list[Row]:
    """For `tests.bench`: the bars are those by which the embedded default was chosen."""
    found = {}
    for name in SIDES:
        with tempfile.TemporaryDirectory() as scratch:
            (folder := Path(scratch) / "day").mkdir()
            found[name] = measure(name, folder)
            sys.stderr.write(f"{name}: {found[name]}\n")
    ours, theirs = found["SQLite"], found["Parquet"]
    assert ours.answer == theirs.answer and ours.removed == theirs.removed, "both sides must hold the same rows"

    def row(what: str, a: str, b: str, ratio: float, bar: str = "", met: bool = True) -> Row:
        return Row(what=f"events, SQLite against Parquet and DuckDB: {what}", ours=a, theirs=b, ratio=ratio, bar=bar, met=met)

    return [
        row(f"rows a second on the disk, in batches of {BATCH}", f"{ours.rate:,.0f}", f"{theirs.rate:,.0f}", ours.rate / theirs.rate),
        row("one row on the disk, median and 99th percentile", " and ".join(f"{1e3 * s:.1f} ms" for s in ours.single),
            " and ".join(f"{1e3 * s:.1f} ms" for s in theirs.single), ours.single[1] / theirs.single[1], "at most 1", ours.single[1] <= theirs.single[1]),
        row(f"95th percentile by route over {DAY:,} rows", f"{ours.query:.2f} s", f"{theirs.query:.2f} s", ours.query / theirs.query),
        row(f"removal of a user ({ours.removed} of {DAY:,} rows)", f"{ours.forget:.3f} s", f"{theirs.forget:.3f} s", ours.forget / theirs.forget, "at most 1",
            ours.forget <= theirs.forget),
        row(f"size of {DAY:,} rows", f"{ours.size / 2**20:.0f} MiB", f"{theirs.size / 2**20:.0f} MiB", ours.size / theirs.size),
        row("acknowledged rows that a kill -9 loses", str(ours.lost), str(theirs.lost), float("nan"), "0", not ours.lost),
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    show(rows())


if __name__ == "__main__":
    main()
