"""`trunkline summary`: what the last `dvc repro` made, from its outputs and the cost record."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

from conf.errors import DataError
from stages import platform
from stages.files import read_json, sha256
from stages.run import COSTS

SCORES = Path("models/evaluate/scores.json")
ANSWERS = Path("models/evaluate/answers.json")
VERDICT = Path("models/gate/verdict.json")
ATTACKS = Path("models/redteam/result.json")
ENGINE = Path("models/export/engine")
BENTO = Path("models/package")
STAGES = ("compose", "collect", "preprocess", "validate", "select", "tune", "export", "evaluate", "guard", "redteam", "gate", "package")


class Cost(TypedDict):
    """The last recorded run of a stage."""

    stage: str
    seconds: float
    peak_bytes: int
    start_bytes: int
    """Resident when it began: under `trunkline repro`, the libraries of all stages, which it shares; 0: an older record."""


class Summary(TypedDict):
    """What `--json` prints."""

    scores: dict[str, Any]
    attacks: dict[str, Any]
    verdict: dict[str, Any]
    answers: list[dict[str, str]]
    costs: list[Cost]
    made: dict[str, int]
    platforms: dict[str, platform.Platform]
    """Stage -> where it computed."""
    elsewhere: list[str]
    """In what this machine differs from the one on which a stage computed."""
    next: str


def read_costs(path: Path = COSTS) -> Iterator[dict[str, Any]]:
    """Every recorded run, the earliest first; half a line is passed over: the disk was full, or the machine went down."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def costs(path: Path = COSTS) -> list[Cost]:
    """The last recorded run of each stage, in pipeline order."""
    last = {
        row["stage"]: Cost(stage=row["stage"], seconds=row["seconds"], peak_bytes=row["peak_bytes"], start_bytes=row.get("start_bytes", 0))
        for row in read_costs(path)
    }
    return [last[stage] for stage in STAGES if stage in last]


def gather() -> Summary:
    """Read everything the summary shows.

    Raises:
        DataError: the pipeline has not come as far as its verdict, or what lies there is of an earlier model.
    """
    if not VERDICT.exists() or not ENGINE.exists():
        raise DataError("there is no verdict yet: models/gate/verdict.json is missing", "run `make` (or `dvc repro`)")
    verdict = read_json(VERDICT)
    if verdict["digest"] != sha256(ENGINE):
        raise DataError("the verdict is of another model than models/export holds", "the last run stopped before the gate; run `dvc repro`")
    promoted = bool(verdict["promote"]) and BENTO.exists()
    made = {str(p): sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in (Path("models/tune"), ENGINE, *([BENTO] if promoted else []))}
    platforms = platform.recorded()
    return Summary(
        scores=read_json(SCORES)["tasks"],
        attacks=read_json(ATTACKS),
        verdict=verdict,
        answers=read_json(ANSWERS)[:3],
        costs=costs(),
        made=made,
        platforms=platforms,
        elsewhere=elsewhere(platforms),
        next="make serve" if promoted else "trunkline config gate  (the limits that held it)",
    )


def elsewhere(platforms: Mapping[str, platform.Platform]) -> list[str]:
    """In what this machine differs from those on which the stages computed, in words."""
    here = platform.describe(*sorted({*chain.from_iterable(platforms.values())} & platform.SWITCHES.keys()))
    return [f"{', '.join(stages)}: {'; '.join(found)}" for stages, made_on in platform.grouped(platforms) if (found := platform.differences(here, made_on))]


def one_line(answer: str) -> str:
    """An answer's lines side by side; an answer of blanks is called so."""
    return " / ".join(line.strip() for line in answer.splitlines() if line.strip()) or "(only blanks)"


def show(as_json: bool = False) -> None:
    """Print the summary."""
    summary = gather()
    if as_json:
        sys.stdout.write(json.dumps(summary, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    table = Table(title="Scores", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("task", "base", "tuned", "± s.e.", "spread over phrasings", "rows"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, score in summary["scores"].items():
        base = (score.get("base") or {}).get("score")
        table.add_row(name, number(base), number(score["score"]), number(score["stderr"]), number(score["spread"]), str(score["n"]))
    console.print(table)

    table = Table(title="Rules of the gate", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("rule", "metric", "value", "limit", ""):
        table.add_column(column, justify="right" if column in {"value", "limit"} else "left")
    signs = {"at_least": "≥", "at_most": "≤"}
    for rule in summary["verdict"]["rules"]:
        mark = "[green]passed[/]" if rule["passed"] else "[bold red]failed[/]"
        table.add_row(rule["name"], rule["metric"], number(rule["value"]), f"{signs[rule['direction']]} {rule['limit']:g}", mark)
    console.print(table)

    outcome = summary["verdict"]["outcome"]
    console.print(f"Verdict: [bold {'green' if summary['verdict']['promote'] else 'red'}]{outcome}[/]")
    for reason in summary["verdict"]["reasons"]:
        console.print(f"  {reason}", markup=False)

    console.print("\nThree answers")
    for answer in summary["answers"]:
        console.print(f"  [dim]customer[/] {escape(' '.join(answer['prompt'].split()))}")
        console.print(f"  [dim]base    [/] {escape(one_line(answer['base']))}")
        console.print(f"  [dim]tuned   [/] {escape(one_line(answer['tuned']))}\n")

    table = Table(title="Time and memory of each stage, when it last ran", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("stage", "seconds", "peak memory", "of it when it began"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for cost in summary["costs"]:
        table.add_row(cost["stage"], f"{cost['seconds']:.1f}", f"{cost['peak_bytes'] / 2**20:,.0f} MiB", f"{cost['start_bytes'] / 2**20:,.0f} MiB")
    table.add_row("together", f"{sum(cost['seconds'] for cost in summary['costs']):.1f}", "", "")
    console.print(table)

    for path, size in summary["made"].items():
        console.print(f"  {path}  {size / 2**20:,.1f} MiB")
    console.print()
    for stages, made_on in platform.grouped(summary["platforms"]):
        console.print(f"Made on ({', '.join(stages)}): " + "; ".join(f"{key} {value}" for key, value in sorted(made_on.items())), markup=False)
    for difference in summary["elsewhere"]:
        console.print(f"[yellow]Made on another platform than this one[/] ({escape(difference)}): run here, the same commit may give other digests")
    console.print(f"\nNext: [bold]{summary['next']}[/]")
