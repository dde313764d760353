"""The tables that expectations look at: preprocess's rows as frames, with columns for what can be computed of them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import DataError
from conf.schema import Expectation, Pii
from stages.files import canonical, read_jsonl
from stages.records import Record

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "validation", "test")
TEXTS = tuple(field.name for field in fields(Record) if field.name not in ("messages", "meta"))
"""Fields of a record that hold text; an empty one counts as null."""
TOKEN = re.compile(r"\w+|[^\w\s]")

Row = dict[str, object]


def tokens(text: str) -> int:
    """Words and punctuation marks."""
    return len(TOKEN.findall(text))


def normal(text: str) -> bytes:
    """Digest of a text without regard to case, blanks and punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    said = " ".join(word for word in TOKEN.findall(folded) if not unicodedata.category(word[0]).startswith("P"))  # £ and 👍 are no punctuation
    return hashlib.blake2b((said or folded.strip()).encode(), digest_size=16).digest()


def turns(row: Row, where: str) -> list[dict[str, str]]:
    """The row's messages.

    Raises:
        DataError: they are no list of {role, content}.
    """
    messages = row.get("messages") or []
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise DataError(f"{where}: messages is no list of {{role, content}}", "run `dvc repro preprocess`; the file was changed by hand")
    return messages


def columns(row: Row, where: str, wanted: set[str], find: Callable[[str], set[str]]) -> Row:
    """One row of the frame: the record's fields, and what is computed of the row alone.

    Raises:
        DataError: a field is of the wrong type; names file and line.
    """
    out: Row = dict(row)
    for name in TEXTS:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {name} is {value!r}, not text", "run `dvc repro preprocess`; the file was changed by hand")
        if name in row:
            out[name] = value if value and value.strip() else None
    messages = turns(row, where)
    said = [m["content"] for m in messages] or [str(out.get("text") or "")]
    if "messages" in row:
        out["messages"] = ",".join(m["role"] for m in messages) or None
    meta = row.get("meta")
    if "meta" in row:
        out["meta"] = canonical(meta, indent=None).strip()
    for name in wanted:
        if name.startswith("meta."):
            out[name] = meta.get(name.removeprefix("meta.")) if isinstance(meta, dict) else None
    out["tokens"] = sum(map(tokens, said))
    out["completion_tokens"] = tokens(str(out.get("completion") or ""))
    if "pii" in wanted:
        own = {str(out.get("text") or ""), str(out.get("completion") or "")} | {m["content"] for m in messages if m["role"] != "system"}
        out["pii"] = ",".join(sorted(set().union(*map(find, own)))) or None
    return out


def mentioned(expectations: Iterable[Expectation]) -> set[str]:
    """Every text in the arguments: the columns that somebody asks for are among them."""
    return set(re.findall(r'"((?:meta\.)?\w+)"', canonical([e.kwargs for e in expectations])))


def build_tables(folder: Path, expectations: Sequence[Expectation], pii: Pii) -> dict[str, pd.DataFrame]:
    """The frames that expectations look at: each split, all `rows` together, and the `corpus` if it is asked for."""
    import pandas as pd

    from stages.pii import find

    wanted = mentioned(expectations)
    asked = {e.table for e in expectations}
    frames = {}
    for name in [*SPLITS, *(["corpus"] if "corpus" in asked else [])]:
        path = folder / f"{name}.jsonl"
        rows = [
            columns(row, f"{path}:{number}", wanted, lambda text: {span.kind for span in find(text, pii.kinds, pii.phone_regions)})
            for number, row in enumerate(read_jsonl(path), 1)
        ]
        frames[name] = pd.DataFrame(rows)
    across(frames)
    frames["rows"] = pd.concat([frames[name] for name in SPLITS], ignore_index=True)
    return frames


def across(frames: Mapping[str, pd.DataFrame]) -> None:
    """Add what takes more than one row: `split`, `overlap` and `label_share`."""
    keys = {name: [normal(text) if isinstance(text, str) else None for text in frame["text"]] if "text" in frame else [] for name, frame in frames.items()}
    counts = {name: Counter(key for key in of if key) for name, of in keys.items()}
    for name, frame in frames.items():
        others = [counts[other] for other in SPLITS if other != name and not (name == "corpus" and other == "train")]
        frame["split"] = name
        if "text" in frame:
            frame["overlap"] = [sum(count[key] for count in others) if key else 0 for key in keys[name]]
        if "label" in frame:
            frame["label_share"] = frame["label"].map(frame["label"].value_counts(normalize=True))
