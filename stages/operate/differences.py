"""How two configurations differ: key by key, a list as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = "(absent)"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One key whose value differs."""

    key: str
    """Dotted."""
    before: Any
    """`(absent)`: there was none."""
    after: Any
    """`(absent)`: there is none any more."""


def differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[Difference]:
    """Everything that differs, by key; what only one side has is one difference, however much lies below it."""
    found = []
    for name in sorted({*before, *after}):
        key, old, new = f"{path}{name}", before.get(name, ABSENT), after.get(name, ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{key}.")
        elif old != new:
            found.append(Difference(key=key, before=old, after=new))
    return found
