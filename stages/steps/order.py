"""All rows in one order, cut into parts; and what is asked of every row later, in plain columns on disk, a row's place as its index.

The rows are moved as bytes: what decides lies in a head in front of each line, so that no row is parsed here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from stages.steps.rows import USES, Dropped, Row, decode, encode

PART_BYTES = 4_000_000
"""Largest part: a task holds the n-grams of one."""
SPLITS = ("train", "validation", "test", "corpus")
COLUMNS = {"digests": np.dtype(("<u8", 2)), "uses": np.dtype("u1"), "splits": np.dtype("u1"), "ends": np.dtype("<u8")}
BUFFERED = 10_000


class Head(NamedTuple):
    """What stands before a row in a run."""

    use: int
    source: str
    id: str
    digest: str
    group: str
    split: int

    @classmethod
    def of(cls, row: Row, *, keep_groups: bool) -> Head:
        """The head of a cleaned row. Args: keep_groups: whether a group may lie on one side only."""
        group = hashlib.sha256(row["group"].encode()).hexdigest()[:16] if keep_groups and row["group"] else ""
        return cls(USES.index(row["use"]), row["source"], row["id"], digest(row), group, SPLITS.index(row["split"]))

    def line(self, row: Row) -> bytes:
        """The line of a run."""
        return b"%b\t%b\n" % (encode(self), encode(row))

    @property
    def name(self) -> str:
        """The row for people: `source/id`."""
        return f"{self.source}/{self.id}"


def digest(row: Row) -> str:
    """128 bits of the case-folded text; documents have others than rows."""
    return hashlib.sha256(f"{row['use'] == 'corpus'}\n{row['text'].casefold()}".encode()).hexdigest()[:32]


def head(line: bytes) -> Head:
    """The head of a run's line."""
    return Head(*orjson.loads(line[: line.index(b"\t")]))


def place(line: bytes) -> tuple[int, str, str]:
    """What rows are ordered by: (use, source, id)."""
    return head(line)[:3]


@dataclass(frozen=True)
class Parts:
    """Where the ordered rows are cut."""

    starts: tuple[int, ...]
    """The place of the first row of each part, and the number of all rows."""
    first_corpus: int
    """The first part that holds corpus documents; those before it hold none."""

    @property
    def total(self) -> int:
        """Number of parts."""
        return len(self.starts) - 1


class Table:
    """The columns of the ordered rows: `digests` (rows, 2), `uses`, `splits`, and `ends` of the names in one long string."""

    def __init__(self, folder: Path) -> None:
        """Args: folder: holds one file per column."""
        self.folder = folder
        self.pending: list[Head] = []
        self.end = 0

    def add(self, row: Head) -> None:
        """Append a row."""
        self.pending.append(row)
        if len(self.pending) == BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [row.name.encode() for row in self.pending]
        ends = self.end + np.cumsum([0, *map(len, names)])[1:]
        self.end = int(ends[-1]) if len(ends) else self.end
        digests = np.frombuffer(bytes.fromhex("".join(row.digest for row in self.pending)), dtype="<u8")
        columns = {"digests": digests, "uses": [row.use for row in self.pending], "splits": [row.split for row in self.pending], "ends": ends}
        for name, values in columns.items():
            with (self.folder / name).open("ab") as file:
                file.write(np.asarray(values, dtype=COLUMNS[name].base).tobytes())
        with (self.folder / "names").open("ab") as file:
            file.writelines(names)
        self.pending = []

    def column(self, name: str, start: int = 0, end: int | None = None) -> np.ndarray:
        """A column's values from one row to another."""
        kind = COLUMNS[name]
        count = -1 if end is None else (end - start) * (kind.itemsize // kind.base.itemsize)
        return np.fromfile(self.folder / name, dtype=kind.base, count=count, offset=start * kind.itemsize).reshape(-1, *kind.shape)

    def name(self, row: int) -> str:
        """The row for people."""
        start, end = self.column("ends", row - 1, row + 1) if row else (0, self.column("ends", 0, 1)[0])
        with (self.folder / "names").open("rb") as file:
            file.seek(start)
            return file.read(int(end - start)).decode()


def order(lines: Iterable[bytes], folder: Path, table: Table, *, part_bytes: int, dropped: Dropped) -> Parts:
    """Cut the ordered rows into parts, and fill the table.

    A second row with the same source and id is dropped (`duplicate:id`), and a training row whose group is in a source of
    `use: test` too (`group:test`). The digests of those groups are held in memory.

    Args:
        lines: of the runs, ordered by (use, source, id).
        folder: takes the parts.
        table: takes the columns.
        part_bytes: size of a part.
        dropped: takes what is dropped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts: list[int] = []
    rows, size, last, first_corpus = 0, 0, "", None
    tested: set[str] = set()
    with ExitStack() as stack:
        file: BufferedWriter | None = None
        for line in lines:
            row, body = head(line), line[line.index(b"\t") + 1 :]
            if row.name == last:
                dropped.add(decode(body), "duplicate:id", last)
                continue
            last, use = row.name, USES[row.use]
            if use == "train" and row.group in tested:
                dropped.add(decode(body), "group:test")
                continue
            if use == "test" and row.group:
                tested.add(row.group)
            starts_corpus = first_corpus is None and use == "corpus"
            if file is None or size >= part_bytes or starts_corpus:
                stack.close()
                file = stack.enter_context((folder / f"{len(starts):05d}.jsonl").open("wb"))
                first_corpus = len(starts) if starts_corpus else first_corpus
                starts.append(rows)
                size = 0
            file.write(body)
            table.add(row)
            rows, size = rows + 1, size + len(body)
    table.flush()
    return Parts(starts=(*starts, rows), first_corpus=len(starts) if first_corpus is None else first_corpus)
