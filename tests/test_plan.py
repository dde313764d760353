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

from conf.errors import DataError
from stages.operate.differences import ABSENT, differences
from stages.operate.outlook import StageOutlook, outlook
from stages.operate.plan import production, recorded_costs
from stages.operate.rules import rule_changes
from tests.conftest import ROOT
from tests.toy import STEP, Toy


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    yield Toy(tmp_path / "toy", monkeypatch)


def look(toy: Toy) -> dict[str, StageOutlook]:
    return {stage.stage: stage for stage in outlook(toy.folder, toy.values)}


def told(stages: dict[str, StageOutlook], outcome: str) -> set[str]:
    return {name for name, stage in stages.items() if stage.outcome == outcome}


def hold(toy: Toy, seed: int, mutations: int) -> None:
    choose = random.Random(seed)
    assert told(look(toy), "runs") == toy.repro() == set("abcde")
    for number in range(mutations):
        kinds = [toy.mutate(choose) for _ in range(choose.randrange(1, 4))]
        stages = look(toy)
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
    stages = look(toy)
    assert [(d.key, d.before, d.after) for d in stages["b"].params] == [("b", 4, 6)]
    assert stages["c"].reasons == ["code_c.txt changed"]
    assert stages["a"].outcome == "unchanged"
    assert {name: stages[name].outcome for name in "bcd"} == {"b": "runs", "c": "runs", "d": "may run"}
    assert stages["d"].reasons == ["out/b/x is made by b, which runs", "out/c is made by c, which runs"]
    assert stages["e"].outcome == "runs", "its own value changed too: no recorded run has that"


def test_a_new_output_is_a_reason_with_and_without_a_remote(toy: Toy, tmp_path: Path) -> None:
    toy.commit("Before")
    path = toy.folder / "dvc.yaml"
    path.write_text(path.read_text().replace("outs: [out/b]", "outs: [out/b, out/bnew]"))
    for _ in range(2):
        b = look(toy)["b"]
        assert (b.outcome, b.recorded, b.reasons) == ("runs", False, ["out/bnew is a new output"])
        toy.dvc("remote", "add", "--default", "--force", "store", str(tmp_path / "store"))


def test_a_value_that_is_null_is_a_value(toy: Toy) -> None:
    (toy.folder / "dvc.yaml").write_text((toy.folder / "dvc.yaml").read_text().replace("params: [a]", "params: [a, nothing]"))
    (toy.folder / "params.yaml").write_text((toy.folder / "params.yaml").read_text() + "nothing: null\n")
    toy.repro()
    assert told(look(toy), "unchanged") == set("abcde")


def test_what_ran_before_is_restored_and_what_is_gone_is_fetched(toy: Toy) -> None:
    toy.repro()
    toy.set({**toy.values, "d": 6})
    toy.repro()
    toy.set({**toy.values, "d": 4})
    assert told(look(toy), "restored") == {"d", "e"}
    shutil.rmtree(toy.folder / ".dvc/cache")
    shutil.rmtree(toy.folder / "out")
    assert told(look(toy), "runs"), "no cache and no remote: made anew"
    toy.dvc("remote", "add", "-q", "-d", "store", str(toy.folder.parent / "store"))
    toy.set({**toy.values, "d": 6})
    stages = look(toy)
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
        (lambda c: c["gate"]["relative"]["intent"].update(test="bootstrap"), "changes", "gate.relative.intent.test: mcnemar → bootstrap"),
        (lambda c: c["evaluate"]["tasks"]["piqa"].update(group_by="group"), "tightens", "evaluate.tasks.piqa.group_by: None → group"),
        (lambda c: c["gate"].update(champion="0" * 40), "changes", f"gate.champion: none → {'0' * 40}"),
        (lambda c: c["evaluate"]["tasks"].pop("piqa"), "loosens", "evaluate.tasks.piqa is dropped"),
        (lambda c: c["evaluate"]["tasks"]["piqa"].update(limit=10), "loosens", "evaluate.tasks.piqa.limit: 100 → 10"),
        (
            lambda c: c["evaluate"]["tasks"]["support_intent"]["phrasings"].pop(),
            "loosens",
            "evaluate.tasks.support_intent.phrasings: support_intent_forwarded is no longer asked",
        ),
        (lambda c: c["redteam"]["attacks"].pop(0), "loosens", "is no longer used"),
        (lambda c: c["guard"]["attacks"].pop("attack-agents"), "loosens", "guard.attacks.attack-agents no longer measures"),
        (lambda c: c["guard"]["attacks"]["attack-agents"].update(use="split"), "loosens", "guard.attacks.attack-agents.use: test → split"),
        (lambda c: c["guard"]["benign"]["benign-chat"].update(limit=5), "loosens", "guard.benign.benign-chat.limit: 15000 → 5"),
        (lambda c: c["guard"]["benign"]["benign_own"].update(counts=False), "loosens", "guard.benign.benign_own.counts: True → False"),
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


