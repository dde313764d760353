"""The candidate judged by the base: its rules, its evaluation data and its code, against the model that production serves.

A second work tree of the base is laid out, with the candidate's model and guard in it and a params.yaml that takes `evaluate`, `guard`, `redteam`
and `gate` from the base and everything else from the candidate. Where what a measuring stage reads beside the model is the same on both
sides, code included, the candidate's own results are what the base would measure, and are taken; else the stage runs there again. Of guard, only
the measuring runs again: the candidate's classifier is read on the base's texts, and redteam then runs again on those. The gate runs there always.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from conf.errors import DataError
from conf.yaml import dump
from stages.files import read_json, read_jsonl
from stages.intact import forget_index
from stages.operate.git import spare_tree
from stages.operate.review.snapshot import Snapshot
from stages.operate.review.tampering import changed_files, declared
from stages.run import WORK

DATA = ("data/collect", "data/preprocess")
MODEL = ("models/export", "models/select", "models/tune")
GUARD = ("models/guard/guard.json", "models/guard/weights.safetensors")
"""The candidate's classifier, whoever measures it."""
SCORES, SAMPLES, ATTACKS, VERDICT = "models/evaluate/scores.json", "models/evaluate/samples", "models/redteam/result.json", "models/gate/verdict.json"
MADE = ("select", "tune", "export", "evaluate", "guard", "redteam")
"""Stages whose outputs it takes to judge a model."""
JUDGES = {"evaluate": "models/evaluate", "guard": "models/guard", "redteam": "models/redteam"}
"""Stage that measures -> where it writes."""
RUNS = {"guard": "guard_measuring"}
"""Stage -> the module that measures without making anything, where it is not the stage's own."""


@dataclass(kw_only=True)
class Judgement:
    """What the base says of the candidate."""

    verdict: dict[str, Any]
    """As the gate writes it."""
    scores: dict[str, Any]
    """Task -> entry of scores.json."""
    samples: dict[str, list[dict[str, Any]]]
    """Task -> rows."""
    attacks: dict[str, Any]
    """models/redteam/result.json."""
    again: list[str] = field(default_factory=list)
    """Why a stage was run again, one sentence each; none: the candidate's own results are the base's."""


def moved(stage: str, base: Snapshot, tree: Snapshot, changed: Sequence[str] = ()) -> list[str]:
    """What differs between the two of a measuring stage, beside the model that it reads.

    Args:
        changed: files in git that differ; every stage reads its settings by conf/*.py, which is no dependency of its.
    """
    read = [{path: md5 for path, md5 in side.inputs(stage).items() if not path.startswith("models/")} for side in (base, tree)]
    found = [path for path in sorted({*read[0], *read[1]}) if read[0].get(path) != read[1].get(path)]
    found += [path for path in changed if fnmatch(path, "conf/*.py")]
    pipelines = [declared(side.text("dvc.yaml")).get(stage) for side in (base, tree)]
    commands = [side.lock.get(stage, {}).get("cmd") for side in (base, tree)]
    found += ["its declaration"] if pipelines[0] != pipelines[1] or commands[0] != commands[1] else []
    return found + ([f"the key {stage}"] if base.params.get(stage) != tree.params.get(stage) else [])


def rules(base: Snapshot, tree: Snapshot, champion: str | None) -> dict[str, Any]:
    """The params.yaml by which the candidate is judged; without relative rules there is nothing to compare a champion by."""
    judging = {key: base.params[key] for key in ("evaluate", "guard", "redteam", "gate") if key in base.params}
    gate = judging.get("gate", {})
    return {**tree.params, **judging, "gate": {**gate, "champion": champion if gate.get("relative") else None}}


