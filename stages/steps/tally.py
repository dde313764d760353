"""Counts that tasks leave behind, one file each, and their sum."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from stages.files import canonical, read_json


def write_tally(folder: Path, rank: int, tally: Mapping[str, Mapping[str, int]]) -> None:
    """Leave what one task counted: table -> name -> number."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{rank:05d}.json").write_text(canonical(tally), encoding="utf-8")


def read_tally(folder: Path) -> dict[str, Counter[str]]:
    """What all tasks counted together."""
    total: dict[str, Counter[str]] = defaultdict(Counter)
    for path in sorted(folder.glob("*.json")):
        for table, counts in read_json(path).items():
            total[table].update(counts)
    return total
