"""What the guard learns from and what it is measured on: by source, without a text of the one in the other."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from conf.errors import DataError
from conf.schema import Classification, Guard, GuardSource, ServeGuard
from stages.records import Record, read_records
from stages.serve.guard.guard import Guard as Watch
from stages.serve.guard.normalise import normalise
from stages.sources.policy import breaches, refuse
from stages.steps.grams import WordHashes, sum_hashes, words

COLLECTED = Path("data/collect")
ROWS = Path("data/preprocess")
CUSTOMERS = "customers"
"""Source of the product's own messages."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text."""

    source: str
    family: str
    """Of an attack; `benign` for the rest."""
    text: str
    hostile: bool
    unseen: bool
    """Whether no text of its source teaches."""
    counts: bool
    """Whether it counts in what the gate reads."""


def digest(text: str) -> str:
    """What texts are ordered by: the same in every run, whatever the order of the source."""
    return hashlib.sha256(text.encode()).hexdigest()


def teaches(key: str) -> bool:
    """Whether a row of a split source is of the teaching half, by its group or its normalised text."""
    return hashlib.sha256(key.encode()).digest()[0] % 2 == 0


def chosen(name: str, source: GuardSource, read: Callable[[Path], Iterable[Record]] = read_records) -> list[Record]:
    """The rows of a dataset that the guard uses, ordered by the hash of their text; equal texts are taken once.

    Raises:
        DataError: there is none.
    """
    path = COLLECTED / f"{name}.jsonl"
    rows = {normalise(row.text): row for row in read(path) if source.labels is None or row.label in source.labels}
    rows.pop("", None)
    if not rows:
        of = f" with the label {' or '.join(source.labels)}" if source.labels else ""
        raise DataError(f"{path} has no text{of} (guard.attacks, guard.benign)", "a guard without attacks passes everything: mend or remove the dataset")
    return sorted(rows.values(), key=lambda row: digest(row.text))[: source.limit]


def samples(
    sources: Mapping[str, GuardSource], *, hostile: bool, read: Callable[[Path], Iterable[Record]] = read_records
) -> Iterator[tuple[bool, Record, Sample]]:
    """Yield (teaches, row, sample) of every row of every source. Args: read: a file's records, here or in another state of the repository."""
    for name, source in sorted(sources.items()):
        for row in chosen(name, source, read):
            teach = source.use == "train" or (source.use == "split" and teaches(row.group or normalise(row.text)))
            family = (source.family or row.label or name) if hostile else "benign"
            yield teach, row, Sample(source=name, family=family, text=row.text, hostile=hostile, unseen=source.use == "test", counts=source.counts)


def customers(guard: ServeGuard) -> Iterator[tuple[bool, Sample]]:
    """Yield (teaches, sample) of the product's own messages that no rule refuses; each text once."""
    rules = Watch(None, guard)
    seen: set[str] = set()
    for split in ("train", "test"):
        for text in sorted({row.text for row in read_records(ROWS / f"{split}.jsonl")}, key=digest):
            if (normal := normalise(text)) and normal not in seen and rules.check(text).allowed:
                seen.add(normal)
                yield split == "train", Sample(source=CUSTOMERS, family="benign", text=text, hostile=False, unseen=False, counts=True)


def without_repeats(learnt: list[Sample], measured: Iterable[Sample], size: int, most: float) -> list[Sample]:
    """Teaching texts of which at most a share of the n-grams of words stands in the measuring texts of the same kind."""
    known = WordHashes()
    kept = []
    for hostile in (True, False):
        test = np.unique(sum_hashes([words(sample.text) for sample in measured if sample.hostile == hostile], size, known)[0])
        mine = [sample for sample in learnt if sample.hostile == hostile]
        hashes, counts = sum_hashes([words(sample.text) for sample in mine], size, known)
        repeated = np.isin(hashes, test)
        ends = np.cumsum(counts)
        kept += [s for s, count, end in zip(mine, counts, ends, strict=True) if count == 0 or repeated[end - count : end].mean() <= most]
    return kept


def level(row: Record) -> Classification:
    """Who may see a row."""
    return cast("Classification", row.classification)


def gather(settings: Guard, guard: ServeGuard) -> tuple[list[Sample], list[Sample], int]:
    """The texts that teach, those that measure, and how many were dropped from the former as repeats of the latter.

    Raises:
        DataError: a source is empty, or there is nothing to learn or to measure.
        PolicyBreach: the access policy does not allow training on what teaches.
    """
    learnt: list[Sample] = []
    measured: list[Sample] = []
    used: dict[str, Record] = {}
    for sources, hostile in ((settings.attacks, True), (settings.benign, False)):
        for teach, row, sample in samples(sources, hostile=hostile):
            (learnt if teach else measured).append(sample)
            if teach:
                used[row.source] = row
    refuse([found for name, row in sorted(used.items()) for found in breaches(name, row.licence, level(row), "training", settings.policy)])
    for teach, sample in customers(guard) if settings.customers else ():
        (learnt if teach else measured).append(sample)
    kept = without_repeats(learnt, measured, settings.ngram, settings.max_overlap)
    for part, texts in (("learn", kept), ("be measured on", measured)):
        for what, hostile in (("attack", True), ("harmless text", False)):
            if not any(sample.hostile == hostile for sample in texts):
                raise DataError(f"the guard has no {what} to {part}", "name sources in guard.attacks and guard.benign, with `use` train, test or split")
    log.info("%d texts teach (%d more repeat a measuring text), %d measure", len(kept), len(learnt) - len(kept), len(measured))
    return kept, measured, len(learnt) - len(kept)
