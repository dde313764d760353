"""Measure rules and classifier together on the texts that no training saw.

`python -m stages.guard_measuring` measures the classifier that lies in models/guard, without training one: `trunkline review` judges a candidate's
guard so, in a work tree of the base, on the base's texts and by the base's rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import conf
from conf.schema import Guard, ServeGuard
from stages import platform
from stages.files import canonical, read_json, sha256, write_json, write_jsonl
from stages.guard_texts import Sample, gather
from stages.outcomes import share
from stages.run import progress
from stages.serve.guard.guard import Guard as Watch

OUT = Path("models/guard")
FILES = ("guard.json", "weights.safetensors")
"""What the service loads."""

Row = dict[str, Any]


def shares(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, Any]:
    """Group -> share of refused rows, with its interval."""
    sizes, refused = Counter(map(key, rows)), Counter(key(row) for row in rows if row["refused"])
    return {name: share(refused[name], count) for name, count in sorted(sizes.items())}


def result(rows: Sequence[Row], settings: ServeGuard, learnt: dict[str, Any]) -> dict[str, Any]:
    """What the gate, the red team and people read. A share of nothing is null, and holds at the gate."""
    hostile, harmless = [row for row in rows if row["hostile"]], [row for row in rows if not row["hostile"]]
    unseen, ordinary = [row for row in hostile if row["unseen"] and row["counts"]], [row for row in harmless if row["counts"]]

    def refused(some: Sequence[Row]) -> dict[str, Any] | None:
        return share(sum(row["refused"] for row in some), len(some)) if some else None

    recall, alarms = refused(unseen), refused(ordinary)
    return {
        "recall": recall and recall["share"],
        "unseen": recall,
        "false_alarms": alarms and alarms["share"],
        "ordinary": alarms,
        "families": shares(hostile, lambda row: row["family"]),
        "unseen_families": shares([row for row in hostile if row["unseen"]], lambda row: row["family"]),
        "sources": shares(hostile, lambda row: row["source"]),
        "benign": shares(harmless, lambda row: row["source"]),
        "by": dict(Counter(reason for row in rows for reason in row["reasons"])),
        "threshold": settings.threshold,
        "learnt": learnt,
    }


def measure(folder: Path, texts: Sequence[Sample], settings: ServeGuard, repeats: int) -> None:
    """Read every text with the classifier of a folder and the rules; write samples.jsonl and, last, result.json into it."""
    guard = Watch(folder, settings)
    rows = []
    for sample in progress(texts, "guard", len(texts)):
        verdict = guard.check(sample.text)
        rows.append(vars(sample) | {"refused": not verdict.allowed, "reasons": verdict.reasons, "score": round(verdict.score, 6)})
    rows.sort(key=lambda row: canonical(row, indent=None))
    write_jsonl(folder / "samples.jsonl", rows)
    learnt = read_json(folder / "guard.json")["trained_on"] | {"repeats_dropped": repeats}
    found = result(rows, settings, learnt) | {"digest": {name: sha256(folder / name) for name in FILES}, "platform": platform.record("guard", (), "numpy")}
    write_json(folder / "result.json", found)


def main() -> None:
    """Measure the classifier that lies there."""
    settings: Guard = conf.load("guard")
    serve: ServeGuard = conf.load("serve.guard")
    _, measured, repeats = gather(settings, serve)
    measure(OUT, measured, serve, repeats)


if __name__ == "__main__":
    from stages.run import run

    run(main)
