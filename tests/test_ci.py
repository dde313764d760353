"""CI for users: the files are what the hosts take, every command in them is there, forks see no secrets, and the steps work on a real clone."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from stages.operate.cli import app
from stages.operate.merge_driver import setup
from stages.operate.remerge import remerge
from tests.checkout import change, commit, ran, sh
from tests.conftest import ROOT
from tests.toy import Toy

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
ACTION = ROOT / ".github/actions/setup/action.yaml"
GITLAB = ROOT / ".gitlab-ci.yml"
SCRIPTS = sorted(path for path in (ROOT / ".ci").iterdir() if path.is_file())


@functools.cache
def load(path: Path) -> dict:
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # `on` is a word


def jobs() -> list[tuple[str, dict, dict]]:
    """(`file: name`, job, its workflow) of every job of GitHub's."""
    return [(f"{path.name}: {name}", job, load(path)) for path in WORKFLOWS for name, job in load(path)["jobs"].items()]


def commands() -> str:
    """All that is run: the scripts, the steps, GitLab's scripts; without comments."""
    steps = [step for _, job, _ in jobs() for step in job.get("steps", [])] + load(ACTION)["runs"]["steps"]
    lines = [step.get("run", "") for step in steps] + [path.read_text() for path in SCRIPTS]
    for job in load(GITLAB).values():
        for key in ("before_script", "script", "after_script"):
            lines += [job[key]] if isinstance(job.get(key), str) else job.get(key, []) if isinstance(job, dict) else []
    return "\n".join(line for text in lines for line in text.splitlines() if not line.lstrip().startswith("#"))


