"""What differs between two states, beside the scores: the stages, the data, the model card."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stages.operate.differences import Difference, differences
from stages.operate.review.snapshot import Snapshot

CARD, TRAIN = "models/package/src/MODEL_CARD.md", "data/preprocess/train.jsonl"


@dataclass(frozen=True, kw_only=True)
class StageChange:
    """What became of a stage, from the two dvc.lock."""

    stage: str
    effect: Literal["new output", "same output", "unchanged", "new", "gone"]
    """`same output`: it was made anew, or restored, and came out the same."""
    params: list[Difference]
    reasons: list[str]
    """What else it reads and differs, one path each."""
    size: int
    """Bytes of its outputs."""
    size_before: int


def stage_changes(base: Snapshot, tree: Snapshot) -> list[StageChange]:
    """Every stage of the two locks, in the order of the tree's."""
    order = [*tree.lock, *(stage for stage in base.lock if stage not in tree.lock)]
    return [_stage_change(stage, base, tree) for stage in order]


def _stage_change(stage: str, base: Snapshot, tree: Snapshot) -> StageChange:
    old, new = base.lock.get(stage), tree.lock.get(stage)
    sizes = [sum(int(out.get("size", 0)) for out in (entry or {}).get("outs", [])) for entry in (old, new)]
    params: list[Difference] = []
    reasons: list[str] = []
    if old is None or new is None:
        effect: Any = "new" if old is None else "gone"
    elif old == new:
        effect = "unchanged"
    else:
        effect = "same output" if base.outputs(stage) == tree.outputs(stage) else "new output"
        for file in sorted({*old.get("params", {}), *new.get("params", {})}):
            # values as texts: null is an empty one, as in the lock itself
            before, after = (_nested(entry.get("params", {}).get(file, {})) for entry in (old, new))
            params += differences(before, after)
        read = base.inputs(stage), tree.inputs(stage)
        reasons = [path for path in sorted({*read[0], *read[1]}) if read[0].get(path) != read[1].get(path)]
        reasons += ["its command"] if old.get("cmd") != new.get("cmd") else []
    return StageChange(stage=stage, effect=effect, params=params, reasons=reasons, size=sizes[1], size_before=sizes[0])


def _nested(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True, kw_only=True)
class SourceChange:
    """One source of collect."""

    source: str
    use: str
    rows_before: int | None
    """null: it is new."""
    rows: int | None
    """null: it is gone."""
    changed: bool
    """Whether its content has another digest."""
    licence: str


@dataclass(frozen=True, kw_only=True)
class DataChange:
    """Rows by source, dropped by reason, and by label."""

    sources: list[SourceChange]
    splits: dict[str, tuple[int, int]]
    """train, validation, test, … -> rows before and after."""
    dropped: dict[str, tuple[int, int]]
    """Reason -> rows before and after."""
    labels: dict[str, tuple[int, int]]
    """Label of a training row -> rows before and after."""
    shift: float
    """Total variation distance of the labels' shares: 0 the same, 1 nothing in common."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        pairs = [*self.splits.values(), *self.dropped.values(), *self.labels.values()]
        return not any(s.changed or s.rows != s.rows_before for s in self.sources) and all(old == new for old, new in pairs)


def data_change(base: Snapshot, tree: Snapshot) -> DataChange:
    """Compare what collect and preprocess wrote.

    Raises:
        DataError: a file of either cannot be had.
    """
    manifests = [side.json("data/collect/manifest.json") or {} for side in (base, tree)]
    summaries = [side.json("data/preprocess/summary.json") or {} for side in (base, tree)]
    labels = [Counter(row.get("label") or "(none)" for row in side.rows(TRAIN)) for side in (base, tree)]
    return DataChange(
        sources=[_source(name, *(m.get(name) for m in manifests)) for name in sorted({*manifests[0], *manifests[1]})],
        splits=_pairs(*(s.get("rows", {}) for s in summaries)),
        dropped=_pairs(*(s.get("reasons", {}) for s in summaries)),
        labels=_pairs(*labels),
        shift=shift(*labels),
    )


def _source(name: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> SourceChange:
    either = new or old or {}
    return SourceChange(
        source=name,
        use=either.get("use", ""),
        rows_before=old["rows"] if old else None,
        rows=new["rows"] if new else None,
        changed=bool(old and new and old.get("sha256") != new.get("sha256")),
        licence=either.get("licence", ""),
    )


def _pairs(old: Mapping[str, int], new: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (old.get(name, 0), new.get(name, 0)) for name in sorted({*old, *new})}


def shift(old: Mapping[str, int], new: Mapping[str, int]) -> float:
    """Total variation distance of two sets of counts, as shares; 1 where only one of them has any."""
    totals = [sum(side.values()) for side in (old, new)]
    if not all(totals):
        return float(totals[0] != totals[1])
    return sum(abs(old.get(name, 0) / totals[0] - new.get(name, 0) / totals[1]) for name in {*old, *new}) / 2


def card_change(production: Snapshot, tree: Snapshot) -> list[str]:
    """Unified diff of the model cards, without its two headers; empty: the same, or there is none."""
    before, after = ((side.text(CARD) or "").splitlines() for side in (production, tree))
    return list(difflib.unified_diff(before, after, lineterm="", n=2))[2:]
