"""How rows travel: records as datatrove documents between steps, orjson lines in scratch, and sorted runs that are merged in order.

The order of everything is (use, source, id): rows of `use: test` first, then `train`, then `corpus`. Nothing here holds
more than one run (`RUN_BYTES`) in memory.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from conf.schema import Pii
from stages.pii import pseudonym, redact
from stages.records import Record

Row = dict[str, Any]
USES = ("test", "train", "corpus", "benchmark")
RUN_BYTES = 8_000_000
FAN_IN = 64
SCRATCH = ("use", "split", "index")
"""What a row carries between steps and no output holds."""
STRINGS = tuple(field.name for field in fields(Record) if field.type == "str")
OTHERS = tuple(name for name in STRINGS if name not in ("id", "text"))
LONGEST_DROPPED = 20_000
"""Characters of a dropped text that are kept: redacting one of 100 MB would take hours."""
LONGEST_FIND = 2_000
"""More characters than personal data has that is found as one."""
LONG_NUMBER = re.compile(rb"[0-9]{19}")
"""What orjson may read as a float because it does not fit into 64 bits."""
CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False)
"""As `stages.files.canonical` on one line; one encoder for all rows."""


def encode(value: object) -> bytes:
    """A value as JSON for scratch."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # a whole number of more than 64 bits, in `meta`
        return CANONICAL.encode(value).encode()


def decode(line: bytes) -> Any:
    """What `encode` wrote, or `publishable`."""
    return json.loads(line) if LONG_NUMBER.search(line) else orjson.loads(line)


def publishable(row: Row) -> bytes:
    """The row as a line of an output."""
    return f"{CANONICAL.encode(row)}\n".encode()


def to_document(row: Row, use: str) -> Document:
    """A row as a document; `use` goes with it."""
    get = row.get
    metadata = {field: get(field, "") for field in OTHERS}
    metadata["meta"], metadata["use"] = get("meta", {}), use
    return Document(text=get("text", ""), id=row["id"], metadata=metadata)


def to_row(document: Document) -> Row:
    """The document as a row, with its `use`."""
    return {"id": document.id, "text": document.text, "messages": [], **document.metadata}


class Runs:
    """Writes lines as sorted files of about `RUN_BYTES`; `merged` reads them back as one sequence."""

    def __init__(self, folder: Path, prefix: str) -> None:
        """Args: folder: where. prefix: unique among the writers of the folder."""
        self.folder, self.prefix = folder, prefix
        self.lines: list[tuple[Any, bytes]] = []
        self.bytes = self.written = 0

    def add(self, key: Any, line: bytes) -> None:
        """Keep a line. Args: key: what it is sorted by. line: it, with its end."""
        self.lines.append((key, line))
        self.bytes += 200 + len(line)
        if self.bytes > RUN_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is still in memory."""
        if self.lines:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lines.sort(key=lambda line: line[0])
            with (self.folder / f"{self.prefix}-{self.written:06d}.jsonl").open("wb") as file:
                file.writelines(line for _, line in self.lines)
            self.lines, self.bytes, self.written = [], 0, self.written + 1


def merged(folder: Path, by: Callable[..., Any]) -> Iterator[bytes]:
    """All lines of a folder's runs in order, equal ones in that of the runs' names; more than `FAN_IN` files are never open at once."""
    runs = sorted(folder.glob("*.jsonl"))
    for level in count():
        if len(runs) <= FAN_IN:
            break
        groups = [runs[at : at + FAN_IN] for at in range(0, len(runs), FAN_IN)]
        runs = [folder / f"merged-{level}-{number:06d}.jsonl" for number in range(len(groups))]
        for run, group in zip(runs, groups, strict=True):
            with run.open("wb") as file:
                file.writelines(heapq.merge(*map(read_lines, group), key=by))
            for piece in group:
                piece.unlink()
    yield from heapq.merge(*map(read_lines, runs), key=by)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, with their ends."""
    with path.open("rb") as file:
        yield from file


class Dropped:
    """Keeps dropped rows with their reason, and without personal data."""

    def __init__(self, folder: Path, step: str, pii: Pii) -> None:
        """Args: folder: of the runs of dropped rows. step: which filter writes. pii: what is redacted."""
        self.folder, self.step, self.pii = folder, step, pii
        self.runs: dict[int, Runs] = {}

    def __enter__(self) -> Dropped:
        """Use it as a context: leaving it writes what is left."""
        return self

    def __exit__(self, *error: object) -> None:
        """Write what is left."""
        for runs in self.runs.values():
            runs.close()
        self.runs = {}

    def add(self, row: Row, reason: str, of: str = "", rank: int = 0) -> None:
        """Keep one row. Args: reason: which rule. of: the row that is kept instead, if it is a repeat."""
        if len(row["text"]) > LONGEST_DROPPED:
            row = {**row, "text": f"{beginning(row['text'], self.pii)}… ({len(row['text'])} characters)"}
        kept = {**redacted(row, self.pii), "reason": f"{reason} of {of}" if of else reason}
        kept = {name: value for name, value in kept.items() if name not in SCRATCH}
        self.runs.setdefault(rank, Runs(self.folder, f"{self.step}-{rank:05d}")).add(dropped_key(kept), publishable(kept))


def beginning(text: str, pii: Pii) -> str:
    """As much as is kept of a long text; at its end no half of personal data, which nobody would recognise any more."""
    if pii.action == "off":
        return text[:LONGEST_DROPPED]
    return redact(text[: LONGEST_DROPPED + LONGEST_FIND], pii.kinds, pii.phone_regions)[:-LONGEST_FIND][:LONGEST_DROPPED]


def dropped_key(row: Row) -> tuple[str, str, str, str]:
    """What dropped rows are ordered by."""
    return row["source"], row["id"], row["reason"], row["text"]


class Filter(PipelineStep):
    """Drops documents for a reason. (Datatrove's base keeps running variances of each document's length and time: more work than most of our rules.)"""

    type = "FILTER"

    def __init__(self, dropped: Dropped) -> None:
        """Args: dropped: takes what is dropped."""
        super().__init__()
        self.dropped = dropped

    def reason(self, doc: Document) -> str | None:
        """Why the row is dropped; None keeps it."""
        raise NotImplementedError

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield what is kept."""
        with self.dropped:
            for doc in data:
                if (reason := self.reason(doc)) is None:
                    yield doc
                else:
                    row = to_row(doc)
                    self.dropped.add(row, reason, row.pop("of", ""), rank)


def redacted(row: Row, pii: Pii) -> Row:
    """The row with personal data written over in `text`, `completion`, and the texts of `meta`; `group` becomes a pseudonym."""
    if pii.action == "off":
        return row
    clean = {field: redact(row[field], pii.kinds, pii.phone_regions) for field in ("text", "completion")}
    group = pseudonym(row["group"], pii.kinds, pii.phone_regions)
    return {**row, **clean, "group": group, "meta": redacted_value(row["meta"], pii)}


def redacted_value(value: Any, pii: Pii) -> Any:
    """A JSON value with personal data written over in each text."""
    match value:
        case str():
            return redact(value, pii.kinds, pii.phone_regions)
        case list():
            return [redacted_value(item, pii) for item in value]
        case dict():
            named: dict[str, Any] = {}
            for name, item in value.items():
                clean = redact(name, pii.kinds, pii.phone_regions)
                named[clean if clean not in named else f"{clean} {len(named)}"] = redacted_value(item, pii)
            return named
    return value
