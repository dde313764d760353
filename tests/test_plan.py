"""`trunkline plan`: what it says would run is what `dvc repro` then runs, over random changes of a toy pipeline; and what a change means."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from stages.operate.differences import ABSENT, differences
from stages.operate.outlook import StageOutlook, outlook
from stages.operate.plan import production, recorded_costs
from stages.operate.rules import rule_changes
from tests.conftest import ROOT

PIPELINE = """
stages:
  a: {cmd: "python step.py a", deps: [raw.txt, step.py], params: [a], outs: [out/a]}
  b: {cmd: "python step.py b", deps: [out/a/x, code_b.txt], params: [b], outs: [out/b]}
  c: {cmd: "python step.py c", deps: [out/a, code_c.txt], params: [c], outs: [out/c], metrics: [{out/m.json: {cache: false}}]}
  d: {cmd: "python step.py d", deps: [out/b/x, out/c], params: [d], outs: [out/d]}
  e: {cmd: "python step.py e", deps: [out/d, out/m.json], params: [{params.yaml: null}], outs: [out/e]}
"""
STEP = """
import os, pathlib, sys
name = sys.argv[1]
with open(os.environ["RAN"], "a") as log:
    log.write(name + "\\n")
values = dict(line.split(": ") for line in open("params.yaml").read().splitlines())
inputs = {"a": ["raw.txt"], "b": ["out/a/x", "code_b.txt"], "c": ["out/a/y", "code_c.txt"], "d": ["out/b/x", "out/c/x"], "e": ["out/d/x", "out/m.json"]}[name]
text = "".join(open(path).read().split("\\n")[0] for path in inputs) + str(int(values[name]) // 2)  # second lines and odd values change nothing
out = pathlib.Path("out", name)
out.mkdir(parents=True)
(out / "x").write_text(text)
(out / "y").write_text(text[::-1])
if name == "c":
    pathlib.Path("out/m.json").write_text(str(len(text)))
"""


class Toy:
    """A repository with five stages whose commands note that they ran."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.log = folder, folder.parent / "ran"
        folder.mkdir()
        (folder / "dvc.yaml").write_text(PIPELINE)
        (folder / "step.py").write_text(STEP)
        for name in ("raw", "code_b", "code_c"):
            (folder / f"{name}.txt").write_text(f"{name}\nsecond\n")
        self.set({name: 4 for name in "abcde"})
        monkeypatch.chdir(folder)
        monkeypatch.setenv("RAN", str(self.log))
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        subprocess.run(["git", "init", "-q"], check=True)
        subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)

    def set(self, values: dict[str, int]) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(values))

    @property
    def values(self) -> dict[str, int]:
        return yaml.safe_load((self.folder / "params.yaml").read_text())

    def look(self) -> dict[str, StageOutlook]:
        return {stage.stage: stage for stage in outlook(self.folder, self.values)}

    def repro(self) -> set[str]:
        from dvc.repo import Repo

        self.log.write_text("")
        with Repo(".") as repo:
            repo.reproduce()
        return set(self.log.read_text().split())

    def mutate(self, choose: random.Random) -> str:
        """Change a value, a file, its second line, an output, or the cache."""
        kind = choose.choice(["value", "value", "code", "second line", "output", "cache"])
        text = self.folder / f"{choose.choice(['raw', 'code_b', 'code_c'])}.txt"
        match kind:
            case "value":
                self.set({**self.values, choose.choice("abcde"): choose.randrange(4, 8)})
            case "code":
                text.write_text(f"{text.stem}{choose.randrange(3)}\nsecond\n")
            case "second line":
                text.write_text(text.read_text().split("\n")[0] + f"\n{choose.randrange(3)}\n")
            case "output":
                shutil.rmtree(self.folder / "out" / choose.choice("abcde"), ignore_errors=True)
            case "cache" if choose.random() < 0.4:
                choose.choice(sorted(p for p in (self.folder / ".dvc/cache/files").rglob("*") if p.is_file())).unlink()
        return kind


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    yield Toy(tmp_path / "toy", monkeypatch)


def told(stages: dict[str, StageOutlook], outcome: str) -> set[str]:
    return {name for name, stage in stages.items() if stage.outcome == outcome}


def hold(toy: Toy, seed: int, mutations: int) -> None:
    choose = random.Random(seed)
    assert told(toy.look(), "runs") == toy.repro() == set("abcde")
    for number in range(mutations):
        kinds = [toy.mutate(choose) for _ in range(choose.randrange(1, 4))]
        stages = toy.look()
        ran = toy.repro()
        where = f"seed {seed}, mutation {number} ({', '.join(kinds)}): {[(s.stage, s.outcome, s.reasons) for s in stages.values()]}; ran {sorted(ran)}"
        assert told(stages, "runs") <= ran, where
        assert ran <= told(stages, "runs") | told(stages, "may run"), where


