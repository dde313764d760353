"""What collect wrote, read in shares: each task takes the lines that start within its byte range."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from conf.errors import DataError
from stages.files import DECODER
from stages.steps.rows import LONG_NUMBER, STRINGS, Row, to_document
from stages.steps.tally import write_tally


class ReadSources(PipelineStep):
    """Reads its share of every source: the lines that start within its byte range."""

    type = "READER"
    name = "sources"

    def __init__(self, sources: dict[str, tuple[str, str]], counts: Path) -> None:
        """Args: sources: name -> (path of the JSONL, use). counts: takes the tally of rows read per source."""
        super().__init__()
        self.sources, self.counts = sources, counts

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield documents."""
        if data:
            yield from data
        read: dict[str, int] = {}
        for source, (path, use) in sorted(self.sources.items()):
            read[source] = 0
            for row in read_share(Path(path), rank, world_size):
                if row["source"] != source:
                    raise DataError(f"{path}: row {row['id']} says source={row['source']!r}", "the file was altered; remove it and run `dvc repro`")
                read[source] += 1
                yield to_document(row, use)
        write_tally(self.counts, rank, {"read": read})


def read_share(path: Path, share: int, shares: int) -> Iterator[Row]:
    """The rows whose line starts in the given share of the file's bytes.

    Raises:
        DataError: the file is missing, or a line is no row; names file and line.
    """
    if not path.exists():
        raise DataError(f"{path} is missing", "run `dvc repro`, or `dvc pull` to fetch it")
    size = path.stat().st_size
    start, end = size * share // shares, size * (share + 1) // shares
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        while (at := file.tell()) < end:
            line = file.readline()
            try:
                row = parse(line)
            except (ValueError, RecursionError) as error:
                remedy = "the file is truncated or garbled; remove it and run `dvc repro`"
                raise DataError(f"{path}:{line_number(path, at)}: {error}", remedy) from error
            yield row


def parse(line: bytes) -> Row:
    """One line as a row; half a surrogate pair, which no file can hold, becomes U+FFFD.

    Raises:
        ValueError: it is no row, with the reason.
    """
    if not line.endswith(b"\n"):
        raise ValueError("the file ends in the middle of a line")
    try:
        row = None if LONG_NUMBER.search(line) else orjson.loads(line)
    except orjson.JSONDecodeError:  # the other parser says why, or knows better
        row = None
    if row is None:
        row = parse_slowly(line)
    if not isinstance(row, dict) or not row.get("id") or not all(isinstance(row.get(field, ""), str) for field in STRINGS):
        raise ValueError(f"no record: an object with an id and texts in {', '.join(STRINGS)}")
    return row


def parse_slowly(line: bytes) -> Any:
    """A JSON value that orjson does not take: half a surrogate pair, a number of more than 64 bits.

    Raises:
        ValueError: it is no JSON, with the reason.
    """
    text = line.decode("utf-8")
    try:
        value = DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "\\ud" in text or "\\uD" in text:
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return value


def line_number(path: Path, offset: int) -> int:
    """Number of the line that starts at a byte offset."""
    with path.open("rb") as file:
        return 1 + sum(file.read(min(1 << 20, offset - at)).count(b"\n") for at in range(0, offset, 1 << 20))