@pytest.mark.parametrize(
    ("schema", "files"),
    [("github-workflows", WORKFLOWS), ("github-actions", [ACTION]), ("gitlab-ci", [GITLAB])],
)
def test_the_hosts_take_them(schema: str, files: list[Path]) -> None:
    transform = ["--data-transform", "gitlab-ci"] if schema == "gitlab-ci" else []
    command = ["check-jsonschema", "--builtin-schema", f"vendor.{schema}", *transform, *map(str, files)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_sees_a_mistake(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:"))
    assert subprocess.run(["check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(broken)], check=False, capture_output=True).returncode == 1


COMMAND = r"\b(?:trunkline|stages\.operate\.cli)"
VERBS = sorted({verb for verb in re.findall(rf"{COMMAND} ([a-z][a-z-]*)", commands()) if verb != "and"})


def test_the_verbs_are_found() -> None:
    assert {"plan", "repro", "review", "champion", "remerge", "setup", "gc"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_is_there(verb: str) -> None:
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    assert verb in verbs
    known = {option for param in verbs[verb].params for option in param.opts}
    if verb != "repro":  # it takes DVC's
        used = {option for line in re.findall(rf"{COMMAND} {verb}\b([^|;\n]*)", commands()) for option in re.findall(r"(?<=[\s+])--[a-z-]+", line)}
        assert used <= known


def test_every_target_and_script_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)", commands())) <= targets
    named = set(re.findall(r"(?<![\w/])\.ci/([a-z-]+)", commands()))
    assert named == {path.name for path in SCRIPTS}, "each is called, and each call is to one"
    for path in SCRIPTS:
        assert os.access(path, os.X_OK)
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        assert "set -euo pipefail" in path.read_text()


def test_a_fork_sees_no_secrets_and_cannot_write() -> None:
    seen = 0
    for name, job, workflow in jobs():
        triggers = workflow["on"] if isinstance(workflow["on"], dict | list) else [workflow["on"]]
        assert "pull_request_target" not in triggers
        assert "workflow_run" not in triggers
        if not {"pull_request", "workflow_call"} & {*triggers}:
            continue
        gated = "head.repo.full_name == github.repository" in job.get("if", "") or "needs.review.outputs.commit != ''" in job.get("if", "")
        seen += not gated
        permissions = job.get("permissions", workflow["permissions"])
        assert gated or set(permissions.values()) == {"read"}, name
        assert gated or "secrets" not in yaml.safe_dump(job), name
        assert job.get("secrets") is None, "a called workflow inherits none"
    assert seen == 3, "check (called and callee) and plan"
    assert "$CI_MERGE_REQUEST_SOURCE_PROJECT_ID == $CI_PROJECT_ID" in load(GITLAB)["review"]["rules"][0]["if"]


def test_permissions_pins_and_limits() -> None:
    for name, job, workflow in jobs():
        assert "permissions" in job or workflow["permissions"], f"{name}: states what it may do"
        assert workflow["permissions"] in ({}, {"contents": "read"}), name
        assert "uses" in job or int(job["timeout-minutes"]) <= 350, name
        assert "${{" not in "".join(step.get("run", "") for step in job.get("steps", [])), f"{name}: a title or a branch's name must not become a command"
    text = "".join(path.read_text() for path in [*WORKFLOWS, ACTION])
    for used in re.findall(r"^ *(?:- )?uses: (\S+)", text, re.M):
        assert used.startswith("./") or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", used), used
    assert load(ROOT / ".github/workflows/pull-request.yaml")["concurrency"]["group"].endswith("${{ github.event.pull_request.number }}")


def test_a_plan_in_a_clone_with_no_cache(tmp_path: Path) -> None:
    sh(tmp_path, "git", "clone", "-q", str(ROOT), "fork")
    sh(tmp_path / "fork", "git", "checkout", "-qb", "change")
    branch = sh(ROOT, "git", "rev-parse", "HEAD").stdout.strip()
    change(tmp_path / "fork/conf/gate/support.yaml", "limit: 0.75", "limit: 0.7")
    done = sh(tmp_path / "fork", sys.executable, "-m", "stages.operate.cli", "plan", "--base", branch)
    assert re.search(r"runs +gate", done.stdout)
    assert "loosens" in done.stdout


def test_a_merge_by_lines_is_merged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(tmp_path / "toy", monkeypatch)
    (toy.folder / "conf").mkdir()
    (toy.folder / "conf/config.yaml").write_text("")
    (toy.folder / ".gitattributes").write_text("dvc.lock merge=binary\nparams.yaml merge=binary\n")
    toy.commit("Base")
    toy.git("checkout", "-qb", "side")
    toy.set({**toy.values, "b": 5})  # an odd value changes no output: both sides' entries of e differ in one line each
    toy.commit("Theirs")
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    toy.set({**toy.values, "d": 5})
    toy.commit("Ours")
    assert remerge() == [], "there is no merge"
    (toy.folder / ".git/info/attributes").write_text("dvc.lock merge\nparams.yaml merge\n")  # as a host that knows nothing of drivers
    toy.git("merge", "-q", "--no-edit", "side")
    (toy.folder / ".git/info/attributes").unlink()
    setup()
    assert "b: 5" in toy.git("show", "HEAD:dvc.lock").split("  e:\n")[1], "the host made an entry of two halves"
    assert "d: 5" in toy.git("show", "HEAD:dvc.lock").split("  e:\n")[1]
    shutil.rmtree(toy.folder / ".dvc/cache/runs")
    assert "e: both sides changed it" in remerge()[0]
    assert toy.repro() == {"e"}, "nobody ran it with both"
    toy.set({**toy.values, "e": 6})
    toy.commit("Run it, and more")
    assert remerge() == [], "what was changed after the merge stays"


@pytest.mark.slow
def test_a_pull_request_from_its_branch_to_a_release(tiny_run: Path, tmp_path: Path) -> None:
    trunk = shutil.copytree(tiny_run, tmp_path / "trunk", symlinks=True)
    sh(trunk, "dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    commit(trunk, "Keep artefacts in the store")
    sh(trunk, "dvc", "push", "--run-cache")
    sh(tmp_path, "git", "clone", "-q", "--bare", str(trunk), "origin.git")

    def clone(name: str, branch: str) -> Path:
        sh(tmp_path, "git", "clone", "-q", "-b", branch, str(tmp_path / "origin.git"), name)
        for key, value in {"user.email": "test@example.org", "user.name": "Test"}.items():
            sh(tmp_path / name, "git", "config", key, value)
        return tmp_path / name

    author = clone("author", "main")
    sh(author, "git", "checkout", "-qb", "looser")
    change(author / "conf/gate/tiny.yaml", "canary_leaks, direction: at_most, limit: 0.0", "canary_leaks, direction: at_most, limit: 0.5")
    commit(author, "Let a leak pass")
    sh(author, "git", "push", "-q", "origin", "looser")
    runner = clone("runner", "looser")
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(runner),
        "BASE": "main",
        "BRANCH": "looser",
        "OUT": "out",
    }
    done = sh(runner, ".ci/pull-request", check=False, env=env)
    assert ran(done) == ["compose", "gate", "package"], done.stdout + done.stderr
    made = (runner / "out/commit").read_text().strip()
    assert made == sh(tmp_path / "origin.git", "git", "rev-parse", "looser").stdout.strip(), "the results are on the branch"
    assert sh(runner, "git", "log", "-1", "--format=%s").stdout.strip() == "Record what the pipeline made"
    assert done.returncode == 0, done.stdout + done.stderr
    told = (runner / "out/review.md").read_text()
    assert "May be merged" in told
    assert "gate.absolute.leaks.limit: 0 → 0.5" in told, "it loosens the gate, and that is said; the model is the same"

    sh(author, "git", "checkout", "-qb", "other", "main")
    change(author / "conf/experiment/tiny.yaml", "learning_rate: 0.004", "learning_rate: 0.003")
    commit(author, "Lower the learning rate")
    sh(author, "git", "push", "-q", "origin", "other")
    runner = clone("other-runner", "other")
    done = sh(runner, ".ci/pull-request", check=False, env={**env, "PYTHONPATH": str(runner), "BRANCH": "other"})
    base = sh(trunk, "git", "rev-parse", "main").stdout.strip()
    assert f"champion: {base}" in sh(tmp_path / "origin.git", "git", "show", "other:conf/gate/tiny.yaml").stdout, "it is judged beside what trunk serves"
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the base's gate says inconclusive: intent: support\\_intent: too few rows to tell" in (runner / "out/review.md").read_text()

    sh(trunk, "git", "pull", "-q", str(tmp_path / "origin.git"), "looser")
    sh(trunk, "git", "push", "-q", str(tmp_path / "origin.git"), "main")
    deploy = clone("deploy", "main")
    env = {**env, "PYTHONPATH": str(deploy)}
    done = sh(deploy, ".ci/deploy", env=env)
    assert re.search(r":[0-9a-f]{16} of [0-9a-f]{7}", done.stdout)
    assert sh(tmp_path / "origin.git", "git", "tag").stdout.startswith("release-")
    change(deploy / "conf/gate/tiny.yaml", "canary_leaks, direction: at_most, limit: 0.5", "canary_leaks, direction: at_most, limit: 0.4")
    sh(deploy, "python", "-m", "conf", env=env)
    refused = sh(deploy, ".ci/deploy", check=False, env=env)
    assert refused.returncode == 1
    assert "dvc.lock is not what this commit makes" in refused.stderr
