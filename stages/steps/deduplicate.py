"""Repeats: the same text exactly, by a merge of digests, and nearly, by datatrove's MinHash. The first row by (use, source, id) stays.

A part is a slice of all rows in that order, so the first of a cluster is the smallest, whatever the number of parts. Rows
and corpus documents are compared among themselves only. In memory: one run, and the members of clusters of near duplicates.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TextIO

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from conf.schema import MinHash
from stages.files import canonical, read_jsonl
from stages.steps.decontaminate import HASHING, hashes
from stages.steps.rows import Dropped, Row, Runs, merged, name, to_document


@dataclass(frozen=True)
class Parts:
    """Where the ordered rows are cut."""

    total: int
    """Number of parts."""
    first_corpus: int
    """The first part that holds corpus documents; those before it hold none."""


def order(rows: Iterable[Row], folder: Path, digests: Path, *, part_bytes: int, dropped: Dropped, keep_groups: bool) -> Parts:
    """Cut the ordered rows into parts, and write the digest of each text.

    A second row with the same source and id is dropped (`duplicate:id`), and with `keep_groups` a training row whose group is
    in a source of `use: test` too (`group:test`). The digests of those groups are held in memory.

    Args:
        rows: ordered by (use, source, id).
        folder: takes the parts.
        digests: takes runs of digests.
        part_bytes: size of a part.
        dropped: takes what is dropped.
        keep_groups: whether a group may lie on one side only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = Runs(digests, "digests", by=digest_key)
    part, index, size, last = -1, 0, 0, ""
    first_corpus: int | None = None
    tested: set[bytes] = set()
    with ExitStack() as stack:
        file: TextIO | None = None
        for row in rows:
            row_name, group = name(row), hashlib.sha256(row["group"].encode()).digest()[:8]
            if row_name == last:
                dropped.add(row, "duplicate:id", last)
                continue
            last = row_name
            if keep_groups and row["use"] == "train" and group in tested:
                dropped.add(row, "group:test")
                continue
            if row["use"] == "test" and row["group"]:
                tested.add(group)
            starts_corpus = first_corpus is None and row["use"] == "corpus"
            if file is None or size >= part_bytes or starts_corpus:
                part, index, size = part + 1, 0, 0
                stack.close()
                file = stack.enter_context((folder / f"{part:05d}.jsonl").open("w", encoding="utf-8", newline="\n"))
                first_corpus = part if starts_corpus else first_corpus
            line = canonical(row, indent=None)
            file.write(line)
            texts.add({"digest": digest(row), "part": part, "index": index, "name": row_name, "use": row["use"]})
            index, size = index + 1, size + len(line)
    texts.close()
    return Parts(total=part + 1, first_corpus=part + 1 if first_corpus is None else first_corpus)


def digest(row: Row) -> str:
    """128 bits of the case-folded text; documents have others than rows."""
    return hashlib.sha256(f"{row['use'] == 'corpus'}\n{row['text'].casefold()}".encode()).hexdigest()[:32]


def digest_key(row: Row) -> tuple[str, int, int]:
    """Order of digests: equal ones together, the first row first."""
    return row["digest"], row["part"], row["index"]


def place(row: Row) -> tuple[int, int]:
    """Order of what is to be dropped."""
    return row["part"], row["index"]


def list_exact(digests: Path, work: Path, folder: Path) -> None:
    """List the rows whose text occurs before, per part, for `DropListed`. Rows of `use: test` all stay: what measures is not thinned out."""
    listed = Runs(work, "exact", by=place)
    first: Row = {"digest": ""}
    for row in merged(digests, by=digest_key):
        if row["digest"] != first["digest"]:
            first = row
        elif row["use"] != "test":
            listed.add({"part": row["part"], "index": row["index"], "of": first["name"]})
    listed.close()
    write_lists(merged(work, by=place), folder)


def write_lists(rows: Iterable[Row], folder: Path) -> None:
    """Write `<part>.jsonl` with the index and the kept duplicate of each row to drop."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, listed in groupby(rows, key=lambda row: row["part"]):
        with (folder / f"{part:05d}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(canonical({"index": row["index"], "of": row["of"]}, indent=None) for row in listed)


class DropListed(BaseFilter):
    """Drops the rows of its part that a list names, by their place among the rows that reach it."""

    name = "duplicates"

    def __init__(self, folder: Path, reason: str, dropped: Dropped | None = None) -> None:
        """Args: folder: of the lists; without a list nothing is dropped. reason: `duplicate:…`. dropped: takes them."""
        super().__init__(dropped)
        self.folder, self.reason = folder, reason
        self.listed: Iterator[Row] = iter(())
        self.next: Row | None = None
        self.index = 0

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield what is not listed."""
        path = self.folder / f"{rank:05d}.jsonl"
        self.listed = read_jsonl(path) if path.exists() else iter(())
        self.next, self.index = next(self.listed, None), 0
        yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the row stays."""
        at, self.index = self.index, self.index + 1
        if self.next is None or self.next["index"] != at:
            return True
        doc.metadata["of"] = self.next["of"]
        self.next = next(self.listed, None)
        return False, self.reason


def minhash_config(settings: MinHash) -> MinhashConfig:
    """The settings as datatrove wants them."""
    return MinhashConfig(settings.ngram, settings.buckets, settings.hashes_per_bucket, hash_config=HASHING)


class Signature(MinhashDedupSignature):
    """MinHash signatures of our own words, for datatrove's tokenizers want spaCy; a text shorter than a shingle is one shingle.

    Documents get other hash functions than rows, so that the two never meet in a bucket.
    """

    def __init__(self, folder: str, settings: MinHash, first_corpus: int) -> None:
        """Args: folder: takes the signatures. settings: shingles and bands. first_corpus: first part of documents."""
        super().__init__(folder, config=minhash_config(settings), language=WhitespaceTokenizer())
        self.first_corpus = first_corpus

    def get_shingles(self, text: str) -> np.ndarray:
        """Hashed shingles, shape (n, 1)."""
        return hashes(text, self.config.n_grams).reshape((-1, 1))

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Write the signatures of one part."""
        self.config: MinhashConfig = replace(self.config, seed=1 + (rank >= self.first_corpus))
        self._parameters = None
        super().run(data, rank, world_size)


def list_near(parts: Path, exact: Path, clusters: Path, folder: Path) -> None:
    """List the rows that are near duplicates of an earlier one, per part, for `DropListed`.

    Datatrove keeps whichever member of a cluster gathered the others; here it is the first by (use, source, id). Rows of
    `use: test` all stay.
    """
    first: dict[int, str] = {}

    def listed() -> Iterator[Row]:
        for path in sorted(clusters.glob("*.clusters")):
            part = int(path.stem)
            members = dict(struct.iter_unpack("<II", path.read_bytes()))
            survivors = DropListed(exact, "").run((to_document(row, row["use"]) for row in read_jsonl(parts / f"{part:05d}.jsonl")), part)
            for index, document in enumerate(survivors):
                if (cluster := members.get(index)) is None:
                    continue
                row_name = f"{document.metadata['source']}/{document.id}"
                kept = first.setdefault(cluster, row_name)
                if kept != row_name and document.metadata["use"] != "test":
                    yield {"part": part, "index": index, "of": kept}

    write_lists(listed(), folder)
