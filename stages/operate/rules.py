"""What a configuration change does to the rules by which a model is judged: made looser, made stricter, or another."""

from __future__ import annotations

import math
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
    found = [*_limits(before, after), *_gate(before, after), *_tasks(before, after), *_guard(before, after), *_attacks(before, after)]
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
    told = [f"{value:g}" if value < math.inf else "all" for value in (old, new)]
    return RuleChange(effect=larger if new > old else smaller, what=f"{key}: {told[0]} → {told[1]}")


def _limits(before: Values, after: Values) -> Iterator[RuleChange]:
    """The rules of both kinds: each is about something, and has one number."""
    for kind, about, number in (("absolute", ("metric", "direction"), "limit"), ("relative", ("task",), "margin")):
        for name, old, new in _pairs(f"gate.{kind}", before, after):
            key = f"gate.{kind}.{name}"
            if not new:
                yield RuleChange(effect="loosens", what=f"{key} is dropped: {_said(old)}")
            elif not old:
                yield RuleChange(effect="tightens", what=f"{key} is new: {_said(new)}")
            else:
                for part in about:
                    if old[part] != new[part]:
                        yield RuleChange(effect="loosens", what=f"{key}.{part}: {old[part]} → {new[part]}: the earlier rule is gone")
                if old[number] != new[number]:
                    yield _moved(f"{key}.{number}", old[number], new[number], "tightens" if new.get("direction") == "at_least" else "loosens")
                if old.get("test") != new.get("test"):
                    yield RuleChange(effect="changes", what=f"{key}.test: {old.get('test')} → {new.get('test')}")


def _said(rule: Values) -> str:
    """A rule in words."""
    if "metric" in rule:
        return f"{rule['metric']} {rule['direction'].replace('_', ' ')} {rule['limit']:g}"
    return f"{rule['task']} not worse than the champion by {rule['margin']:g}"


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
        limits = [math.inf if side["limit"] is None else side["limit"] for side in (old, new)]
        if limits[0] != limits[1]:
            yield _moved(f"{key}.limit", limits[0], limits[1], "tightens")
        if (groups := (old.get("group_by"), new.get("group_by")))[0] != groups[1]:
            effect: Effect = "changes" if all(groups) else "tightens" if groups[1] else "loosens"
            yield RuleChange(effect=effect, what=f"{key}.group_by: {groups[0]} → {groups[1]}")
        for part in ("metric", "system", "fewshot", "higher_is_better", "chat"):
            if old.get(part) != new.get(part):
                yield RuleChange(effect="changes", what=f"{key}.{part}: {old.get(part)!r} → {new.get(part)!r}")


def _guard(before: Values, after: Values) -> Iterator[RuleChange]:
    """What the guard is measured on: a source that is dropped, taught, cut or no longer counted."""
    for kind in ("attacks", "benign"):
        for name, old, new in _pairs(f"guard.{kind}", before, after):
            key = f"guard.{kind}.{name}"
            measured, still = (side.get("use") in ("test", "split") for side in (old, new))
            if measured and not still:
                yield RuleChange(effect="loosens", what=f"{key} no longer measures")
            elif old and new and old["use"] == "test" != new["use"]:
                yield RuleChange(effect="loosens", what=f"{key}.use: test → {new['use']}: its texts teach the guard")
            elif still and not measured:
                yield RuleChange(effect="tightens", what=f"{key} is measured too")
            if not (measured and still):
                continue
            if old["counts"] != new["counts"]:
                yield RuleChange(effect="tightens" if new["counts"] else "loosens", what=f"{key}.counts: {old['counts']} → {new['counts']}")
            limits = [math.inf if side["limit"] is None else side["limit"] for side in (old, new)]
            if limits[0] != limits[1]:
                yield _moved(f"{key}.limit", limits[0], limits[1], "tightens")
            if old["labels"] != new["labels"]:
                yield RuleChange(effect="changes", what=f"{key}.labels: {old['labels']} → {new['labels']}")
    if (both := (before.get("guard", {}).get("customers"), after.get("guard", {}).get("customers")))[0] and both[1] is False:
        yield RuleChange(effect="loosens", what="guard.customers: true → false: the product's own messages no longer measure")


def _attacks(before: Values, after: Values) -> Iterator[RuleChange]:
    old, new = before.get("redteam", {}), after.get("redteam", {})
    for part in ("attacks", "benign"):
        if gone := sorted({*old.get(part, [])} - {*new.get(part, [])}):
            yield RuleChange(effect="loosens", what=f"redteam.{part}: {', '.join(gone)} is no longer used")
    for part in ("per_source", "benign_limit"):
        if None not in (old.get(part), new.get(part)) and old[part] != new[part]:
            yield _moved(f"redteam.{part}", old[part], new[part], "tightens")
