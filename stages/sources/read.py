"""Rows of a fetched file, whatever its format: streamed where the format allows it, and refused where a byte is wrong."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from conf.errors import ConfigError, DataError
from conf.schema import Dataset
from conf.yaml import parse as parse_yaml
from conf.yaml import refuse_bomb
from stages.files import canonical, refuse_constant
from stages.sources.html import html_rows
from stages.sources.plain import as_text, plain
from stages.sources.text import COMPRESSED, File

FIELDS = ("id", "text", "completion", "label", "group")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".md": "markdown",
    ".markdown": "markdown",
    ".txt": "text",
    ".text": "text",
    ".html": "html",
    ".htm": "html",
}

TABLES = ("csv", "parquet")
"""Formats whose files say which columns they have."""
FRONT = re.compile(r"---\r?\n(.*?\r?\n)---\r?\n", re.DOTALL)
LISTED = 30
"""Most names that a message lists."""

Columns = dict[str, object]
Located = Iterator[tuple[str, Columns]]
"""Rows with the place of each, as `file:line`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a source."""

    where: str
    """File and line, for messages."""
    fields: dict[str, str]
    """The record's fields that the source has."""
    meta: Columns
    """Its other columns."""
    digest: str
    """sha256 of the content."""


def format_of(dataset: Dataset, name: str) -> str:
    """The format of a file: what `conf/` says, or what its name says.

    Raises:
        ConfigError: neither says it.
    """
    if dataset.format != "auto":
        return dataset.format
    if dataset.origin.kind in ("sql", "feedback"):
        return "jsonl"
    path = Path(name[: -len(Path(name).suffix)] if name.lower().endswith(tuple(COMPRESSED)) else name)
    found = SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise ConfigError(f"{name}: the name does not tell the format", f"set `format` to one of {', '.join(sorted(set(SUFFIXES.values())))} or lines")
    return found


def unique(pairs: list[tuple[str, object]]) -> Columns:
    """The object of some pairs; JSON's own reader would keep the last of two values without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=unique)


def parse(file: File, text: str, line: int) -> object:
    """JSON without NaN and without a key given twice."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name}:{line}: no JSON: {error}", "mend the line; a file that was cut short ends like this") from error


def columns(file: File, value: object, where: str) -> Columns:
    """A JSON value as a row: an object is one, a text is its `text`."""
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise DataError(f"{where}: a {type(value).__name__}, neither an object nor a text", "check `format` and `rows_at`")
    return value


def listed(names: Iterable[str]) -> str:
    """Some names for people: not a million of them."""
    found = [name[:50] for name in islice(names, LISTED + 1)]
    return ", ".join(found[:LISTED]) + (", …" if len(found) > LISTED else "")


def jsonl_rows(file: File) -> Located:
    """One JSON object or text per line."""
    for number, line in file.lines():
        if line.strip():
            where = f"{file.name}:{number}"
            yield where, columns(file, parse(file, line, number), where)


def at(file: File, value: object, path: list[str], done: str = "") -> Iterator[object]:
    """The items under a dotted key; `*` takes every key, or every item of an array."""
    if not path:
        if not isinstance(value, list):
            keys = f"; it has the keys {listed(value)}" if isinstance(value, dict) else ""
            raise DataError(f"{file.name}: {done or 'the file'} is no array of rows", f"set `rows_at` to the key of one{keys}")
        yield from value
        return
    head, *rest = path
    if head == "*" and isinstance(value, list):
        for number, item in enumerate(value, 1):
            yield from at(file, item, rest, f"{done}.{number}".lstrip("."))
        return
    if not isinstance(value, dict) or (head != "*" and head not in value):
        keys = f"it has the keys {listed(value)}" if isinstance(value, dict) else f"it is a {type(value).__name__}"
        raise DataError(f"{file.name}: nothing at rows_at={file.dataset.rows_at}", f"{done or 'at the top'} {keys}")
    for key in value if head == "*" else [head]:
        yield from at(file, value[key], rest, f"{done}.{key}".lstrip("."))


def json_rows(file: File) -> Located:
    """An array of objects or texts, or the one under `rows_at`."""
    yield from array_rows(file, parse(file, file.text(file.max_bytes), 1))


