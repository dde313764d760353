"""Merge two dvc.locks stage by stage: what can be kept of both sides, and what is to be made anew.

An entry of dvc.lock is one fact: from these inputs came these outputs. So it is taken whole, from one side, or not at all; a merge
by lines would make an entry of two halves, which nobody ran and DVC believes. It is not kept where both sides changed it, nor where what
it read is no longer what the merged lock says is made: that, and all that depends on it, is for `dvc repro` to run or restore.

Such a stage is left out: to DVC it never ran. The next run writes its entry at the end of the file; the order of entries means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stages.intact import overlaps

Side = Literal["ours", "theirs"]
Entries = Mapping[str, Mapping[str, Any]]
"""The `stages` of a dvc.lock."""


@dataclass(kw_only=True)
class Merged:
    """What becomes of each stage, in the order of the file."""

    sides: dict[str, Side] = field(default_factory=dict)
    """Stage -> whose entry it has (of the same ones, ours)."""
    again: dict[str, str] = field(default_factory=dict)
    """Stage -> why it is left out, and is to run or be restored."""

    @property
    def kept(self) -> dict[str, Side]:
        """Stage -> whose entry stays."""
        return {name: side for name, side in self.sides.items() if name not in self.again}


def merge(base: Entries, ours: Entries, theirs: Entries) -> Merged:
    """Decide stage by stage; one that one side removed is gone, also where the other changed it."""
    merged, both = Merged(), {"ours": ours, "theirs": theirs}
    for name in order(ours, theirs):
        old, one, other = base.get(name), ours.get(name), theirs.get(name)
        if old is not None and (one is None or other is None):
            continue
        merged.sides[name] = "ours" if one is not None and (one == other or other in (None, old)) else "theirs"
        if None not in (one, other) and one != other and old not in (one, other):
            merged.again[name] = "both sides changed it"
    for name, why in _outdated(base, both, merged):
        merged.again.setdefault(name, why)
    while found := {name: why for name in merged.kept if (why := _unfounded(name, both, merged))}:
        merged.again |= found
    return merged


def order(ours: Entries, theirs: Entries) -> list[str]:
    """The stages of both: in the order of ours, and one that only theirs has after the one that it follows there."""
    names, last = list(ours), ""
    for name in theirs:
        if name not in ours:
            names.insert(names.index(last) + 1 if last else 0, name)
        last = name
    return names


def _unfounded(name: str, both: Mapping[str, Entries], merged: Merged) -> str:
    """Why an entry's inputs are not those that the merged lock makes; empty: they are."""
    own = both[merged.sides[name]]
    for dep in own[name].get("deps", []):
        for maker, side in merged.sides.items():
            for out in both[side][maker].get("outs", []):
                if maker == name or not overlaps(dep["path"], out["path"]):
                    continue
                if maker in merged.again:
                    return f"it reads what {maker} makes"
                # a file in a folder: known to be the same if the folder is the one that its own side made
                seen = dep if dep["path"] == out["path"] else next((o for o in own.get(maker, {}).get("outs", []) if o["path"] == out["path"]), {})
                if seen.get("md5") != out.get("md5"):
                    return f"it read another {dep['path']} than {maker} now makes"
    return ""


def _outdated(base: Entries, both: Mapping[str, Entries], merged: Merged) -> Iterator[tuple[str, str]]:
    """Entries with a parameter that another kept one has with another value, and that is not the side's new one."""
    kept = {name: dict(_leaves(both[side][name].get("params", {}))) for name, side in merged.kept.items()}
    values: dict[str, set[str]] = {}
    for leaves in kept.values():
        for key, value in leaves.items():
            values.setdefault(key, set()).add(value)
    before = {key: value for entry in base.values() for key, value in _leaves(entry.get("params", {}))}
    for name, leaves in kept.items():
        for key, value in leaves.items():
            new = values[key] - {before.get(key)}
            if len(values[key]) > 1 and new != {value}:
                yield name, f"it ran with {key}: {value}, and another stage with {', '.join(sorted(values[key] - {value}))}"


def _leaves(params: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(`file: dotted.key`, value) of all that an entry's `params` hold; a list is one value."""

    def below(value: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                yield from below(inner, f"{key}.{name}" if key else name)
        else:
            yield key, str(value)

    for file, values in params.items():
        yield from ((f"{file}: {key}", value) for key, value in below(values, ""))
