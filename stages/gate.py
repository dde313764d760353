"""Say whether the exported model may replace the champion, with the reason of every rule, and stop the pipeline unless it may.

Reads:  models/evaluate/scores.json, models/evaluate/samples/, models/redteam/result.json, models/export/summary.json,
        models/guard/result.json, and the champion's models/evaluate/ at the revision gate.champion, from git and DVC
Writes: models/gate/verdict.json, also when it holds
Config: gate
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import conf
from conf.errors import DataError, Held
from conf.schema import Absolute, Gate, Relative
from stages.champion import Json, number, read_champion, read_pairs, relate, weigh
from stages.files import read_json, read_jsonl, write_json

if TYPE_CHECKING:
    from stages.statistics import Comparison

SOURCES = {
    "evaluate": Path("models/evaluate/scores.json"),
    "redteam": Path("models/redteam/result.json"),
    "export": Path("models/export/summary.json"),
    "guard": Path("models/guard/result.json"),
}
SAMPLES = Path("models/evaluate/samples")
VERDICT = Path("models/gate/verdict.json")
log = logging.getLogger(__name__)


class Verdict(TypedDict):
    """What is decided, and why: models/gate/verdict.json."""

    outcome: Literal["promote", "hold", "inconclusive"]
    promote: bool
    """Whether the model may be packaged; only an inconclusive outcome leaves that to `gate.inconclusive`."""
    reasons: list[str]
    rules: list[Json]
    relative: list[Json]
    champion: str | None
    alpha: float
    inconclusive: str
    digest: str | None
    """Of the engine that all results are of; null when they are not of one."""


def measures(found: Mapping[str, Json]) -> Json:
    """Every metric that a rule may name -> what was measured."""
    known: Json = {}
    tasks = found.get("evaluate", {}).get("tasks")
    for name, task in (tasks if isinstance(tasks, dict) else {}).items():
        entry = task if isinstance(task, dict) else {}
        for metric, part in ((f"evaluate.{name}", "score"), (f"evaluate.{name}.spread", "spread"), (f"evaluate.{name}.gain", "gain")):
            if entry.get("n") in (0, None):
                known[metric] = entry.get("reason") or "of no rows"
            else:
                known[metric] = entry.get(part)
    if "redteam" in found:
        known |= {f"redteam.{part}": found["redteam"].get(part) for part in ("attack_success", "false_alarms", "canary_leaks")}
    if "guard" in found:
        known |= {f"guard.{part}": found["guard"].get(part) for part in ("recall", "false_alarms")}
    if "export" in found:
        known["export.agreement"] = found["export"].get("agreement")
    return known


def judge(name: str, rule: Absolute, known: Json) -> Json:
    """Hold one metric against its limit."""
    entry: Json = {"name": name, "metric": rule.metric, "direction": rule.direction, "limit": rule.limit, "why": rule.why, "passed": False, "reason": ""}
    value = number(known.get(rule.metric))
    if rule.metric not in known:
        close = difflib.get_close_matches(rule.metric, known, n=1)
        reason = f"nothing measured {rule.metric}" + (f" (did you mean {close[0]}?)" if close else "")
    elif value is None:
        reason = f"{rule.metric} is {json.dumps(known[rule.metric])}, not a number"
    else:
        passed = value >= rule.limit if rule.direction == "at_least" else value <= rule.limit
        reason = "" if passed else f"{rule.metric} is {value:.4g}, and must be {rule.direction.replace('_', ' ')} {rule.limit:g}"
        entry["passed"] = passed
    return entry | {"value": value, "reason": reason}


def decide(settings: Gate, found: Mapping[str, Json], problems: list[str], weighed: Callable[[Relative], Comparison] | None) -> Verdict:
    """The verdict.

    Args:
        settings: the rules.
        found: what evaluate, redteam, export and guard wrote; without what could not be read.
        problems: why something could not be read; each holds.
        weighed: compares a task with the champion; None: there is no champion.
    """
    digests = {name: found[name].get("digest") for name in sorted(found) if name != "guard"}
    attacked = found.get("redteam", {}).get("guard")
    guards = [attacked.get("digest") if isinstance(attacked, dict) else None, found.get("guard", {}).get("digest")]
    same = len(set(map(str, digests.values()))) == 1 and None not in digests.values()
    holding = list(problems)
    if not same:
        shown = ", ".join(f"{SOURCES[name]}: {digest}" for name, digest in digests.items()) or "none at all"
        holding.append(f"the results are not of one and the same engine ({shown}): run `dvc repro`")
    if {"redteam", "guard"} <= found.keys() and (guards[0] != guards[1] or not guards[0]):
        holding.append(f"{SOURCES['redteam']} and {SOURCES['guard']} are not of one and the same guard: run `dvc repro`")
    rules = [judge(name, rule, measures(found)) for name, rule in sorted(settings.absolute.items())]
    if not rules:
        holding.append("gate.absolute is empty: a gate without a rule cannot let anything through")
    holding += [f"{r['name']}: {r['reason']}{f' ({why})' if (why := r['why']) else ''}" for r in rules if r["passed"] is not True]
    notes: list[str] = []
    relative: list[Json] = []
    if weighed is None:
        notes.append(
            "no champion is pinned in gate.champion: only the absolute rules apply"
            + (f", and {len(settings.relative)} relative rules wait for one" if settings.relative else "")
        )
    elif not settings.relative:
        holding.append("gate.champion is pinned and gate.relative is empty: nothing compares the candidate with it")
    else:
        relative = relate(settings.relative, settings.alpha, weighed)
    said = {outcome: [f"{r['name']}: {r['reason']}" for r in relative if r["outcome"] == outcome] for outcome in ("hold", "inconclusive", "promote")}
    holding, unsettled = holding + said["hold"], said["inconclusive"]
    outcome: Literal["promote", "hold", "inconclusive"] = "hold" if holding else "inconclusive" if unsettled else "promote"
    promote = outcome == "promote" or (outcome == "inconclusive" and settings.inconclusive == "promote")
    if outcome == "inconclusive" and promote:
        notes.append("gate.inconclusive is promote: what the samples do not settle goes through")
    return {
        "outcome": outcome,
        "promote": promote,
        "reasons": [*holding, *unsettled, *said["promote"], *notes],
        "rules": rules,
        "relative": relative,
        "champion": settings.champion,
        "alpha": settings.alpha,
        "inconclusive": settings.inconclusive,
        "digest": str(next(iter(digests.values()))) if same else None,
    }


def main() -> None:
    """Write the verdict, then hold unless it promotes."""
    settings: Gate = conf.load("gate")
    write_json(VERDICT, decide(settings, {}, ["the gate did not finish: its traceback says why"], None))
    found: dict[str, Json] = {}
    problems: list[str] = []
    for name, path in SOURCES.items():
        try:
            value = read_json(path)
            found[name] = value if isinstance(value, dict) else {}
        except DataError as error:
            problems.append(error.what)

    def weighed(rule: Relative) -> Comparison:
        tasks = found.get("evaluate", {}).get("tasks")
        task = tasks.get(rule.task) if isinstance(tasks, dict) else None
        if not isinstance(task, dict):
            raise DataError(f"{SOURCES['evaluate']} has no task {rule.task}")
        entry, rows = read_champion(str(settings.champion), rule.task)
        own = read_pairs(read_jsonl(SAMPLES / f"{rule.task}.jsonl"), "candidate")
        return weigh(rule, (entry, read_pairs(rows, "champion")), (task, own))

    verdict = decide(settings, found, problems, weighed if settings.champion else None)
    write_json(VERDICT, verdict)
    reasons = [str(reason) for reason in verdict["reasons"]]
    if verdict["promote"] is not True:
        raise Held(f"{verdict['outcome']}:\n  - " + "\n  - ".join(reasons), f"{VERDICT} holds every rule; a limit changes only by review of conf/gate/")
    log.info("%s: promote\n%s", verdict["outcome"], "\n".join(f"  - {reason}" for reason in reasons))


if __name__ == "__main__":
    from stages.run import run

    run(main)
