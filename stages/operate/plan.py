"""`trunkline plan`: what this tree would do, before anything runs: which stages and why, what it costs, and what it means.

conf/ is composed in memory, dvc.lock says what was, and DVC's own objects say what `dvc repro` would make of the difference. Needs
neither the data nor the cache: on a fork's pull request, a lock and a graph are enough.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.operate.differences import ABSENT, Difference, differences
from stages.operate.git import commit, file_at
from stages.operate.outlook import StageOutlook, outlook
from stages.operate.rules import RuleChange, rule_changes
from stages.operate.summary import read_costs
from stages.run import COSTS

SHOWN = 8
"""Reasons of a stage that are printed."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage took, in the median of its recorded runs on this machine."""

    seconds: float
    peak_bytes: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is known before anything runs."""

    base: str
    """Commit that the configuration is compared with."""
    stages: list[StageOutlook]
    costs: dict[str, Cost]
    """Stage -> what it took; absent: it never ran here."""
    configuration: list[Difference]
    """Keys whose value differs from the base's."""
    origins: dict[str, str]
    """Dotted leaf -> the file that sets it."""
    rules: list[RuleChange]
    production: str
    """What it means for what is served, in a sentence."""

    @property
    def empty(self) -> bool:
        """Whether no stage would run, or be restored, and no value differs."""
        return not self.configuration and all(stage.outcome == "unchanged" for stage in self.stages)


def desired() -> tuple[dict[str, Any], dict[str, str]]:
    """The values that params.yaml will hold, overrides of an experiment included, and the file of each leaf.

    Raises:
        ConfigErrors: conf/ is wrong.
    """
    from conf import PARAMS
    from conf.__main__ import NOTICE, has_end
    from conf.compose import compose, digest
    from conf.yaml import read

    composed = compose()
    text = PARAMS.read_text(encoding="utf-8") if PARAMS.exists() else ""
    if text.startswith(NOTICE.format(digest=digest()).rstrip("\n")) and text.endswith("\n") and has_end(present := read(PARAMS), composed.values):
        return dict(present), composed.origins
    return composed.values, composed.origins


def desired_origins() -> dict[str, str]:
    """Dotted leaf -> the file that sets it; empty where conf/ is wrong, which `python -m conf --check` tells."""
    from conf.compose import compose
    from conf.errors import ConfigError

    try:
        return compose(conf=Path("conf").resolve()).origins  # of this tree, whoever runs it
    except ConfigError:
        return {}


def recorded_costs(path: Path = COSTS) -> dict[str, Cost]:
    """Stage -> median over its recorded runs."""
    seen: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in read_costs(path):
        seen[row["stage"]].append(row)
    return {stage: Cost(**{part: statistics.median(row[part] for row in rows) for part in ("seconds", "peak_bytes")}) for stage, rows in seen.items()}


def production(stages: list[StageOutlook]) -> str:
    """What the last stage's outcome means for what is served."""
    match next((stage.outcome for stage in stages if stage.stage == "package"), "unchanged"):
        case "runs" | "may run":
            return "a new Bento takes its place if the gate promotes; if it holds, nothing changes"
        case "restored":
            return "the Bento of an earlier run with these very inputs comes back"
    return "unchanged"


def plan(base: str = "HEAD") -> Plan:
    """Work it out.

    Raises:
        ConfigError: no git repository, no such revision, or conf/ is wrong.
    """
    revision = commit(base)
    values, origins = desired()
    text = file_at(revision, "params.yaml")
    before: Mapping[str, Any] = _parse(text) if text else {}
    stages = outlook(Path.cwd(), values)
    return Plan(
        base=revision,
        stages=stages,
        costs=recorded_costs(),
        configuration=differences(before, values),
        origins=origins,
        rules=rule_changes(before, values) if before else [],
        production=production(stages),
    )


def _parse(text: str) -> Mapping[str, Any]:
    import yaml

    value: Mapping[str, Any] = yaml.load(text, Loader=yaml.CSafeLoader)
    return value


def show(base: str = "HEAD", as_json: bool = False) -> None:
    """Print the plan."""
    found = plan(base)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found) | {"empty": found.empty}, indent=2, ensure_ascii=False) + "\n")
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    colour = {"runs": "bold yellow", "may run": "yellow", "restored": "green", "unchanged": "dim"}
    for stage in found.stages:
        cost = found.costs.get(stage.stage)
        extra = []
        if stage.outcome in ("runs", "may run"):
            extra.append(f"about {cost.seconds:.0f} s, {cost.peak_bytes / 2**20:,.0f} MiB" if cost else "never timed here")
        if stage.fetch:
            extra.append(f"fetches {stage.fetch / 2**20:,.1f} MiB")
        console.print(f"[{colour[stage.outcome]}]{stage.outcome:>9}[/]  {stage.stage:<10} [dim]{'; '.join(extra)}[/]")
        lines = [told(change, found.origins) for change in stage.params] + stage.reasons
        for line in lines[:SHOWN]:
            console.print(f"             {escape(line)}")
        if len(lines) > SHOWN:
            console.print(f"             [dim]… and {len(lines) - SHOWN} more: --json shows all[/]")
    if found.configuration:
        console.print(f"\nConfiguration, against {found.base[:12]}", markup=False)
        for change in found.configuration:
            console.print(f"  {escape(told(change, found.origins))}")
    if found.rules:
        console.print("\nThe gate")
        for rule in found.rules:
            console.print(f"  [{'bold red' if rule.effect == 'loosens' else 'dim'}]{rule.effect}[/]  {escape(rule.what)}")
    console.print(f"\nProduction: {found.production}")
    if found.empty:
        console.print("Nothing would run. That says nothing about the model: nothing was measured.")
        return

    def seconds(outcome: str) -> float:
        return sum(found.costs[stage.stage].seconds for stage in found.stages if stage.outcome == outcome and stage.stage in found.costs)

    possible = seconds("may run")
    console.print(f"Time: about {seconds('runs'):.0f} s" + (f", and up to {possible:.0f} s more for what may run" if possible else ""))


def told(change: Difference, origins: Mapping[str, str]) -> str:
    """`key: old → new (file)`; no file sets what is gone."""
    shown = [value if value == ABSENT else json.dumps(value, ensure_ascii=False) for value in (change.before, change.after)]
    cut = [text if len(text) <= 60 else f"{text[:57]}…" for text in shown]
    file = origins.get(change.key) or next((name for key, name in origins.items() if key.startswith(f"{change.key}.")), "conf/schema.py")
    return f"{change.key}: {cut[0]} → {cut[1]}" + ("" if change.after == ABSENT else f" ({file})")