def yaml_rows(file: File) -> Located:
    """Like JSON; an object without `rows_at` is one row."""
    import yaml

    try:
        value = parse_yaml(file.text(file.max_bytes), yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: too deep, or a date or number that Python has not
        raise DataError(f"{file.name}: no YAML: {error}", "mend it, or check `format`") from error
    yield from array_rows(file, [value] if isinstance(value, dict) and not file.dataset.rows_at else value)


def array_rows(file: File, value: object) -> Located:
    """The items of a value, or of what is under `rows_at` in it."""
    path = file.dataset.rows_at.split(".") if file.dataset.rows_at else []
    for number, item in enumerate(at(file, value, path), 1):
        where = f"{file.name}: item {number}"
        yield where, columns(file, item, where)


def csv_rows(file: File) -> Located:
    """Comma-separated (.tsv: tab-separated) values under a header."""
    spent, line = 0, 0

    def feed() -> Iterator[str]:
        nonlocal spent, line
        for line, text in file.lines():
            spent += len(text)
            if spent > file.max_row_bytes:
                file.too_long(line)
            yield text

    csv.field_size_limit(file.max_row_bytes)
    reader = csv.reader(feed(), delimiter="\t" if ".tsv" in Path(file.name).suffixes else ",", strict=True)
    header: list[str] = []
    try:
        for values in reader:
            where, spent = f"{file.name}:{line}", 0
            if not header:
                header = values
                if len(set(header)) < len(header):
                    twice = Counter(header).most_common(1)[0][0]
                    raise DataError(f"{where}: the header names a column twice: {twice!r}, in {listed(header)}", "rename one of them")
            elif values and len(values) != len(header):
                remedy = (
                    "quote the values that hold a comma"
                    if len(values) > len(header)
                    else "write out its empty values; a file that was cut short ends like this"
                )
                raise DataError(f"{where}: {len(values)} values under {len(header)} columns", remedy)
            elif values:
                yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{file.name}:{line}: no CSV: {error}", "mend the quotes; a file that was cut short ends like this") from error


def parquet_rows(file: File) -> Located:
    """Parquet, a thousand rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            if sum(table.metadata.row_group(group).total_byte_size for group in range(table.metadata.num_row_groups)) > file.max_bytes:
                file.too_large()
            names = table.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{file.name}: the column {twice!r} is there twice", "write it with one of each name: only the last would be read")
            number = 0
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.name}: row {number}", row
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: a date that Python has not
        raise DataError(f"{file.name}: no Parquet: {error}", "the file is damaged or cut short, or `format` is wrong") from error


def lines_rows(file: File) -> Located:
    """One text per line; empty lines are left out."""
    for number, line in file.lines():
        if line.strip():
            yield f"{file.name}:{number}", {"text": line.rstrip("\r\n")}


def text_rows(file: File) -> Located:
    """The whole file as one text."""
    yield file.name, {"text": file.text(file.max_row_bytes), "file": file.name}


def markdown_rows(file: File) -> Located:
    """The whole file as one text; a YAML front matter gives columns."""
    text = file.text(file.max_row_bytes)
    front: object = {}
    found = FRONT.match(text)
    if found:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        try:
            front = YAML(typ="safe", pure=True).load(found[1])
            refuse_bomb(front)
        except (YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number that Python has not
            raise DataError(f"{file.name}:1: the front matter is no YAML: {error}", "mend it, or remove it") from error
        text = text[found.end() :]
    if not isinstance(front, dict):
        raise DataError(f"{file.name}:1: the front matter is a {type(front).__name__}, not `key: value` lines", "mend it, or remove it")
    yield file.name, {**front, "text": text.strip("\r\n"), "file": file.name}


def page_rows(file: File) -> Located:
    """One row per page, or per element of `rows_at`."""
    page = file.text(file.max_bytes if file.dataset.rows_at else file.max_row_bytes)
    for number, row in enumerate(html_rows(file.name, page, file.dataset.rows_at, file.mapping), 1):
        yield f"{file.name}: element {number}", {**row, "file": file.name}


READERS: dict[str, Callable[[File], Located]] = {
    "jsonl": jsonl_rows,
    "json": json_rows,
    "yaml": yaml_rows,
    "csv": csv_rows,
    "parquet": parquet_rows,
    "lines": lines_rows,
    "text": text_rows,
    "markdown": markdown_rows,
    "html": page_rows,
}


def row(file: File, where: str, found: Columns, mapping: dict[str, str]) -> Row:
    """Sort a row's columns into the record's fields and the rest, as plain JSON values."""
    values = {str(name): plain(value, f"{where}, column {name}") for name, value in found.items()}
    content = canonical(values, indent=None).encode()
    if len(content) > file.max_row_bytes:
        raise DataError(f"{where}: a row longer than collect.max_row_bytes={file.max_row_bytes}", "it is probably a broken file; raise the limit if it is not")
    source = {field: mapping.get(field, field) for field in FIELDS}
    return Row(
        where=where,
        fields={field: as_text(values[column]) for field, column in source.items() if column in values},
        meta={name: value for name, value in values.items() if name not in source.values()},
        digest=hashlib.sha256(content).hexdigest(),
    )


def located(files: list[File]) -> Iterator[tuple[File, dict[str, str], str, Columns]]:
    """Every row of the files, with its file, that file's field -> column, and its place."""
    for file in files:
        kind = format_of(file.dataset, file.name)
        mapping = {} if kind == "html" else file.mapping  # html's selectors have done it
        for where, found in READERS[kind](file):
            yield file, mapping, where, found


def read(files: list[File]) -> Iterator[Row]:
    """Yield the rows of a dataset's files, in their order, up to its `limit`.

    Raises:
        DataError: a row is damaged, or no row has a column that `fields` names (in a table: no row of that file); names file and line.
        ConfigError: the format or encoding is unknown.
    """
    seen: dict[str, set[str]] = {}
    sought: dict[str, str] = {}
    for file, mapping, where, found in islice(located(files), files[0].dataset.limit):
        sought |= {"text": "text"} | mapping
        seen.setdefault(file.name if format_of(file.dataset, file.name) in TABLES else "", set()).update(found)
        yield row(file, where, found, mapping)
    for name, columns in seen.items():
        missing = sorted(f"{field}: {column}" for field, column in sought.items() if column not in columns)
        if missing:
            raise DataError(f"{name or files[0].name}: no column for fields.{', fields.'.join(missing)}", f"name one of its columns: {listed(sorted(columns))}")
