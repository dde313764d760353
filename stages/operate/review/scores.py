"""How champion and candidate score: differences with paired intervals, and the samples that changed most."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from conf.errors import DataError
from conf.schema import Relative
from stages.champion import Json, number, read_pairs, weigh
from stages.operate.review.judge import SAMPLES, SCORES, Judgement
from stages.operate.review.snapshot import Snapshot

if TYPE_CHECKING:
    from stages.statistics import Comparison

CONFIDENCE = 0.95
"""Of the intervals."""
SHOWN = 10
"""Samples."""
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ScoreChange:
    """One task: the candidate as the base judges it, beside the champion."""

    task: str
    metric: str
    higher_is_better: bool
    rows: int
    champion: float | None
    """Score of the model that production serves; null: it was not asked this."""
    champion_error: float | None
    """Standard error."""
    candidate: float | None
    candidate_error: float | None
    difference: float | None
    """Over the rows that both were asked; above 0, the candidate is better."""
    low: float | None
    high: float | None
    """Paired interval of the difference, at `CONFIDENCE`."""
    outcome: str
    """Of the gate's relative rule on it; empty: it has none."""
    reason: str
    """Why there is no difference, or what the rule says."""


@dataclass(frozen=True, kw_only=True)
class SampleChange:
    """One question that the two answer differently."""

    task: str
    prompt: str
    target: str
    champion: str
    candidate: str
    champion_score: float | None
    candidate_score: float | None


def score_changes(judged: Judgement, champion: Snapshot | None) -> list[ScoreChange]:
    """Every task that the base asks."""
    before = (champion.json(SCORES) or {}).get("tasks", {}) if champion else {}
    rules = {rule["task"]: rule for rule in judged.verdict.get("relative", [])}
    return [_score_change(task, entry, before.get(task), judged.samples[task], champion, rules.get(task, {})) for task, entry in sorted(judged.scores.items())]


def _score_change(task: str, entry: Row, before: Row | None, rows: Sequence[Row], champion: Snapshot | None, rule: Row) -> ScoreChange:
    difference = low = high = None
    reason = str(rule.get("reason", "")).removeprefix(f"{task}: ")
    if champion is None or before is None:
        reason = reason or ("there is no champion to compare with" if champion is None else "the champion was not asked this")
    else:
        try:
            found = compared(task, (dict(before), champion.rows(f"{SAMPLES}/{task}.jsonl")), (dict(entry), rows))
            difference, (low, high) = found.difference, found.interval((1 - CONFIDENCE) / 2)
        except DataError as error:
            reason = reason or error.what
    return ScoreChange(
        task=task,
        metric=str(entry.get("metric")),
        higher_is_better=entry.get("higher_is_better") is True,
        rows=int(entry.get("n") or 0),
        champion=number((before or {}).get("score")),
        champion_error=number((before or {}).get("stderr")),
        candidate=number(entry.get("score")),
        candidate_error=number(entry.get("stderr")),
        difference=difference,
        low=low,
        high=high,
        outcome=str(rule.get("outcome", "")),
        reason=reason,
    )


def compared(task: str, champion: tuple[Json, Sequence[Row]], candidate: tuple[Json, Sequence[Row]]) -> Comparison:
    """The same rows of both, by the gate's own means.

    Raises:
        DataError: they cannot be compared.
    """
    binary = all(row.get("score") in (0, 1) for _, rows in (champion, candidate) for row in rows)
    rule = Relative(task=task, margin=0.0, test="mcnemar" if binary else "bootstrap")
    return weigh(rule, (champion[0], read_pairs(champion[1], "champion")), (candidate[0], read_pairs(candidate[1], "candidate")))


def sample_changes(judged: Judgement, champion: Snapshot | None, most: int = SHOWN) -> list[SampleChange]:
    """The samples that changed most, each row in one phrasing: by the change of their score (lost and won in turns), then by that of their answer."""
    found: dict[tuple[str, str], tuple[str, Row, Row]] = {}
    for task, rows in sorted(judged.samples.items()) if champion else ():
        before = {_key(row): row for row in champion.rows(f"{SAMPLES}/{task}.jsonl")} if champion else {}
        for row in rows:
            old = before.get(_key(row))
            if old and (old["answer"] != row["answer"] or old.get("score") != row.get("score")):
                one = task, str(row.get("doc_hash"))
                found[one] = min(found.get(one, (task, old, row)), (task, old, row), key=_weight)
    ordered = sorted(found.values(), key=_weight)
    lost, won, rest = [o for o in ordered if _moved(o) < 0], [o for o in ordered if _moved(o) > 0], [o for o in ordered if not _moved(o)]
    turns = [item for both in zip_longest(lost, won) for item in both if item]
    return [_sample(*item) for item in [*turns, *rest][:most]]


def _moved(item: tuple[str, Row, Row]) -> float:
    return (number(item[2].get("score")) or 0.0) - (number(item[1].get("score")) or 0.0)


def _key(row: Row) -> tuple[Any, ...]:
    return row.get("doc_hash"), row.get("phrasing"), row.get("doc_id")


def _weight(item: tuple[str, Row, Row]) -> tuple[Any, ...]:
    _, old, new = item
    likeness = difflib.SequenceMatcher(None, old["answer"], new["answer"], autojunk=False).ratio()
    return -abs(_moved(item)), likeness, str(new.get("doc_hash")), str(new.get("phrasing"))


def _sample(task: str, old: Row, new: Row) -> SampleChange:
    return SampleChange(
        task=task,
        prompt=last_turn(str(new["prompt"])),
        target=str(new["target"]),
        champion=str(old["answer"]),
        candidate=str(new["answer"]),
        champion_score=number(old.get("score")),
        candidate_score=number(new.get("score")),
    )


def last_turn(prompt: str) -> str:
    """What the customer wrote: the last turn of a prompt in a chat template's marks; a plain prompt as it is."""
    turns = [part for part in re.split(r"<\|[^|<>]*\|>|</?s>", prompt) if part.strip()]
    asked = [part.strip() for part in turns if part.strip().lower() not in {"assistant", "user", "system"}]
    last = asked[-1] if asked else prompt.strip()
    return last.removeprefix("user\n").strip()
