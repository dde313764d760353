"""The record type that flows through every data stage, from a source's row to a training conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

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


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSONL file, streamed."""
    for row in read_jsonl(path):
        yield Record(**row)
