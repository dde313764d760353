"""How rows travel: records as datatrove documents, read by byte ranges, kept on disk in sorted runs that are merged in order.

The order of everything is (use, source, id): rows of `use: test` first, then `train`, then `corpus`. Nothing here holds
more than one run (`RUN_BYTES`) in memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

from datatrove.data import Document

from conf.schema import Pii
from stages.files import canonical, read_jsonl
from stages.pii import pseudonym, redact
from stages.records import Record

Row = dict[str, Any]
USES = ("test", "train", "corpus", "benchmark")
RUN_BYTES = 8_000_000
FAN_IN = 64
STRINGS = tuple(field.name for field in fields(Record) if field.type == "str")


def to_document(row: Row, use: str) -> Document:
    """A row as a document; `use` goes with it."""
    metadata = {field: row.get(field, "") for field in STRINGS if field not in ("id", "text")}
    return Document(text=row.get("text", ""), id=row["id"], metadata={**metadata, "meta": row.get("meta", {}), "use": use})


def to_row(document: Document) -> Row:
    """The document as a row, with its `use`."""
    return {"id": document.id, "text": document.text, "messages": [], **document.metadata}


def key(row: Row) -> tuple[int, str, str]:
    """What rows are ordered by."""
    return USES.index(row["use"]), row["source"], row["id"]


def name(row: Row) -> str:
    """The row for people: `source/id`."""
    return f"{row['source']}/{row['id']}"


class Runs:
    """Writes rows as sorted files of at most `RUN_BYTES`; `merged` reads them back as one sequence."""

    def __init__(self, folder: Path, prefix: str, by: Callable[[Row], Any]) -> None:
        """Args: folder: where. prefix: unique among the writers of the folder. by: sort key of a row."""
        self.folder, self.prefix, self.by = folder, prefix, by
        self.rows: list[Row] = []
        self.bytes = self.written = 0

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.bytes += 200 + sum(len(v) for v in row.values() if isinstance(v, str))
        if self.bytes > RUN_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is still in memory."""
        if self.rows:
            write_run(self.folder / f"{self.prefix}-{self.written:06d}.jsonl", sorted(self.rows, key=self.by))
            self.rows, self.bytes, self.written = [], 0, self.written + 1


def write_run(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as compact JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(canonical(row, indent=None) for row in rows)


def merged(folder: Path, by: Callable[[Row], Any]) -> Iterator[Row]:
    """All rows of a folder's runs in order, equal ones in that of the runs' names; more than `FAN_IN` files are never open at once."""
    runs = sorted(folder.glob("*.jsonl"))
    for level in count():
        if len(runs) <= FAN_IN:
            break
        groups = [runs[at : at + FAN_IN] for at in range(0, len(runs), FAN_IN)]
        runs = [folder / f"merged-{level}-{number:06d}.jsonl" for number in range(len(groups))]
        for run, group in zip(runs, groups, strict=True):
            write_run(run, heapq.merge(*(read_jsonl(piece) for piece in group), key=by))
            for piece in group:
                piece.unlink()
    yield from heapq.merge(*(read_jsonl(run) for run in runs), key=by)


class Dropped:
    """Keeps dropped rows with their reason, and without personal data; datatrove's filters write to it as `exclusion_writer`."""

    def __init__(self, folder: Path, step: str, pii: Pii) -> None:
        """Args: folder: of the runs of dropped rows. step: which filter writes. pii: what is redacted."""
        self.folder, self.step, self.pii = folder, step, pii
        self.runs: dict[int, Runs] = {}

    def __enter__(self) -> Dropped:
        """Datatrove's filters open their writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Write what is left."""
        for runs in self.runs.values():
            runs.close()
        self.runs = {}

    def write(self, document: Document, rank: int = 0) -> None:
        """Keep one document; its reason is in the metadata, as datatrove puts it there."""
        row = to_row(document)
        self.add(row, row.pop("filter_reason"), row.pop("of", ""), rank)

    def add(self, row: Row, reason: str, of: str = "", rank: int = 0) -> None:
        """Keep one row. Args: reason: which rule. of: the row that is kept instead, if it is a repeat."""
        kept = {**redacted(row, self.pii), "reason": f"{reason} of {of}" if of else reason}
        self.runs.setdefault(rank, Runs(self.folder, f"{self.step}-{rank:05d}", by=dropped_key)).add(kept)


def dropped_key(row: Row) -> tuple[str, str, str, str]:
    """What dropped rows are ordered by."""
    return row["source"], row["id"], row["reason"], row["text"]


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
            return {name: redacted_value(item, pii) for name, item in value.items()}
    return value
