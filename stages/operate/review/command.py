"""What is asked of a change, in order, and the outcome: may be merged, or held with every reason.

A change is held when what was run is not what would be merged, when a result is missing, when the base's gate does not promote it,
when its champion is not what production serves, or when it alters the model and weakens the judge in one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import TrunklineError
from stages.files import publish
from stages.operate.differences import Difference, differences
from stages.operate.git import commit, git
from stages.operate.outlook import StageOutlook, outlook
from stages.operate.plan import Cost, desired_origins, recorded_costs
from stages.operate.review.changes import DataChange, StageChange, card_change, data_change, stage_changes
from stages.operate.review.judge import ATTACKS, SCORES, VERDICT, Judgement, judge
from stages.operate.review.latency import Latency, measure
from stages.operate.review.learned import learned
from stages.operate.review.scores import SampleChange, ScoreChange, sample_changes, score_changes
from stages.operate.review.snapshot import Snapshot
from stages.operate.review.tampering import Flag, tampering
from stages.operate.rules import RuleChange, rule_changes

AFTER = ("gate", "package")
"""Stages that decide upon the model, and do not change it."""
T = TypeVar("T")


@dataclass(kw_only=True)
class Review:
    """Everything that a reviewer sees."""

    base: str
    """Commit whose rules judge."""
    head: str
    dirty: bool
    """Whether this tree has changes that are in no commit."""
    production: str
    """Commit whose model is served."""
    alters_model: bool
    """Whether other answers than production's may come of it."""
    held: list[str] = field(default_factory=list)
    """Why it may not be merged; none: it may."""
    notes: list[str] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    """What it does to its own judge."""
    pending: list[StageOutlook] = field(default_factory=list)
    """Stages that have not run on this tree."""
    stages: list[StageChange] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)
    configuration: list[Difference] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    rules: list[RuleChange] = field(default_factory=list)
    judged: Judgement | None = None
    scores: list[ScoreChange] = field(default_factory=list)
    samples: list[SampleChange] = field(default_factory=list)
    data: DataChange | None = None
    attacks: dict[str, Any] | None = None
    """Red-team result of production's model."""
    card: list[str] = field(default_factory=list)
    """Unified diff of the model cards."""
    latency: dict[str, Latency] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether it may be merged."""
        return not self.held

    def attempt(self, get: Callable[[], T]) -> T | None:
        """Get a piece of evidence; what cannot be had holds the change, and is said."""
        try:
            return get()
        except TrunklineError as error:
            if (told := f"{error.what} ({error.remedy})" if error.remedy else error.what) not in self.held:
                self.held.append(told)
            return None


def review(base_name: str, production_name: str, *, time_answers: bool = True) -> Review:
    """Review this tree.

    Args:
        base_name: revision that it is to be merged into.
        production_name: branch whose last commit is served.
        time_answers: measure how fast the models answer.

    Raises:
        ConfigError: no git repository, or no such revision.
    """
    head = commit("HEAD")
    base, production, tree = Snapshot(commit(base_name)), Snapshot(commit(production_name)), Snapshot(None)
    dirty = bool(git("status", "--porcelain").stdout.strip())
    found = Review(base=str(base.revision), head=head, dirty=dirty, production=str(production.revision), alters_model=False)
    _is_what_would_be_merged(found, base_name, base, tree)
    measured = all(stage.stage in AFTER for stage in found.pending)
    found.alters_model = not measured or production.model != tree.model
    found.stages = found.attempt(lambda: stage_changes(base, tree)) or []
    found.costs, found.configuration = recorded_costs(), differences(base.params, tree.params)
    found.origins = desired_origins()
    found.rules = rule_changes(base.params, tree.params) if base.params else []
    found.data = found.attempt(lambda: data_change(base, tree))
    champion = production if production.served else None
    if champion is None:
        found.notes.append(f"{production_name} serves no model yet: there is nothing to compare with")
    if not found.alters_model:
        found.notes.append("The model is the one in production: nothing new to judge.")
    elif measured:
        # the same engine behind another service has no rows of its own to compare: the absolute rules judge it
        _judge(found, base, tree, champion if production.measured != tree.measured else None, production_name)
        if time_answers and production.measured != tree.measured:
            found.latency = found.attempt(lambda: measure(champion, tree)) or {}
    _own_gate(found, tree)
    scores, attacks = found.attempt(lambda: tree.json(SCORES)) or {}, found.attempt(lambda: tree.json(ATTACKS)) or {}
    found.flags = tampering(base, tree, found.rules, scores.get("tasks", {}), attacks, found.attempt(lambda: learned(base, tree)))
    if (weighty := [flag for flag in found.flags if flag.holds]) and (not measured or base.model != tree.model):
        found.held.insert(0, f"it alters the model and weakens its judge in one (flags: {len(weighty)}): bring the judge's change in a change of its own")
    return found


def _is_what_would_be_merged(found: Review, base_name: str, base: Snapshot, tree: Snapshot) -> None:
    """Whether this tree stands on the base, was composed from its conf/, and was run."""
    behind = int(git("rev-list", "--count", f"HEAD..{base.revision}").stdout or 0)
    if behind:
        found.held.append(f"{base_name} is {behind} commits ahead: what was run is not what would be merged (`git merge {base_name}`, then `trunkline repro`)")
    checked = subprocess.run([sys.executable, "-m", "conf", "--check"], capture_output=True, text=True, check=False)
    if checked.returncode:
        found.held.append(f"conf/ and params.yaml do not agree: {' '.join(checked.stderr.split()) or 'python -m conf --check fails'}")
    stages = found.attempt(lambda: outlook(Path.cwd(), tree.params)) or []
    found.pending = [stage for stage in stages if not stage.recorded]
    if other := [reason.removesuffix(": modified") for stage in stages if stage.recorded for reason in stage.reasons if reason.endswith(": modified")]:
        found.held.append(f"{', '.join(other)} is not what dvc.lock names: `dvc checkout`, or `trunkline repro`")
    if missing := [stage.stage for stage in found.pending if stage.stage not in AFTER]:
        found.held.append(not_run(missing))


def _judge(found: Review, base: Snapshot, tree: Snapshot, champion: Snapshot | None, production_name: str) -> None:
    """The base's verdict, the scores beside the champion's, and whether the champion is the right one."""
    if champion:
        _champion(found, tree, champion, production_name)
        found.attacks = found.attempt(lambda: champion.json(ATTACKS))
    found.judged = found.attempt(lambda: judge(base, tree, champion.revision if champion else None))
    if found.judged is None:
        return
    judged, verdict = found.judged, found.judged.verdict
    if verdict.get("promote") is not True:
        found.held += [f"the base's gate says {verdict.get('outcome')}: {reason}" for reason in verdict.get("reasons", [])]
    found.scores = found.attempt(lambda: score_changes(judged, champion)) or []
    found.samples = found.attempt(lambda: sample_changes(judged, champion)) or []
    if champion:
        found.card = found.attempt(lambda: card_change(champion, tree)) or []


def _champion(found: Review, tree: Snapshot, champion: Snapshot, production_name: str) -> None:
    """The pinned champion must serve the very model that production serves."""
    pinned = (tree.params.get("gate") or {}).get("champion")
    remedy = f"`trunkline champion {production_name}`, then `trunkline repro`"
    if champion.measured != champion.served:
        found.held.append(f"{production_name} was last measured on another model than it serves: `trunkline rollback` there first")
    if not pinned:
        found.held.append(f"no champion is pinned in gate.champion, and {production_name} serves a model: {remedy}")
    elif (held := found.attempt(lambda: Snapshot(commit(str(pinned))))) is not None and held.served != champion.served:
        found.held.append(f"gate.champion {str(pinned)[:12]} is not what {production_name} serves: {remedy}")


def _own_gate(found: Review, tree: Snapshot) -> None:
    """The change's own gate must have let it through, and its Bento must be there."""
    own = found.attempt(lambda: tree.json(VERDICT)) or {}
    pending = [stage.stage for stage in found.pending]
    if "gate" in pending and own.get("promote") is not True:
        found.held += [f"the change's own gate says {own.get('outcome', 'nothing')}: {reason}" for reason in own.get("reasons", ["it has not run"])]
    elif waiting := [stage for stage in pending if stage in AFTER]:
        found.held.append(not_run(waiting))


