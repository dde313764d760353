"""Repeats: the same text exactly, by digests, and nearly, by MinHash. The first row by (use, source, id) stays.

Rows and corpus documents are compared among themselves only. The signatures are those of datatrove's MinHash, number for number, for many texts
at a time, and what is compared is a 64-bit digest of each band: among a million rows two bands are taken for equal by mistake
once in two million runs. (Datatrove signs and merges row by row: 130 µs a row, words included, where this takes 35.)
In memory: `HELD` digests, the places of the rows, and the pairs of near duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from conf.schema import Decontaminate, MinHash
from stages.steps.arrays import map_array, write_array
from stages.steps.grams import WordHashes, odd_factors, sha1_hashes, sum_hashes, words
from stages.steps.order import Parts, Table
from stages.steps.rows import USES, Dropped, Filter

LISTED = np.dtype([("row", "<u8"), ("of", "<u8"), ("near", "?")])
"""A row that goes, and the row that stays instead."""
PRIME = np.uint64((1 << 61) - 1)
TEXTS = 1024
"""Texts whose signatures are computed at a time: their n-grams fit into a core's cache."""
HELD = 250_000
"""Digests that are sorted at a time."""


def write_listed(path: Path, rows: np.ndarray, of: np.ndarray, near: np.ndarray | bool) -> None:
    """List rows that go. Args: rows, of, near: shape (n,)."""
    listed = np.empty(len(rows), dtype=LISTED)
    listed["row"], listed["of"], listed["near"] = rows, of, near
    write_array(path, np.sort(listed, order="row"))


def read_listed(path: Path, start: int, end: int) -> np.ndarray:
    """What is listed of the rows from one place to another."""
    listed = map_array(path, LISTED)
    return np.array(listed[slice(*np.searchsorted(listed["row"], [start, end]))])