def test_what_it_says_would_run_runs(toy: Toy) -> None:
    hold(toy, seed=0, mutations=8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_what_it_says_would_run_runs_over_many_mutations(toy: Toy, seed: int) -> None:
    hold(toy, seed, mutations=60)


def test_it_says_why(toy: Toy) -> None:
    toy.repro()
    toy.set({**toy.values, "b": 6})
    (toy.folder / "code_c.txt").write_text("another\n")
    stages = toy.look()
    assert [(d.key, d.before, d.after) for d in stages["b"].params] == [("b", 4, 6)]
    assert stages["c"].reasons == ["code_c.txt changed"]
    assert stages["a"].outcome == "unchanged"
    assert {name: stages[name].outcome for name in "bcd"} == {"b": "runs", "c": "runs", "d": "may run"}
    assert stages["d"].reasons == ["out/b/x is made by b, which runs", "out/c is made by c, which runs"]
    assert stages["e"].outcome == "runs", "its own value changed too: no recorded run has that"


def test_what_ran_before_is_restored_and_what_is_gone_is_fetched(toy: Toy) -> None:
    toy.repro()
    toy.set({**toy.values, "d": 6})
    toy.repro()
    toy.set({**toy.values, "d": 4})
    assert told(toy.look(), "restored") == {"d", "e"}
    shutil.rmtree(toy.folder / ".dvc/cache")
    shutil.rmtree(toy.folder / "out")
    assert told(toy.look(), "runs"), "no cache and no remote: made anew"
    subprocess.run(["git", "checkout", "-q", "--", "."], check=False)
    subprocess.run([sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "store", str(toy.folder.parent / "store")], check=True)
    toy.set({**toy.values, "d": 6})
    stages = toy.look()
    assert told(stages, "restored") == set("abcde"), "as on a fork's pull request: the lock and the graph are enough"
    assert all(stage.fetch > 0 for stage in stages.values())


@pytest.mark.parametrize(
    ("change", "effect", "what"),
    [
        (lambda c: c["gate"]["absolute"]["intent"].update(limit=0.5), "loosens", "gate.absolute.intent.limit: 0.75 → 0.5"),
        (lambda c: c["gate"]["absolute"]["intent"].update(limit=0.9), "tightens", "gate.absolute.intent.limit: 0.75 → 0.9"),
        (lambda c: c["gate"]["absolute"]["leaks"].update(limit=2.0), "loosens", "gate.absolute.leaks.limit: 0 → 2"),
        (lambda c: c["gate"]["absolute"].pop("leaks"), "loosens", "gate.absolute.leaks is dropped: redteam.canary_leaks at most 0"),
        (lambda c: c["gate"]["relative"]["intent"].update(margin=0.2), "loosens", "gate.relative.intent.margin: 0.03 → 0.2"),
        (lambda c: c["gate"].update(inconclusive="promote"), "loosens", "gate.inconclusive: hold → promote"),
        (lambda c: c["gate"].update(alpha=0.2), "loosens", "gate.alpha: 0.05 → 0.2"),
        (lambda c: c["gate"].update(champion="0" * 40), "changes", f"gate.champion: none → {'0' * 40}"),
        (lambda c: c["evaluate"]["tasks"].pop("piqa"), "loosens", "evaluate.tasks.piqa is dropped"),
        (lambda c: c["evaluate"]["tasks"]["piqa"].update(limit=10), "loosens", "evaluate.tasks.piqa.limit: 100 → 10"),
        (
            lambda c: c["evaluate"]["tasks"]["support_intent"]["phrasings"].pop(),
            "loosens",
            "evaluate.tasks.support_intent.phrasings: support_intent_forwarded is no longer asked",
        ),
        (lambda c: c["redteam"]["attacks"].pop(0), "loosens", "is no longer used"),
    ],
)
def test_what_a_change_does_to_the_gate(change: Callable[[dict], object], effect: str, what: str) -> None:
    before = yaml.safe_load((ROOT / "params.yaml").read_text())
    after = json.loads(json.dumps(before))
    assert rule_changes(before, after) == []
    change(after)
    found = rule_changes(before, after)
    assert len(found) == 1
    assert found[0].effect == effect
    assert what in found[0].what


def test_differences_name_a_whole_branch_once() -> None:
    found = differences({"a": {"b": 1, "c": 2}, "d": {"e": 3}}, {"a": {"b": 1, "c": 4}, "f": [1]})
    assert [(d.key, d.before, d.after) for d in found] == [("a.c", 2, 4), ("d", {"e": 3}, ABSENT), ("f", ABSENT, [1])]


def test_costs_are_the_median_and_a_line_cut_short_is_passed_over(tmp_path: Path) -> None:
    rows = [{"stage": "tune", "seconds": s, "peak_bytes": 10 * s, "at": 0} for s in (1, 9, 3)]
    path = tmp_path / "costs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "tu')
    assert recorded_costs(path)["tune"].seconds == 3
    assert recorded_costs(tmp_path / "none") == {}


def test_what_it_means_for_production() -> None:
    assert production([StageOutlook(stage="package")]) == "unchanged"
    assert "if the gate promotes" in production([StageOutlook(stage="package", outcome="may run")])
    assert "comes back" in production([StageOutlook(stage="package", outcome="restored")])


def plan(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "stages.operate.cli", "plan", *arguments], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


def test_the_command_plans_this_repository() -> None:
    found = json.loads(plan(ROOT, "--json").stdout)
    assert [stage["stage"] for stage in found["stages"]][:2] == ["compose", "collect"]
    assert plan(ROOT).returncode == 0


def test_no_repository_and_no_such_revision_are_told(small: Path) -> None:
    done = plan(small)
    assert done.returncode == 2
    assert "is no git repository" in done.stderr
    subprocess.run(["git", "init", "-q"], cwd=small, check=True)
    done = plan(small, "--base", "nowhere")
    assert done.returncode == 2
    assert "there is no commit 'nowhere'" in done.stderr
    assert "Traceback" not in done.stderr