def not_run(stages: Sequence[str]) -> str:
    """That stages have not run, in a sentence with the remedy."""
    return f"{', '.join(stages)} {'have' if len(stages) > 1 else 'has'} not run on this tree: `trunkline repro`, and commit dvc.lock"


def show(base: str, production: str | None, to: Path, time_answers: bool, as_json: bool) -> int:
    """Review, write the two pages, print the outcome; returns the exit code: 0 may be merged, 1 held."""
    from stages.operate.review.page import html, markdown

    found = review(base, production or base, time_answers=time_answers)
    page = html(found, Snapshot(found.base), Snapshot(None))  # first: a figure that cannot be had holds too
    for name, text in (("review.html", page), ("review.md", markdown(found))):
        with publish(to / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(asdict(found) | {"passed": found.passed}, indent=2, ensure_ascii=False) + "\n")
        return 0 if found.passed else 1
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold green]May be merged[/]" if found.passed else "[bold red]Held[/]")
    for reason in found.held:
        console.print(f"  {reason}", markup=False)
    for flag in found.flags:
        console.print(f"  flagged: {flag.what}", markup=False, style="yellow")
    for note in found.notes:
        console.print(f"  {note}", markup=False, style="dim")
    for task in found.scores:
        if task.difference is not None and task.low is not None and task.high is not None:
            told = f"{task.champion:.3f} → {task.candidate:.3f}, difference {task.difference:+.3f} [{task.low:+.3f}, {task.high:+.3f}]"
            console.print(f"  {task.task}: {told}", markup=False)
    console.print(f"Written: {to / 'review.md'}, {to / 'review.html'}", markup=False)
    return 0 if found.passed else 1