@pytest.mark.parametrize("file", ["dvc.yaml", "dvc.lock", "params.yaml"])
def test_a_file_that_a_merge_left_half_done_is_named(toy: Toy, file: str) -> None:
    toy.repro()
    values = toy.values
    (toy.folder / file).write_text("<<<<<<< HEAD\n" + (toy.folder / file).read_text())
    with pytest.raises(DataError, match=rf"(?s)DVC stopped: .*{file}.*<<<<<<<"):
        outlook(toy.folder, values)


def test_null_is_a_value(toy: Toy) -> None:
    toy.set({**toy.values, "a": None})  # type: ignore[dict-item]
    (toy.folder / "step.py").write_text(STEP.replace("int(values[name])", "int(values[name].strip() == 'null')"))
    toy.repro()
    assert told(look(toy), "unchanged") == set("abcde")


def remote(toy: Toy, folder: Path) -> None:
    """A folder as DVC remote, with everything that was run pushed to it."""
    toy.dvc("remote", "add", "--default", "store", str(folder))
    toy.dvc("push", "--run-cache")


def test_what_another_machine_ran_is_restored_from_the_remote(toy: Toy, tmp_path: Path) -> None:
    toy.repro()
    toy.set({**toy.values, "b": 6})
    toy.repro()
    remote(toy, tmp_path / "remote")
    toy.set({**toy.values, "b": 4})
    toy.repro()
    shutil.rmtree(toy.folder / ".dvc/cache")
    toy.set({**toy.values, "b": 6})
    stages = look(toy)
    assert told(stages, "restored") == set("abcde"), stages["e"]
    from dvc.repo import Repo

    toy.log.write_text("")
    with Repo(".") as repo:
        repo.reproduce(pull=True, allow_missing=True)
    assert toy.log.read_text() == ""


def test_what_a_killed_dvc_left_in_the_run_cache_is_no_run(toy: Toy, tmp_path: Path) -> None:
    toy.repro()
    toy.set({**toy.values, "b": 6})
    toy.repro()
    for entry in (toy.folder / ".dvc/cache/runs").glob("*/*/*"):
        entry.with_name(".cut.tmp").write_bytes(entry.read_bytes().partition(b"outs:")[0])
    remote(toy, tmp_path / "remote")
    toy.set({**toy.values, "b": 4})
    assert told(look(toy), "restored") == set("bde")
    shutil.rmtree(toy.folder / ".dvc/cache/runs")
    assert told(look(toy), "restored") == set("bde"), "the remote's, where the half ones were pushed too"


def test_a_remote_that_cannot_be_asked_is_told_and_the_plan_is_made(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.repro()
    toy.dvc("remote", "add", "--default", "store", "s3://nowhere/x")
    toy.dvc("remote", "modify", "store", "endpointurl", "http://127.0.0.1:9")
    toy.set({**toy.values, "b": 6})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("stages.operate.remote_runs.PATIENCE", 2.0)
    stages = look(toy)
    assert "b" in told(stages, "runs")
    assert any(reason.startswith("whether another machine has run it is unknown: the remote ") for reason in stages["b"].reasons)
