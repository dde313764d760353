"""The tiny experiment by the real `dvc repro`, what a change then re-runs, what is held, and the Bento over HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkout import EVERYTHING, change, commit, ran, served, sh, working_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in a folder with a blank, with `tiny` run whole."""
    folder = working_tree(tmp_path_factory.mktemp("a checkout") / "trunkline", "tiny")
    commit(folder, "Use tiny")
    done = sh(folder, "dvc", "repro")
    assert ran(done) == EVERYTHING
    commit(folder, "Run tiny")
    return folder


@pytest.fixture
def tree(checkout: Path) -> Iterator[Path]:
    """The checkout, put back after the test to what it was, outputs included."""
    yield checkout
    sh(checkout, "git", "checkout", "-q", "--", ".")
    sh(checkout, "dvc", "checkout", "--force", "--quiet")


def test_a_second_repro_runs_nothing(tree: Path) -> None:
    lock = (tree / "dvc.lock").read_bytes()
    done = sh(tree, "dvc", "repro")
    assert ran(done) == []
    assert (tree / "dvc.lock").read_bytes() == lock
    assert sh(tree, "git", "status", "--porcelain").stdout == ""


def test_the_verdict_promotes_and_the_summary_shows_it(tree: Path) -> None:
    verdict = json.loads((tree / "models/gate/verdict.json").read_text())
    assert verdict["promote"] is True
    summary = json.loads(sh(tree, sys.executable, "-m", "stages.operate.cli", "summary", "--json").stdout)
    assert len(summary["answers"]) == 3
    assert summary["next"] == "make serve"
    # compose is no module of stages/ and keeps no cost record
    assert [cost["stage"] for cost in summary["costs"]] == EVERYTHING[1:]


def test_outs_are_all_that_the_stages_write(tree: Path) -> None:
    from tests.test_pipeline import PIPELINE, names

    outs = {tree / out for stage in PIPELINE.values() for out in names(stage.get("outs", []) + stage.get("metrics", []))}
    assert all(out.exists() for out in outs)
    written = {f for top in ("data", "models") for f in (tree / top).rglob("*") if f.is_file() and f.name != ".gitignore"}
    assert {f for f in written if not outs & {f, *f.parents} and tree / "data/raw" not in f.parents} == set()


def test_a_gate_limit_reruns_compose_gate_and_package(tree: Path) -> None:
    change(tree / "conf/gate/tiny.yaml", "limit: 0.05", "limit: 0.06")
    assert ran(sh(tree, "dvc", "repro")) == ["compose", "gate", "package"]


def test_the_learning_rate_runs_nothing_before_tune(tree: Path) -> None:
    change(tree / "conf/experiment/tiny.yaml", "learning_rate: 4.0e-03", "learning_rate: 3.9e-03")
    assert ran(sh(tree, "dvc", "repro", "tune")) == ["compose", "tune"]


@pytest.mark.parametrize("helper", ["stages/convert.py", "stages/statistics.py", "stages/pii.py"])
def test_a_helper_module_reruns_exactly_its_importers(tree: Path, helper: str) -> None:
    from tests.test_pipeline import STAGES, code

    change(tree / helper, "\n\n", "\n\n# changed\n")
    status = json.loads(sh(tree, "dvc", "status", "--json").stdout)
    touched = {stage for stage, reasons in status.items() if any(helper in reason.get("changed deps", {}) for reason in reasons if isinstance(reason, dict))}
    assert touched == {stage for stage in STAGES if helper in code(stage)}
    assert set(status) == touched


def test_a_worse_model_is_held_and_not_packaged(tree: Path) -> None:
    text = (tree / "conf/experiment/tiny.yaml").read_text()
    (tree / "conf/experiment/tiny.yaml").write_text(text.replace("epochs: 4.0", "epochs: null\n  steps: 1"), encoding="utf-8")
    before = (tree / "models/package/src").stat().st_mtime
    done = sh(tree, "dvc", "repro", check=False)
    assert done.returncode != 0
    assert ran(done)[-1] == "gate"
    assert "gate stopped" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    verdict = json.loads((tree / "models/gate/verdict.json").read_text())
    assert (verdict["outcome"], verdict["promote"]) == ("hold", False)
    assert any("support_intent" in reason for reason in verdict["reasons"])
    assert (tree / "models/package/src").stat().st_mtime == before
    summary = sh(tree, sys.executable, "-m", "stages.operate.cli", "summary")
    assert "hold" in summary.stdout


@pytest.mark.parametrize(
    ("damage", "stage", "reason"),
    [
        ("empty", "collect", "digest is not the pinned one"),
        ("truncated", "collect", "digest is not the pinned one"),
        ("poisoned", "validate", "intent-known"),
    ],
)
def test_bad_data_is_stopped_by_the_stage_that_should_stop_it(tree: Path, damage: str, stage: str, reason: str) -> None:
    tickets = tree / "data/raw/support/tickets.jsonl"
    text = tickets.read_text(encoding="utf-8")
    match damage:
        case "empty":
            tickets.write_text("")
        case "truncated":
            tickets.write_text(text[: len(text) // 2], encoding="utf-8")
        case "poisoned":  # wrong labels, and a pinned digest that somebody updated to match
            from stages.files import sha256

            before = sha256(tickets)
            label = json.loads(text.splitlines()[0])["intent"] or "order_status"
            tickets.write_text(text.replace(f'"intent": "{label}"', '"intent": "send_me_money"'), encoding="utf-8")
            change(tree / "conf/collect/support.yaml", before, sha256(tickets))
    done = sh(tree, "dvc", "repro", check=False)
    assert done.returncode != 0
    assert ran(done)[-1] == stage
    assert f"{stage} stopped" in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_bento_answers_over_http(tree: Path) -> None:
    with served(tree / "models/package") as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Where is my order? I want to know its status."}])
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        verdict = json.loads((tree / "models/gate/verdict.json").read_text())
        assert answer.system_fingerprint is not None
        assert verdict["digest"].startswith(answer.system_fingerprint.removeprefix("fp_").removeprefix("sha256:"))
