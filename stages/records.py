"""The record type that flows through every data stage, from a source's row to a training conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from conf.errors import DataError
from stages.files import read_jsonl


class Message(TypedDict):
    """One turn of a conversation, in OpenAI's form."""

    role: str
    content: str


@dataclass(kw_only=True)
class Record:
    """One row: a document (`text` alone) or a supervised pair (`text` and `completion`)."""

    id: str
    """Stable and unique within its source: the source's own id, or a digest of the content."""
    source: str
    """Name of the dataset in `conf/collect/`."""
    licence: str
    """SPDX identifier, from the source."""
    classification: str
    """public, internal or restricted, from the source."""
    text: str = ""
    """The document, or what the customer wrote."""
    completion: str = ""
    """What should be answered; empty for a document."""
    label: str = ""
    """Its class, where there is one."""
    group: str = ""
    """What keeps rows together in a split: a customer, a thread."""
    messages: list[Message] = field(default_factory=list)
    """The formatted conversation; empty before preprocess."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The source's other columns."""

    def row(self) -> dict[str, Any]:
        """The record as a JSON object; nested values are shared, not copied."""
        return dict(vars(self))


KINDS = {f.name: {"str": str, "list[Message]": list}.get(str(f.type), dict) for f in fields(Record)}
"""Field -> type of its values."""


def wrong(row: dict[str, Any]) -> str:
    """Why a row is no record; empty: it is one."""
    for name in ("id", "source", "licence", "classification"):
        if name not in row:
            return f"{name} is missing"
    for name, value in row.items():
        if name not in KINDS:
            return f"{name!r} is no field of a record (those are: {', '.join(KINDS)})"
        if not isinstance(value, KINDS[name]):
            return f"{name} is {repr(value)[:100]}, not a {KINDS[name].__name__}"
    for message in row.get("messages", []):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"a message is {repr(message)[:100]}, not {{role, content}}"
    return ""


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSONL file, streamed.

    Raises:
        DataError: the file is missing, or a line is no record; names file and line.
    """
    for number, row in enumerate(read_jsonl(path), 1):
        if reason := wrong(row):
            raise DataError(f"{path}:{number}: no record: {reason}", "the file was changed by hand, or is of an older version: remove it and run `dvc repro`")
        yield Record(**row)