def judge(base: Snapshot, tree: Snapshot, champion: str | None) -> Judgement:
    """Lay out, measure what must be measured again, and judge.

    Args:
        base: whose rules hold.
        tree: the candidate.
        champion: commit whose model is served; None: nothing is.

    Raises:
        DataError: what it takes is not here, or the base's code cannot judge the candidate.
    """
    here = Path.cwd()
    bring(here, [path for stage in MADE for path in tree.outputs(stage) if not Path(path).exists()])
    changed = changed_files(base)
    known = declared(base.text("dvc.yaml"))
    why = {stage: found for stage in JUDGES if stage in known and (found := moved(stage, base, tree, changed))}
    if "guard" in why:
        why.setdefault("redteam", ["the guard's texts"])
    with spare_tree(str(base.revision)) as spare:
        share_cache(here, spare)
        (spare / "params.yaml").write_text(dump(rules(base, tree, champion)), encoding="utf-8")
        for path in (*MODEL, *(JUDGES[stage] for stage in JUDGES if stage not in why)):
            shutil.rmtree(spare / path, ignore_errors=True)
            (spare / path).parent.mkdir(parents=True, exist_ok=True)
            (spare / path).symlink_to(here / path)
        for path in GUARD if "guard" in why else ():
            (spare / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here / path, spare / path)
        if why:
            bring(spare, DATA)
        for stage in JUDGES:
            if stage in why:
                call(RUNS.get(stage, stage), here, spare)
        (spare / VERDICT).unlink(missing_ok=True)
        call("gate", here, spare, may_hold=True)
        scores = read_json(spare / SCORES)["tasks"]
        return Judgement(
            verdict=read_json(spare / VERDICT),
            scores=scores,
            samples={task: list(read_jsonl(spare / SAMPLES / f"{task}.jsonl")) for task in scores},
            attacks=read_json(spare / ATTACKS),
            again=[f"{stage} ran again as the base has it: {named(found)} differ{'s'[: len(found) == 1]}" for stage, found in why.items()],
        )


def named(paths: list[str], most: int = 4) -> str:
    """The first few of a list."""
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def share_cache(here: Path, spare: Path) -> None:
    """Let DVC in the spare tree use this checkout's cache, remotes and credentials."""
    from dvc.repo import Repo

    with Repo(str(here)) as repo:
        cache = repo.cache.local_cache_dir
    local = Path(".dvc/config.local")
    if (here / local).exists():
        shutil.copyfile(here / local, spare / local)
    with Repo(str(spare)) as repo, repo.config.edit("local") as config:
        config["cache"]["dir"] = cache


def bring(root: Path, paths: Sequence[str]) -> None:
    """Put outputs that the dvc.lock of a tree names into it, from the cache or from the remote.

    Raises:
        DataError: they are neither in the cache nor on the remote.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    targets = [str(root / path) for path in paths]
    try:
        with Repo(str(root)) as repo:
            forget_index(repo)
            if targets and repo.config["core"].get("remote"):
                repo.fetch(targets=targets)
            if targets:
                repo.checkout(targets=targets, force=True)
    except DvcException as error:
        remedy = "`dvc push` where they were made, or set the DVC remote's credentials"
        raise DataError(f"{', '.join(paths)} cannot be had: {' '.join(str(error).split())}", remedy) from error


def call(stage: str, here: Path, spare: Path, *, may_hold: bool = False) -> None:
    """Run a stage of the base's code in the spare tree.

    Raises:
        DataError: it stopped; a gate that only held has written its verdict.
    """
    engines = os.environ.get("TRUNKLINE_ENGINES", str(here / WORK / "engines"))
    keep = {key: value for key, value in os.environ.items() if key not in ("DVC_STAGE", "DVC_ROOT", "TRUNKLINE_WARM")}
    environment = {**keep, "PYTHONPATH": str(spare), "PYTHONHASHSEED": "0", "TRUNKLINE_ENGINES": engines}
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"], cwd=spare, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode and not (may_hold and (spare / VERDICT).exists()):
        what = f"the base's {stage} cannot judge this candidate (exit {done.returncode}): {done.stderr.strip()[-600:]}"
        raise DataError(what, f"put what {stage} needs onto the base first, in a change of its own")
