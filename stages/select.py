"""Choose the base: limits and access policy before anything is fetched, then a probe of what remains.

Reads: candidates of conf/select; data/preprocess/corpus.jsonl and train.jsonl for a base made here; the rows of the probe's task.
Writes: models/select/base/ (the chosen base) and models/select/leaderboard.json (every candidate with its outcome and reasons).
Config: select.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import conf
from conf.errors import ModelError, PolicyBreach, SourceError
from conf.schema import Candidate, Classification, EngineSettings, Limits, Made, Select
from stages import platform, pretrain, weights
from stages.files import publish, remove, write_json
from stages.run import WORK
from stages.sources import policy
from stages.sources.fetch import fetch
from stages.sources.files import TooLarge

OUT = Path("models/select")
SCRATCH = WORK / "select"
TUNING = 16
"""Bytes per parameter to tune all weights in float32: weight, gradient, and AdamW's two moments."""
TOLERANCE = 0.02
"""Largest relative difference between the stated and the counted parameters."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Row:
    """One line of the leaderboard."""

    candidate: str
    licence: str
    parameters: int
    bytes: int
    outcome: str = "passed"
    """chosen, passed or refused."""
    reasons: list[str] = field(default_factory=list)
    """Why refused, or why chosen."""
    score: float | None = None
    """Of the probe; null: refused before it."""
    stderr: float | None = None


def describe(name: str, candidate: Candidate) -> Row:
    """What is known of a candidate before anything is fetched."""
    if isinstance(candidate, Made):
        return Row(candidate=name, licence=candidate.licence, parameters=pretrain.parameters(candidate.architecture), bytes=0)
    return Row(candidate=name, licence=candidate.origin.licence, parameters=candidate.parameters, bytes=candidate.bytes)


def classification(candidate: Candidate) -> Classification:
    """Who may see a candidate."""
    return candidate.classification if isinstance(candidate, Made) else candidate.origin.classification


def breaches(row: Row, limits: Limits) -> list[str]:
    """The limits that a candidate breaks, with value and limit; empty: none."""
    found = []
    if not policy.allows(row.licence, limits.licences):
        found.append(f"licence {row.licence} is not among select.limits.licences ({', '.join(limits.licences) or 'none'})")
    for what, value, limit in (
        ("parameters", row.parameters, limits.max_parameters),
        ("bytes", row.bytes, limits.max_bytes),
        ("memory", TUNING * row.parameters, limits.max_memory),
    ):
        if limit is not None and value > limit:
            found.append(f"{what} {value:,} is over select.limits.max_{what}={limit:,}")
    return found


def refuse(settings: Select, row: Row) -> None:
    """Apply limits and access policy to one row; nothing has been fetched yet."""
    candidate = settings.candidates[row.candidate]
    row.reasons = breaches(row, settings.limits)
    for purpose in ("training", "serving"):
        try:
            policy.check(row.candidate, row.licence, classification(candidate), purpose, settings.policy)
        except PolicyBreach as breach:  # it is refused, not used: the others may still be chosen
            row.reasons.append(breach.what.splitlines()[-1].strip())
    if row.reasons:
        row.outcome = "refused"


def prepare(settings: Select, name: str, out: Path) -> int:
    """Make or fetch a candidate as a clean folder; returns its parameters.

    Raises:
        SourceError, ModelError: it cannot be had, or is not what conf/ says.
    """
    candidate = settings.candidates[name]
    if isinstance(candidate, Made):
        return pretrain.make(candidate, pretrain.read_texts(), settings.dtype, out)
    try:
        files = fetch(name, candidate.origin, retries=settings.retries, timeout=settings.timeout, max_bytes=candidate.bytes)
    except TooLarge as error:
        raise SourceError(
            f"{name} has more bytes than select.candidates.{name}.bytes={candidate.bytes:,} says",
            "state the right number if you trust the source: the limits are applied to it before anything is fetched",
        ) from error
    counted = weights.clean(files, candidate.format, settings.dtype, out)
    if abs(counted - candidate.parameters) > TOLERANCE * candidate.parameters:
        raise ModelError(
            f"select.candidates.{name}.parameters={candidate.parameters:,}, but the weights hold {counted:,}",
            "state the right number: the limits are applied to it before anything is fetched",
        )
    return counted


def measure(settings: Select, folder: Path) -> tuple[float, float]:
    """Score and standard error of a candidate on the probe."""
    from stages.harness import probe
    from stages.serve.engine import open_engine

    engine = open_engine(folder, EngineSettings(kind="transformers", quantization=settings.dtype, threads=settings.threads))
    return probe(engine, settings.probe.task, settings.probe.metric, settings.probe.limit)


def choose(rows: list[Row], prefer: str | None) -> tuple[Row, str]:
    """The winner and why, in a sentence. Equal scores: the smaller one, then the first by name.

    Raises:
        ModelError: every candidate, or the preferred one, is refused.
    """
    left = [row for row in rows if row.outcome != "refused"]
    told = "; ".join(f"{row.candidate}: {', '.join(row.reasons)}" for row in rows if row.outcome == "refused")
    if prefer is not None and prefer not in {row.candidate for row in left}:
        raise ModelError(f"select.prefer={prefer} is refused: {told}", "prefer another candidate, or have its owner change the limit")
    if not left:
        raise ModelError(f"no candidate is left: {told}", "add a candidate to conf/select, or change select.limits")
    best = min(left, key=lambda row: (row.candidate != prefer, -(row.score or 0.0), row.parameters, row.candidate))
    if best.candidate == prefer:
        why = f"{best.candidate} is chosen because select.prefer names it and it keeps the limits (probe {best.score:.3f})."
    elif len(left) == 1:
        why = f"{best.candidate} is chosen because it alone keeps the limits (probe {best.score:.3f})."
    else:
        rest = ", ".join(f"{row.candidate} {row.score:.3f}" for row in sorted(left, key=lambda r: (-(r.score or 0.0), r.candidate)) if row is not best)
        why = f"{best.candidate} is chosen because its probe score of {best.score:.3f} is the best of {len(left)} (then: {rest})."
    return best, why


def leaderboard(settings: Select, rows: list[Row], chosen: Row, why: str, made_on: platform.Platform) -> Mapping[str, object]:
    """The leaderboard as JSON: chosen first, then by score."""
    order = sorted(rows, key=lambda r: (r is not chosen, r.outcome == "refused", -(r.score or 0.0), r.candidate))
    return {
        "chosen": chosen.candidate,
        "why": why,
        "probe": {"task": settings.probe.task, "metric": settings.probe.metric, "limit": settings.probe.limit},
        "candidates": [vars(row) for row in order],
        "platform": made_on,
    }


def main() -> None:
    """Refuse, prepare, probe, choose, publish."""
    settings: Select = conf.load("select")
    rows = [describe(name, candidate) for name, candidate in sorted(settings.candidates.items())]
    for row in rows:
        refuse(settings, row)
    left = [row for row in rows if row.outcome != "refused"]
    choose([Row(**{**vars(row), "score": 0.0}) for row in rows], settings.prefer)  # a hopeless list stops here, before anything is fetched
    import torch

    torch.set_num_threads(settings.threads)
    made_on = platform.record("select", (), "torch")
    remove(SCRATCH)
    try:
        for row in left:
            log.info("%s: preparing %s parameters", row.candidate, f"{row.parameters:,}")
            row.parameters = prepare(settings, row.candidate, SCRATCH / row.candidate)
            row.score, row.stderr = measure(settings, SCRATCH / row.candidate)
            log.info("%s: %s %.3f ± %.3f", row.candidate, settings.probe.metric, row.score, row.stderr)
        chosen, why = choose(rows, settings.prefer)
        chosen.outcome, chosen.reasons = "chosen", [why]
        with publish(OUT / "base") as base:
            shutil.move(SCRATCH / chosen.candidate, base)  # models/ may be another disk
        write_json(OUT / "leaderboard.json", leaderboard(settings, rows, chosen, why, made_on))
    finally:
        remove(SCRATCH)
    log.info(why)


if __name__ == "__main__":
    from stages.run import run

    run(main)