def equal_neighbours(rows: np.ndarray, keys: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Each row whose keys occur before, and the row before it that has them. Args: rows: ascending, shape (n,). keys: arrays of that shape."""
    by_key = np.lexsort(keys)
    same = np.logical_and.reduce([key[by_key][1:] == key[by_key][:-1] for key in keys])
    return rows[by_key[1:][same]], rows[by_key[:-1][same]]


def slices(total: int) -> Iterator[tuple[np.uint64, np.uint64]]:
    """Ranges of 64-bit keys, both ends included, so that each holds about `HELD` of so many."""
    count = total // HELD + 1
    edges = [(1 << 64) * at // count for at in range(count + 1)]
    return ((np.uint64(low), np.uint64(high - 1)) for low, high in pairwise(edges))


def list_exact(table: Table, parts: Parts, path: Path) -> None:
    """List the rows whose text occurs before. Rows of `use: test` all stay: what measures is not thinned out."""
    listed: list[np.ndarray] = []
    for low, high in slices(parts.starts[-1]):
        found = []
        for start, end in pairwise(parts.starts):
            digests = table.column("digests", start, end)
            inside = np.flatnonzero((digests[:, 0] >= low) & (digests[:, 0] <= high))
            found.append((inside + start, digests[inside]))
        rows, digests = np.concatenate([rows for rows, _ in found]), np.concatenate([digests for _, digests in found])
        listed.append(np.array(equal_neighbours(rows, [digests[:, 0], digests[:, 1]]), dtype=np.int64).reshape(2, -1))
    write_repeats(path, table, parts, np.concatenate(listed, axis=1), near=False)


def distinct(pairs: np.ndarray) -> np.ndarray:
    """Each pair once. Args: pairs: of places, shape (n, 2)."""
    ordered = pairs[np.lexsort(pairs.T)]
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return np.asarray(ordered[new])


def write_repeats(path: Path, table: Table, parts: Parts, pairs: np.ndarray, *, near: bool) -> None:
    """List the members of each cluster but the first, and but those of `use: test`. Args: pairs: of equal rows, shape (2, n)."""
    members, which = np.unique(pairs, return_inverse=True)
    cluster = connected(which.reshape(2, -1), len(members))
    _, first = np.unique(cluster, return_index=True)
    of = members[first][cluster]
    goes = (members != of) & (use_of(table, parts, members) != USES.index("test"))
    write_listed(path, members[goes], of[goes], near)


def connected(pairs: np.ndarray, count: int) -> np.ndarray:
    """Number of the cluster of each of `count` members. Args: pairs: shape (2, n)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(pairs.shape[1], dtype=bool)
    labels: np.ndarray = connected_components(coo_array((ones, (pairs[0], pairs[1])), shape=(count, count)), directed=False)[1]
    return labels


def use_of(table: Table, parts: Parts, rows: np.ndarray) -> np.ndarray:
    """The use of some rows. Args: rows: ascending."""
    found = [np.zeros(0, dtype=np.uint8)]
    for start, end in pairwise(parts.starts):
        found.append(table.column("uses", start, end)[rows[slice(*np.searchsorted(rows, [start, end]))] - start])
    return np.concatenate(found)


def factors(settings: MinHash, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors and addends, shape (hashes,), of the hash functions of datatrove's MinHash."""
    draw, count = np.random.RandomState(seed), settings.buckets * settings.hashes_per_bucket
    return draw.randint(1, PRIME, dtype=np.uint64, size=count), draw.randint(0, PRIME, dtype=np.uint64, size=count)


def signatures(hashes: np.ndarray, counts: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """MinHash signatures of texts, shape (hash functions, texts): the least `(hash * a + b) mod 2^64 mod (2^61 - 1)` of each text's n-grams.

    Args:
        hashes: of the n-grams of all texts, one after the other.
        counts: n-grams of each text, none of them 0.
        a: factors.
        b: addends.
    """
    starts = np.cumsum(counts) - counts
    value, upper = np.empty_like(hashes), np.empty_like(hashes)
    least = np.empty((len(a), len(counts)), dtype=np.uint64)
    for at, (factor, addend) in enumerate(zip(a, b, strict=True)):
        np.multiply(hashes, factor, out=value)
        np.add(value, addend, out=value)
        np.right_shift(value, np.uint64(61), out=upper)
        np.bitwise_and(value, PRIME, out=value)
        np.add(value, upper, out=value)
        np.subtract(value, PRIME, out=upper)  # below the prime it wraps to more than any remainder
        np.minimum(value, upper, out=value)
        np.minimum.reduceat(value, starts, out=least[at])
    return least


def bands(signature: np.ndarray, buckets: int) -> np.ndarray:
    """64-bit digests of the bands, shape (buckets, texts). Args: signature: shape (hash functions, texts)."""
    each = signature.reshape(buckets, -1, signature.shape[1])
    return np.asarray(np.sum(each * odd_factors(each.shape[1])[:, np.newaxis], axis=1))


class Sketch(PipelineStep):
    """Writes what later passes compare texts by: digests of their MinHash bands, and their n-grams.

    Documents get other hash functions than rows, so that the two never meet in a band.
    """

    type = "DEDUP"
    name = "sketch"

    def __init__(self, folder: Path, parts: Parts, exact: Path, minhash: MinHash | None, decontaminate: Decontaminate | None) -> None:
        """Args: folder: takes `<part>.bands`, `.rows`, `.grams` and `.counts`. parts: where they start. exact: lists rows that go
        already. minhash, decontaminate: settings; null writes nothing."""
        super().__init__()
        self.folder, self.parts, self.exact, self.minhash, self.decontaminate = folder, parts, exact, minhash, decontaminate

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write the sketches of one part; no document goes on."""
        start, end = self.parts.starts[rank : rank + 2]
        goes = np.zeros(end - start, dtype=bool)
        goes[read_listed(self.exact, start, end)["row"] - start] = True
        known, columns = WordHashes(), dict[str, list[np.ndarray]]()
        a, b = factors(self.minhash, 1 + (rank >= self.parts.first_corpus)) if self.minhash else (goes, goes)
        texts = (words(document.text) for document in data)
        for at in range(0, end - start, TEXTS):
            batch = list(islice(texts, TEXTS))
            if self.decontaminate:
                for name, values in zip(("grams", "counts"), sum_hashes(batch, self.decontaminate.ngram, known), strict=True):
                    columns.setdefault(name, []).append(values)
            stays = [index for index, tokens in enumerate(batch) if tokens and not goes[at + index]]
            if self.minhash and stays:
                hashes, counts = sha1_hashes([batch[index] for index in stays], self.minhash.ngram)
                columns.setdefault("rows", []).append(np.array(stays) + (start + at))
                columns.setdefault("bands", []).append(bands(signatures(hashes, counts, a, b), self.minhash.buckets))
        for name, arrays in columns.items():
            write_array(self.folder / f"{rank:05d}.{name}", np.concatenate(arrays, axis=-1))
        yield from ()


def list_near(folder: Path, table: Table, parts: Parts, minhash: MinHash, path: Path) -> None:
    """List the rows that share a band with an earlier one, or with one that does. Args: folder: of the sketches."""
    pieces = [(np.fromfile(file, dtype=np.int64), file.with_suffix(".bands")) for file in sorted(folder.glob("*.rows"))]
    pairs = np.empty((0, 2), dtype=np.int64)
    for bucket in range(minhash.buckets):
        fresh = [pairs]
        for low, high in slices(sum(len(rows) for rows, _ in pieces)):
            found = []
            for rows, file in pieces:
                keys = np.fromfile(file, dtype="<u8", count=len(rows), offset=8 * bucket * len(rows))
                inside = (keys >= low) & (keys <= high)
                found.append((rows[inside], keys[inside]))
            if found:
                fresh.append(np.stack(equal_neighbours(np.concatenate([rows for rows, _ in found]), [np.concatenate([keys for _, keys in found])]), axis=1))
        pairs = distinct(np.concatenate(fresh))  # near duplicates share most of their bands
    write_repeats(path, table, parts, pairs.T, near=True)


def join_lists(lists: Sequence[Path], path: Path) -> None:
    """Make one list of several."""
    listed = np.concatenate([map_array(each, LISTED) for each in lists])
    write_listed(path, listed["row"], listed["of"], listed["near"])


class DropRepeats(Filter):
    """Drops the listed rows with `duplicate:exact` or `duplicate:near`, and which one stays."""

    name = "repeats"

    def __init__(self, listed: Path, parts: Parts, table: Table, dropped: Dropped) -> None:
        """Args: listed: the list. parts: where they start. table: knows the rows' names. dropped: takes what is dropped."""
        super().__init__(dropped)
        self.listed, self.parts, self.table = listed, parts, table
        self.goes: dict[int, tuple[int, bool]] = {}

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield what is not listed."""
        start, end = self.parts.starts[rank : rank + 2]
        self.goes = {row - start: (of, near) for row, of, near in read_listed(self.listed, start, end).tolist()}
        yield from super().run(data, rank, world_size)

    def reason(self, doc: Document) -> str | None:
        """Which kind of repeat it is."""
        if (found := self.goes.get(doc.metadata["index"])) is None:
            return None
        doc.metadata["of"] = self.table.name(found[0])
        return "duplicate:near" if found[1] else "duplicate:exact"
