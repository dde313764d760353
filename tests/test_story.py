"""The story that Trunkline is for, with the real tools on `tiny`: promoted, held, flagged and held, forced in and rolled back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkout import ask, change, commit, ran, sh, working_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
TINY, GATE = "conf/experiment/tiny.yaml", "conf/gate/tiny.yaml"
QUESTION = "My card was charged twice for one tent. Please send the money back."


def trunkline(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return sh(folder, sys.executable, "-m", "stages.operate.cli", *arguments, check=check)


def review(folder: Path) -> tuple[int, dict[str, Any]]:
    done = trunkline(folder, "review", "--base", "main", "--json", check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def branch(folder: Path, name: str, start: str = "main") -> None:
    sh(folder, "git", "checkout", "-q", "-b", name, start)
    sh(folder, "dvc", "checkout", "--quiet", "--force")


def merge(folder: Path, name: str) -> None:
    sh(folder, "git", "checkout", "-q", "main")
    sh(folder, "git", "merge", "-q", "--no-ff", "-m", f"Merge {name}", name)
    sh(folder, "dvc", "checkout", "--quiet", "--force")


def propose(folder: Path, message: str) -> bool:
    """Pin the champion, run, commit; returns whether the pipeline went through."""
    trunkline(folder, "champion", "main")
    done = sh(folder, "dvc", "repro", check=False)
    commit(folder, message)
    return done.returncode == 0


def test_the_story(tmp_path: Path) -> None:
    folder = working_tree(tmp_path, "tiny")
    change(folder / TINY, "epochs: 4.0", "epochs: 2.0")
    change(folder / GATE, "limit: 0.5,", "limit: 0.15,")
    change(folder / GATE, "limit: 0.3,", "limit: 0.1,")
    commit(folder, "Use tiny")
    sh(folder, "dvc", "repro")
    commit(folder, "Run tiny")
    sh(folder, "git", "branch", "late")

    # a good change: twice as long
    branch(folder, "good")
    change(folder / TINY, "epochs: 2.0", "epochs: 4.0")
    assert propose(folder, "Tune for longer")
    code, good = review(folder)
    assert (code, good["passed"], good["held"], good["flags"], good["alters_model"]) == (0, True, [], [], True)
    (intent,) = [task for task in good["scores"] if task["task"] == "support_intent"]
    assert intent["outcome"] == "promote"
    assert intent["low"] < intent["difference"] < intent["high"]
    assert intent["difference"] > 0.1
    assert 0 < len(good["samples"]) <= 10
    assert {side: time["tokens"] > 0 for side, time in good["latency"].items()} == {"champion": True, "candidate": True}
    assert "May be merged" in (folder / ".dvc/tmp/trunkline/review/review.md").read_text(encoding="utf-8")
    merge(folder, "good")
    assert ran(sh(folder, "dvc", "repro")) == []
    served = ask(folder / "models/package", QUESTION)

    # one that was begun before it must be judged against the new champion
    sh(folder, "git", "checkout", "-q", "late")
    sh(folder, "dvc", "checkout", "--quiet", "--force")
    change(folder / TINY, "engine: {threads: 1}", "engine: {threads: 1}\n  max_tokens: 24")
    assert ran(sh(folder, "dvc", "repro")) == ["compose", "package"]
    commit(folder, "Answer shorter")
    code, late = review(folder)
    assert code == 1
    assert any("main is 2 commits ahead" in reason for reason in late["held"])
    assert any("no champion is pinned" in reason for reason in late["held"])

    # a bad change: half as long
    branch(folder, "bad")
    change(folder / TINY, "epochs: 4.0", "epochs: 2.0")
    assert not propose(folder, "Tune for a shorter time")
    code, bad = review(folder)
    assert (code, bad["flags"]) == (1, [])
    assert any(reason.startswith("the base's gate says hold: intent: support_intent: worse by more than the margin") for reason in bad["held"])

    # one that loosens the gate for it
    branch(folder, "loosens")
    change(folder / TINY, "epochs: 4.0", "epochs: 2.0")
    change(folder / GATE, "margin: 0.05", "margin: 0.7")
    assert propose(folder, "Tune for a shorter time, with another margin"), "its own gate lets it through"
    code, loosens = review(folder)
    assert code == 1
    assert [flag for flag in loosens["flags"] if flag["holds"]] == [{"what": "gate.relative.intent.margin: 0.05 → 0.7", "holds": True}]
    assert loosens["held"][0].startswith("it alters the model and weakens its judge in one")
    assert any(reason.startswith("the base's gate says hold: intent:") for reason in loosens["held"])

    # forced in, and rolled back: no stage runs, and the earlier model answers
    lock = (folder / "dvc.lock").read_bytes()
    sh(folder, "git", "checkout", "-q", "main")
    good_lock = (folder / "dvc.lock").read_bytes()
    merge(folder, "loosens")
    assert (folder / "dvc.lock").read_bytes() == lock != good_lock
    assert ask(folder / "models/package", QUESTION)[0][0] != served[0][0]
    costs = (folder / ".dvc/tmp/trunkline/costs.jsonl").read_bytes()
    trunkline(folder, "rollback")
    assert (folder / "dvc.lock").read_bytes() == good_lock
    assert ran(sh(folder, "dvc", "repro")) == []
    assert (folder / ".dvc/tmp/trunkline/costs.jsonl").read_bytes() == costs
    assert ask(folder / "models/package", QUESTION) == served
