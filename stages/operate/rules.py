"""What a configuration change does to the rules by which a model is judged: made looser, made stricter, or another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Effect = Literal["loosens", "tightens", "changes"]
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RuleChange:
    """One change of the gate or of what it measures."""

    effect: Effect
    what: str
    """A sentence, with the key and both values."""


def rule_changes(before: Values, after: Values) -> list[RuleChange]:
    """Every change between two configurations that bears on whether a model is promoted, the loosening ones first."""
    found = [*_absolute(before, after), *_relative(before, after), *_gate(before, after), *_tasks(before, after), *_attacks(before, after)]
    return sorted(found, key=lambda change: (("loosens", "changes", "tightens").index(change.effect), change.what))


def _pairs(key: str, before: Values, after: Values) -> Iterator[tuple[str, Values, Values]]:
    """Yield (name, before, after) of the mappings below a dotted key; empty where one side has none."""
    sides = []
    for value in (before, after):
        for part in key.split("."):
            value = value.get(part) or {}
        sides.append(value)
    for name in sorted({*sides[0], *sides[1]}):
        yield name, sides[0].get(name, {}), sides[1].get(name, {})


def _moved(key: str, old: Any, new: Any, larger: Effect) -> RuleChange:
    """A number that moved; `larger` is what a larger one does."""
    smaller: Effect = "tightens" if larger == "loosens" else "loosens"
    return RuleChange(effect=larger if new > old else smaller, what=f"{key}: {old:g} → {new:g}")


def _absolute(before: Values, after: Values) -> Iterator[RuleChange]:
    for name, old, new in _pairs("gate.absolute", before, after):
        key = f"gate.absolute.{name}"
        if not new:
            yield RuleChange(effect="loosens", what=f"{key} is dropped: {old['metric']} {old['direction'].replace('_', ' ')} {old['limit']:g}")
        elif not old:
            yield RuleChange(effect="tightens", what=f"{key} is new: {new['metric']} {new['direction'].replace('_', ' ')} {new['limit']:g}")
        else:
            for part in ("metric", "direction"):
                if old[part] != new[part]:
                    yield RuleChange(effect="loosens", what=f"{key}.{part}: {old[part]} → {new[part]}: the earlier rule is gone")
            if old["limit"] != new["limit"]:
                yield _moved(f"{key}.limit", old["limit"], new["limit"], "tightens" if new["direction"] == "at_least" else "loosens")


def _relative(before: Values, after: Values) -> Iterator[RuleChange]:
    for name, old, new in _pairs("gate.relative", before, after):
        key = f"gate.relative.{name}"
        if not new:
            yield RuleChange(effect="loosens", what=f"{key} is dropped: {old['task']} not worse than the champion by {old['margin']:g}")
        elif not old:
            yield RuleChange(effect="tightens", what=f"{key} is new: {new['task']} not worse than the champion by {new['margin']:g}")
        else:
            if old["task"] != new["task"]:
                yield RuleChange(effect="loosens", what=f"{key}.task: {old['task']} → {new['task']}: the earlier rule is gone")
            if old["margin"] != new["margin"]:
                yield _moved(f"{key}.margin", old["margin"], new["margin"], "loosens")


def _gate(before: Values, after: Values) -> Iterator[RuleChange]:
    old, new = before.get("gate", {}), after.get("gate", {})
    if old.get("alpha") != new.get("alpha") and None not in (old.get("alpha"), new.get("alpha")):
        yield _moved("gate.alpha", old["alpha"], new["alpha"], "loosens")
    if old.get("inconclusive") != new.get("inconclusive"):
        effect: Effect = "loosens" if new.get("inconclusive") == "promote" else "tightens"
        yield RuleChange(effect=effect, what=f"gate.inconclusive: {old.get('inconclusive')} → {new.get('inconclusive')}")
    if old.get("champion") != new.get("champion"):
        effect = "loosens" if new.get("champion") is None else "changes"
        yield RuleChange(effect=effect, what=f"gate.champion: {old.get('champion') or 'none'} → {new.get('champion') or 'none'}")


def _tasks(before: Values, after: Values) -> Iterator[RuleChange]:
    for name, old, new in _pairs("evaluate.tasks", before, after):
        key = f"evaluate.tasks.{name}"
        if not new or not old:
            yield RuleChange(effect="tightens" if new else "loosens", what=f"{key} is {'new' if new else 'dropped'}")
            continue
        if gone := sorted({*old["phrasings"]} - {*new["phrasings"]}):
            yield RuleChange(effect="loosens", what=f"{key}.phrasings: {', '.join(gone)} is no longer asked")
        limits = [float("inf") if side["limit"] is None else side["limit"] for side in (old, new)]
        if limits[0] != limits[1]:
            yield _moved(f"{key}.limit", limits[0], limits[1], "tightens")
        for part in ("metric", "system", "fewshot", "higher_is_better", "chat"):
            if old.get(part) != new.get(part):
                yield RuleChange(effect="changes", what=f"{key}.{part}: {old.get(part)!r} → {new.get(part)!r}")


def _attacks(before: Values, after: Values) -> Iterator[RuleChange]:
    old, new = before.get("redteam", {}), after.get("redteam", {})
    for part in ("attacks", "benign"):
        if gone := sorted({*old.get(part, [])} - {*new.get(part, [])}):
            yield RuleChange(effect="loosens", what=f"redteam.{part}: {', '.join(gone)} is no longer used")
    for part in ("per_source", "benign_limit"):
        if None not in (old.get(part), new.get(part)) and old[part] != new[part]:
            yield _moved(f"redteam.{part}", old[part], new[part], "tightens")
