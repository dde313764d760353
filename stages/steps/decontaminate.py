"""Training rows that repeat an evaluation row: n-grams of words as 64-bit hashes, one sorted array per evaluation set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from conf.schema import Decontaminate
from stages.steps.arrays import map_array, write_array
from stages.steps.deduplicate import HELD, read_listed, slices
from stages.steps.grams import WordHashes, sum_hashes, words
from stages.steps.order import SPLITS, Parts, Table
from stages.steps.rows import Dropped, Filter

GRAM = np.dtype("<u8")
ROWS_HELD = 5_000
"""Benchmark rows whose n-grams are held before they are written."""
SKETCH_BITS = range(16, 23)
"""Sizes of the table that says which n-grams cannot be in an index: 64 kB to 4 MB."""


class IndexBenchmarks(PipelineStep):
    """Writes the n-grams of the rows that come."""

    type = "DECONT"
    name = "index"

    def __init__(self, folder: Path, settings: Decontaminate | None) -> None:
        """Args: folder: takes `<source>/<n>`. settings: n-gram size; null writes nothing."""
        super().__init__()
        self.folder, self.settings = folder, settings

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents as they are."""
        texts: dict[str, list[list[bytes]]] = {}
        written = held = 0
        for document in data:
            if self.settings:
                texts.setdefault(document.metadata["source"], []).append(words(document.text))
                if (held := held + 1) >= ROWS_HELD:
                    written, held = self.write(texts, rank, written), 0
            yield document
        self.write(texts, rank, written)

    def write(self, texts: dict[str, list[list[bytes]]], rank: int, number: int) -> int:
        """Write and forget what was gathered; returns the next number."""
        for name, tokens in texts.items():
            assert self.settings
            write_array(self.folder / name / f"{rank:05d}-{number:06d}", np.unique(sum_hashes(tokens, self.settings.ngram, WordHashes())[0]))
        texts.clear()
        return number + 1


def part_grams(folder: Path, part: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of a part's rows one after the other, and how many each row has."""
    return map_array(folder / f"{part:05d}.grams", GRAM), map_array(folder / f"{part:05d}.counts", np.dtype("<i8"))


def join_index(folder: Path, grams: Path, table: Table, parts: Parts, repeats: Path) -> None:
    """Make one sorted array of each evaluation set: `<folder>/<set>.grams`; the rows of the split `test` that stay are one."""
    for part, (start, end) in enumerate(pairwise(parts.starts)):
        stays = table.column("splits", start, end) == SPLITS.index("test")
        stays[read_listed(repeats, start, end)["row"] - start] = False
        if stays.any():
            hashes, counts = part_grams(grams, part)
            write_array(folder / "test" / f"part-{part:05d}", np.unique(hashes[np.repeat(stays, counts)]))
    for pieces in sorted(path for path in folder.glob("*") if path.is_dir()):
        merge(sorted(pieces.iterdir()), folder / f"{pieces.name}.grams")


def merge(pieces: Sequence[Path], path: Path) -> None:
    """Make one sorted array of several, each value once; `HELD` of them are in memory at a time."""
    with path.open("wb") as file:
        for low, high in slices(sum(piece.stat().st_size for piece in pieces) // GRAM.itemsize):
            found = []
            for piece in pieces:
                known = map_array(piece, GRAM)  # anew: what was looked at would stay in memory
                found.append(np.array(known[np.searchsorted(known, low) : np.searchsorted(known, high, side="right")]))
            file.write(np.unique(np.concatenate(found)).tobytes())


class Index:
    """The n-grams of one evaluation set, and a table by their upper bits that tells most others apart from them at once."""

    def __init__(self, path: Path) -> None:
        """Args: path: of the sorted array."""
        self.name, self.known = path.stem, map_array(path, GRAM)
        bits = min(max(len(self.known).bit_length() + 5, SKETCH_BITS[0]), SKETCH_BITS[-1])
        self.shift = np.uint64(64 - bits)
        self.may_hold = np.zeros(1 << bits, dtype=bool)
        for at in range(0, len(self.known), HELD):  # read, and not looked at in the map, where all of it would stay in memory
            self.may_hold[np.fromfile(path, GRAM, count=HELD, offset=at * GRAM.itemsize) >> self.shift] = True

    def rows_with_any(self, grams: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Which rows have an n-gram of the set."""
        likely = np.flatnonzero(self.may_hold[grams >> self.shift])
        found = likely[self.holds(grams[likely])]
        seen = np.zeros(len(counts), dtype=bool)
        seen[np.searchsorted(np.cumsum(counts), found, side="right")] = True
        return seen

    def holds(self, grams: np.ndarray) -> np.ndarray:
        """Which n-grams are in the set."""
        if not len(self.known):
            return np.zeros(len(grams), dtype=bool)
        return np.asarray(self.known[np.minimum(np.searchsorted(self.known, grams), len(self.known) - 1)] == grams)

    def overlap(self, grams: np.ndarray) -> float:
        """Share of a row's n-grams, each counted once, that are in the set."""
        return float(np.mean(self.holds(np.unique(grams))))


class DropContaminated(Filter):
    """Drops training rows and documents of which too many n-grams occur in one evaluation set, with `contaminated:<set>`."""

    name = "decontaminate"

    def __init__(self, folder: Path, grams: Path, settings: Decontaminate | None, dropped: Dropped) -> None:
        """Args: folder: of the index. grams: of the parts' n-grams. settings: null lets everything pass. dropped: takes what is dropped."""
        super().__init__(dropped)
        self.folder, self.grams, self.settings = folder, grams, settings
        self.worst: dict[int, str] = {}

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield what stays of the part."""
        self.worst = dict(self.contaminated(rank)) if self.settings else {}
        yield from super().run(data, rank, world_size)

    def contaminated(self, part: int) -> Iterator[tuple[int, str]]:
        """The rows of a part, by their index in it, of which too much is in an evaluation set, and in which one most."""
        assert self.settings
        grams, counts = part_grams(self.grams, part)
        ends = np.cumsum(counts)
        indexes = [Index(path) for path in sorted(self.folder.glob("*.grams"))]
        looks = [index.rows_with_any(grams, counts) for index in indexes]
        for row in np.flatnonzero(np.any(looks, axis=0)) if looks else ():
            own = grams[ends[row] - counts[row] : ends[row]]
            shares = {index.name: index.overlap(own) for index, look in zip(indexes, looks, strict=True) if look[row]}
            worst = max(shares, key=lambda name: shares[name])
            if shares[worst] > self.settings.max_overlap:
                yield int(row), worst

    def reason(self, doc: Document) -> str | None:
        """Which evaluation set the row repeats most."""
        worst = self.worst.get(doc.metadata["index"])
        return f"contaminated:{worst}" if worst and doc.metadata["split"] in ("train", "corpus") else None
