"""What preprocess publishes: the parts of each split one after the other, the dropped rows in order, and the summary of both."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.errors import DataError
from stages.files import publish, write_json
from stages.steps.rows import decode, dropped_key, merged
from stages.steps.tally import read_tally

SPLITS = ("train", "validation", "test", "corpus")


def write_outputs(out: Path, inputs: Mapping[str, tuple[str, str]], read: Counter[str], work: Path) -> dict[str, Any]:
    """Publish the splits, the dropped rows and the summary, all or nothing; returns the summary.

    Raises:
        DataError: nothing to train on or to test with, or a row is neither kept nor dropped.
    """
    kept = read_tally(work / "kept")
    with publish(out) as folder:
        folder.mkdir()
        for name in SPLITS:
            with (folder / f"{name}.jsonl").open("wb") as split:
                for part in sorted((work / "splits" / name).glob("*.jsonl")):
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, split)
        dropped = write_dropped(work / "dropped", folder / "dropped.jsonl")
        rows = {name: kept[name].total() for name in SPLITS}
        reasons: Counter[str] = sum(dropped.values(), Counter())
        table = {}
        for source, (_, use) in sorted(inputs.items()):
            splits = {name: kept[name][source] for name in SPLITS if kept[name][source]}
            table[source] = {"use": use, "read": read[source], "kept": splits, "dropped": dict(dropped[source])}
            if use != "benchmark" and read[source] != sum(splits.values()) + dropped[source].total():
                raise DataError(f"{source}: {read[source]} rows read, but kept {splits} and dropped {dict(dropped[source])}", "this is a fault of preprocess")
        for name, cause in (("train", "to train on"), ("test", "to test with: set preprocess.split.test over 0, or collect a source with use: test")):
            if not rows[name]:
                raise DataError(f"no row is left {cause}; dropped: {dict(sorted(reasons.items())) or 'none'}", "loosen preprocess, or collect more rows")
        summary = {
            "rows": {**rows, "dropped": reasons.total()},
            "reasons": dict(reasons),
            "redacted": dict(read_tally(work / "redacted")["redacted"]),
            "sources": table,
        }
        write_json(folder / "summary.json", summary)
    return summary


def write_dropped(folder: Path, path: Path) -> dict[str, Counter[str]]:
    """Write the dropped rows of all steps in order; returns source -> reason (without the kept duplicate) -> number."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with path.open("wb") as file:
        for line in merged(folder, by=lambda line: dropped_key(decode(line))):
            row = decode(line)
            counts[row["source"]][row["reason"].split(" of ")[0]] += 1
            file.write(line)
    return counts
