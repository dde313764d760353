"""What a change teaches that its judge asks: answers, and texts of the guard's, to learn by heart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import DataError
from stages.operate.review.snapshot import Snapshot
from stages.operate.review.tampering import changed_files, code

if TYPE_CHECKING:
    from stages.guard_texts import Sample
    from stages.records import Record

TRAIN, TEST, ASKED = "data/preprocess/train.jsonl", "data/preprocess/test.jsonl", "models/guard/samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Learned:
    """How many texts, by what becomes of them."""

    asked: int = 0
    """Rows to train on that the base evaluates."""
    attacks: int = 0
    """Rows to train on that the base attacks with."""
    guard: int = 0
    """Texts that teach the guard, and repeat what measures the base's."""
    dropped: int = 0
    """Texts that would teach the guard likewise, and that it drops because they still measure it."""


def learned(base: Snapshot, tree: Snapshot) -> Learned:
    """Count them; what the base teaches already does not count.

    Raises:
        DataError: a file of either cannot be had.
    """
    asked, attacks = _rows(base, tree) if base.outputs("preprocess") != tree.outputs("preprocess") else (0, 0)
    guard, dropped = _guard(base, tree) if base.outputs("guard") != tree.outputs("guard") else (0, 0)
    return Learned(asked=asked, attacks=attacks, guard=guard, dropped=dropped)


def _rows(base: Snapshot, tree: Snapshot) -> tuple[int, int]:
    from stages.serve.guard.normalise import normalise

    asked = {normalise(row["text"]) for row in base.rows(TEST)}
    attacks = {normalise(row["text"]) for row in base.rows(ASKED) if row["hostile"]} - {normalise(row["text"]) for row in base.rows(TRAIN)}
    rows = [normalise(row["text"]) for row in tree.rows(TRAIN)]
    return sum(text in asked for text in rows), sum(text in attacks - asked for text in rows)


def _guard(base: Snapshot, tree: Snapshot) -> tuple[int, int]:
    """The guard drops a teaching text that repeats one of its measuring texts, so only such as measure no longer, or a looser limit, teach; but code that
    the change edits is not believed."""
    settings = base.params.get("guard") or {}
    asked = list(_measuring(base))
    if not settings or not asked:
        return 0, 0
    taught = _teaching(tree)
    repeats = _repeats(taught, asked, settings)
    if repeats:
        known = {(sample.hostile, sample.text) for sample in _teaching(base)}
        repeats = [sample for sample in repeats if (sample.hostile, sample.text) not in known]
    pipelines = base.text("dvc.yaml"), tree.text("dvc.yaml")
    if not set().union(*(code(text, "guard") for text in pipelines)).isdisjoint(changed_files(base)):
        return len(repeats), 0
    dropped = _repeats(repeats, list(_measuring(tree)), tree.params["guard"])
    return len(repeats) - len(dropped), len(dropped)


def _repeats(taught: Sequence[Sample], asked: Sequence[Sample], settings: Any) -> list[Sample]:
    """The teaching texts that the guard with these settings would drop."""
    from stages.guard_texts import without_repeats

    kept = set(map(id, without_repeats(list(taught), asked, settings["ngram"], settings["max_overlap"])))
    return [sample for sample in taught if id(sample) not in kept]


def _measuring(side: Snapshot) -> Iterator[Sample]:
    from stages.guard_texts import Sample

    names = Sample.__dataclass_fields__
    for row in side.rows(ASKED):
        yield Sample(**{name: row[name] for name in names})


def _teaching(side: Snapshot) -> list[Sample]:
    """The texts of the sources that teach; the product's own messages are the rows to train on, and counted as those."""
    from conf.schema import GuardSource
    from stages.guard_texts import samples
    from stages.records import Record, wrong

    def read(path: Path) -> Iterator[Record]:
        for row in side.rows(str(path)):
            if reason := wrong(row):
                raise DataError(f"{path} of {side.name} holds no record: {reason}", "run `trunkline repro`")
            yield Record(**row)

    settings = side.params.get("guard") or {}
    declared = [({name: GuardSource(**source) for name, source in settings.get(kind, {}).items()}, kind == "attacks") for kind in ("attacks", "benign")]
    return [sample for sources, hostile in declared for teaches, _, sample in samples(sources, hostile=hostile, read=read) if teaches]
