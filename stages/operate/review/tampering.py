"""What a change does to its own judge: rules made looser, an evaluation set made smaller, the gate's code edited, answers learned by heart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import yaml

from stages.operate.git import git
from stages.operate.review.snapshot import Snapshot
from stages.operate.rules import RuleChange

if TYPE_CHECKING:
    from stages.operate.review.learned import Learned

WARDENS = (
    *("stages/operate/*", "conf/*.py", ".github/*", ".gitlab-ci.yml", ".ci/*", ".gitattributes"),
    *("requirements.txt", "pyproject.toml", "Makefile", ".dvc/config"),
)
"""Beside the gate stage's own code: what reviews, what runs the review, what reads the rules, and which packages all of it imports."""
OURS = frozenset({"conf", "stages", "tests", "data"})
"""Folders of modules. Any other in the root, and a module beside it, Python would take before the package of that name."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One thing that weakens the judge."""

    what: str
    holds: bool
    """Whether it holds a change that also alters the model; false: the base's judge is not touched by it."""


def declared(pipeline: str | None) -> dict[str, Any]:
    """Stage -> its entry in a dvc.yaml."""
    return dict((yaml.load(pipeline, Loader=yaml.CSafeLoader) or {}).get("stages", {})) if pipeline else {}


def code(pipeline: str | None, *stages: str) -> set[str]:
    """Modules, and folders of questions, that stages depend on."""
    deps = {dep for stage in stages for dep in declared(pipeline).get(stage, {}).get("deps", [])}
    return {dep for dep in deps if dep.endswith(".py") or dep.startswith("conf/")}


def changed_files(base: Snapshot) -> list[str]:
    """Files in git that differ from the base, and new ones that git does not ignore."""
    found = git("diff", "--name-only", "--no-renames", str(base.revision)).stdout.splitlines()
    return sorted({*found, *git("ls-files", "--others", "--exclude-standard").stdout.splitlines()})


def tampering(
    base: Snapshot, tree: Snapshot, rules: Sequence[RuleChange], scores: dict[str, Any], attacks: dict[str, Any], taught: Learned | None
) -> list[Flag]:
    """Every flag, those that hold first.

    Args:
        base: whose rules hold.
        tree: the change.
        rules: what it does to the rules.
        scores: task -> entry of the tree's own scores.json.
        attacks: the tree's own red-team result.
        taught: what it teaches that the base asks; null: it could not be counted.
    """
    found = [Flag(what=rule.what, holds=True) for rule in rules if rule.effect == "loosens"]
    found += [*_smaller(base, scores, attacks), *_guard_smaller(base, tree), *_edited(base, tree)]
    found += _by_heart(taught) if taught else []
    return sorted(found, key=lambda flag: not flag.holds)


def _by_heart(taught: Learned) -> Iterator[Flag]:
    for count, what, holds in (
        (taught.asked, "rows to train on are in the base's evaluation set, word for word", True),
        (taught.attacks, "rows to train on are attacks of the base's red team, word for word", True),
        (taught.guard, "texts that teach the guard repeat what the base measures it on", True),
        (taught.dropped, "texts of the guard's teaching sources repeat what the base measures it on: the guard drops them", False),
    ):
        if count:
            yield Flag(what=f"{count} {what}", holds=holds)


def _smaller(base: Snapshot, scores: dict[str, Any], attacks: dict[str, Any]) -> Iterator[Flag]:
    before = (base.json("models/evaluate/scores.json") or {}).get("tasks", {})
    for task, entry in sorted(before.items()):
        if (rows := (scores.get(task) or {}).get("n")) is not None and rows < (entry.get("n") or 0):
            yield Flag(what=f"the evaluation set of {task} shrinks: {entry['n']} → {rows} rows", holds=True)
    for part, old in (base.json("models/redteam/result.json") or {}).items():
        if part in ("attacks", "benign") and (rows := attacks.get(part, {}).get("n", 0)) < old.get("n", 0):
            yield Flag(what=f"the red team's {part} shrink: {old['n']} → {rows}", holds=True)


def _guard_smaller(base: Snapshot, tree: Snapshot) -> Iterator[Flag]:
    before, now = (side.json("models/guard/result.json") or {} for side in (base, tree))
    for part in ("unseen", "ordinary"):
        old, new = (side.get(part, {}).get("n", 0) for side in (before, now))
        if now and new < old:
            yield Flag(what=f"the texts that measure the guard shrink ({part}): {old} → {new}", holds=True)


def _edited(base: Snapshot, tree: Snapshot) -> Iterator[Flag]:
    pipelines = base.text("dvc.yaml"), tree.text("dvc.yaml")
    judging = set().union(*(code(text, "gate") for text in pipelines))
    measuring = set().union(*(code(text, "evaluate", "guard", "redteam") for text in pipelines)) - judging
    for path in changed_files(base):
        if path in judging:
            yield Flag(what=f"{path} is the gate's code", holds=True)
        elif any(fnmatch(path, pattern) for pattern in WARDENS) or (path.endswith(".py") and path.partition("/")[0] not in OURS):
            yield Flag(what=f"{path} reviews, or runs the review", holds=True)
        elif path in measuring or any(path.startswith(f"{folder}/") for folder in measuring):
            yield Flag(what=f"{path} measures: the base's own is used", holds=False)
    for stage in ("evaluate", "guard", "redteam", "gate", "package"):
        if declared(pipelines[0]).get(stage) != declared(pipelines[1]).get(stage):
            yield Flag(what=f"dvc.yaml declares {stage} otherwise", holds=stage == "gate")
