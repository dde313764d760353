"""`trunkline repro`, on a pipeline of two steps with the real DVC: waits, says for whom, and mends what a kill of DVC left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from dvc.schema import COMPILED_LOCKFILE_SCHEMA

from stages.operate.holders import LOCKS, alive, holders
from stages.operate.mend import is_whole
from tests.conftest import ROOT

PIPELINE = """
stages:
  one: {cmd: "while [ -e hold ]; do sleep 0.1; done; cp in one", deps: [in], outs: [one]}
  two: {cmd: cp one two, deps: [one], outs: [two]}
"""
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}
OURS = (sys.executable, "-m", "stages.operate.cli", "repro")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").touch()
    (tmp_path / "in").write_text("x")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, "dvc", "init", "-q")
    run(tmp_path, "dvc", "config", "core.check_update", "false")  # as here: its daemon would outlive the command
    return tmp_path


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(folder: Path, *command: str) -> tuple[int, str]:
    """Exit code and what it printed."""
    process = start(folder, *command)
    said = process.communicate(timeout=60)[0]
    return process.returncode, said


def running(folder: Path, *command: str) -> subprocess.Popen[str]:
    """A repro in the middle of its first stage, for as long as there is a file `hold`."""
    (folder / "hold").touch()
    process = start(folder, *command)
    while not (folder / ".dvc/tmp/rwlock").exists() or not json.loads((folder / ".dvc/tmp/rwlock").read_text() or "{}").get("write"):
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("first", [("dvc", "repro"), OURS])
def test_the_second_waits_and_says_for_whom(checkout: Path, first: tuple[str, ...]) -> None:
    process = running(checkout, *first)
    code, said = run(checkout, "dvc", "repro")
    assert code != 0
    assert f"(PID {process.pid})" in said, "DVC names the process while a stage runs"
    second = start(checkout, *OURS)
    assert second.stdout is not None
    assert second.stdout.readline() == f"waiting for process {process.pid}, which runs this pipeline\n"
    assert second.poll() is None
    (checkout / "hold").unlink()
    assert "Running stage 'two'" in process.communicate(timeout=60)[0]
    said = second.communicate(timeout=60)[0]
    assert (process.returncode, second.returncode) == (0, 0)
    assert "Data and pipelines are up to date." in said


def test_its_arguments_and_exit_code_are_those_of_dvc(checkout: Path) -> None:
    assert run(checkout, *OURS, "--single-item", "one")[0] == 0
    assert not (checkout / "two").exists()
    (checkout / "in").unlink()
    assert run(checkout, *OURS)[0] == run(checkout, "dvc", "repro")[0] != 0


@pytest.mark.parametrize(("cut", "dvc_says"), [(b"outs", "is invalid"), (b"- path:", "validation failed"), (b"size: ", "validation failed")])
def test_half_a_lock_file_is_mended_and_what_was_done_is_not_done_again(checkout: Path, cut: bytes, dvc_says: str) -> None:
    run(checkout, "dvc", "repro")
    lock = checkout / "dvc.lock"
    whole = lock.read_bytes()
    lock.write_bytes(whole[: whole.rindex(cut) + len(cut)])
    assert dvc_says in run(checkout, "dvc", "repro")[1], "DVC can read it by now: then there is nothing to mend"
    code, said = run(checkout, *OURS)
    assert code == 0
    assert "dvc.lock was half-written" in said
    assert "Running stage" not in said
    assert lock.read_bytes() == whole


def test_wherever_a_lock_file_is_cut_it_is_removed_or_what_dvc_takes_from_it_is_true(checkout: Path) -> None:
    run(checkout, "dvc", "repro")
    lock = checkout / "dvc.lock"
    text = lock.read_text()
    whole, taken = yaml.safe_load(text)["stages"], set[str]()
    for length in range(len(text)):
        lock.write_text(text[:length])
        if not is_whole(lock):
            continue
        cut = COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(text[:length]))["stages"]
        for name, stage in cut.items():
            assert stage["cmd"] == whole[name]["cmd"]
            for kind in ("deps", "outs"):
                entries = stage.get(kind, [])
                for entry, true in zip(entries, whole[name][kind], strict=False):
                    assert entry in (true, {"path": true["path"]}), "one without a digest is not what was made, and DVC makes it"
        taken.add(text[:length].splitlines()[-1].strip())
    assert len(taken) < len(text.splitlines()) / 3, taken
    lock.write_text(text)
    assert is_whole(lock)


@pytest.mark.parametrize(
    "rest",
    [
        "stages: {}",
        "stages: {a: {cmd: x}}",
        "stages: {a: {cmd: [x, y]}}",
        "stages: {a: {cmd: x, params: {params.yaml: {}}}}",
        "stages: {a: {cmd: x, params: {params.yaml: {b: null, c: ''}}}}",
        "stages: {a: {cmd: x, deps: [{path: s3://b/c, etag: abcdef, size: 3}]}}",
        "stages: {a: {cmd: x, deps: [{path: s3://b/c, hash: md5, etag: abcdef, size: 3}]}}",
        "stages: {a: {cmd: x, outs: [{path: b, hash: md5, files: [{relpath: c, md5: abcdef, size: 3}]}]}}",
        "stages: {a: {cmd: x, outs: [{path: b, md5: abcdef, size: 3, isexec: true}]}}",
        "stages: {a: {cmd: x, outs: [{path: b}]}}",
    ],
)
def test_no_form_of_a_whole_lock_file_is_called_half(tmp_path: Path, rest: str) -> None:
    COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(f"schema: '2.0'\n{rest}"))
    (tmp_path / "dvc.lock").write_text(f"schema: '2.0'\n{yaml.safe_dump(yaml.safe_load(rest))}")
    assert is_whole(tmp_path / "dvc.lock")


def test_instead_of_half_a_lock_file_the_one_of_before_comes_back(checkout: Path) -> None:
    run(checkout, *OURS)
    lock = checkout / "dvc.lock"
    lines = lock.read_text().splitlines(keepends=True)
    order = "".join([*lines[:2], *lines[lines.index("  two:\n") :], *lines[2 : lines.index("  two:\n")]])  # as a merge may leave them, which DVC keeps
    lock.write_text(order)
    assert run(checkout, *OURS)[0] == 0
    lock.write_text(order[: len(order) // 2])
    code, said = run(checkout, *OURS)
    assert (code, lock.read_text()) == (0, order)
    assert "dvc.lock was half-written when DVC was killed, and is again what it was" in said
    (checkout / ".dvc/tmp/trunkline/dvc.lock").unlink()
    run(checkout, "git", "add", "-A")
    run(checkout, "git", "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x")
    lock.write_text(order[: len(order) // 2])
    assert "is again what it was" in run(checkout, *OURS)[1]
    assert lock.read_text() == order


def test_what_was_committed_since_counts_for_more_than_the_copy(checkout: Path) -> None:
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@example.org")
    run(checkout, *git, "add", "-A")
    run(checkout, *git, "commit", "-qm", "Before")
    run(checkout, *OURS)
    (checkout / "in").write_text("y")
    run(checkout, "dvc", "repro")
    run(checkout, *git, "add", "-A")
    run(checkout, *git, "commit", "-qm", "Another's run")
    lock = checkout / "dvc.lock"
    whole = lock.read_text()
    shutil.rmtree(checkout / ".dvc/cache/runs")  # it was made elsewhere
    lock.write_text(whole[: len(whole) // 2])
    code, said = run(checkout, *OURS)
    assert (code, lock.read_text()) == (0, whole)
    assert "Running stage" not in said


def test_a_conflict_in_a_lock_file_is_told_and_stays(checkout: Path) -> None:
    run(checkout, *OURS)
    lock = checkout / "dvc.lock"
    lock.write_text(text := f"<<<<<<< ours\n{lock.read_text()}=======\n>>>>>>> theirs\n")
    code, said = run(checkout, *OURS)
    assert (code, lock.read_text()) == (1, text)
    assert "dvc.lock has git's marks of a conflict" in said
    assert "Traceback" not in said


def test_half_a_params_file_is_removed(checkout: Path) -> None:
    (checkout / "params.yaml").write_text("a: {b: 'c")
    assert run(checkout, "dvc", "repro")[0] != 0
    code, said = run(checkout, *OURS)
    assert code == 0, said
    assert "params.yaml was half-written" in said


def test_what_dvc_was_copying_is_removed(checkout: Path) -> None:
    (checkout / "models/a").mkdir(parents=True)
    copying, mine = checkout / "models/a/.Ab3-_6789012345678901x.tmp", checkout / "models/a/.mine.tmp"
    copying.touch()
    mine.touch()
    run(checkout, *OURS)
    assert (copying.exists(), mine.exists()) == (False, True)


def test_what_dvc_keeps_is_ignored_again_after_a_stage_failed(checkout: Path) -> None:
    (checkout / "dvc.yaml").write_text(PIPELINE.replace("cmd: cp one two", "cmd: test -e ready && cp one two"))
    assert run(checkout, *OURS)[0] != 0
    assert not (checkout / ".gitignore").exists(), "DVC leaves it by now: then there is nothing to mend"
    (checkout / "ready").touch()
    assert run(checkout, *OURS)[0] == 0
    assert run(checkout, "git", "check-ignore", "one", "two")[1].split() == ["one", "two"]


def test_a_stage_whose_dvc_was_killed_is_waited_for(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    (checkout / "toy.py").write_text(
        "import sys, time\nfrom stages.run import running\nwith running('toy'):\n    print('at work', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "toy.py"], env=ENVIRONMENT, stdout=subprocess.PIPE) as stage:
        assert stage.stdout is not None
        stage.stdout.readline()
        assert list(holders()) == [stage.pid]
        second = start(checkout, *OURS)
        assert second.stdout is not None
        assert second.stdout.readline() == f"waiting for process {stage.pid}, which runs this pipeline\n"
        stage.kill()
    second.communicate(timeout=60)
    assert second.returncode == 0
    assert list(holders()) == []


def test_half_a_list_of_locks_is_mended(checkout: Path) -> None:
    run(checkout, "dvc", "repro")
    (checkout / ".dvc/tmp/rwlock").write_text('{"write": {"')
    (checkout / "in").write_text("y")
    assert "corrupted" in run(checkout, "dvc", "repro")[1]
    code, said = run(checkout, *OURS)
    assert code == 0
    assert ".dvc/tmp/rwlock was half-written" in said


@pytest.mark.parametrize("shared", [False, True], ids=["own cache", "shared cache"])
def test_half_an_entry_of_the_run_cache_is_mended(checkout: Path, tmp_path: Path, shared: bool) -> None:
    cache = tmp_path / ("elsewhere" if shared else ".dvc/cache")
    if shared:
        run(checkout, "dvc", "cache", "dir", str(cache))
    run(checkout, "dvc", "repro")
    for entry in [path for path in (cache / "runs").glob("*/*/*")]:
        whole = entry.read_bytes()
        entry.with_name(".cut.tmp").write_bytes(whole[: whole.index(b"outs:")])
    (checkout / "dvc.lock").unlink()
    assert "ERROR: failed to reproduce 'one': 'outs'" in run(checkout, "dvc", "repro")[1], "DVC passes it over by now: then there is nothing to mend"
    code, said = run(checkout, *OURS)
    assert code == 0
    assert said.count(".cut.tmp was half-written when DVC was killed") == 2
    assert said.count("is cached - skipping run") == 2
    assert not list((cache / "runs").glob("*/*/*.tmp"))


@pytest.mark.parametrize("left", [[".cut.tmp"], []], ids=["its only entry half", "no entry"])
def test_a_folder_of_the_run_cache_without_an_entry_is_removed(checkout: Path, left: list[str]) -> None:
    run(checkout, "dvc", "repro")
    for entry in (checkout / ".dvc/cache/runs").glob("*/*/*"):
        entry.unlink()
        for name in left:
            entry.with_name(name).write_text("cmd: cp")
    (checkout / "dvc.lock").unlink()
    assert run(checkout, "dvc", "repro")[0] != 0, "DVC passes it over by now: then there is nothing to mend"
    code, said = run(checkout, *OURS)
    assert (code, said.count("Running stage")) == (0, 2), said


def test_a_killed_process_whose_number_another_one_has_holds_nothing(checkout: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    entry = {"pid": other.pid, "cmd": "/nowhere/bin/dvc repro"}
    (checkout / ".dvc/tmp").mkdir(exist_ok=True)
    (checkout / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(checkout / "one"): entry}, "read": {}}))
    assert "is busy" in run(checkout, "dvc", "repro")[1]
    code, said = run(checkout, *OURS)
    other.kill()
    other.wait()
    assert code == 0
    assert "waiting" not in said


def test_a_process_that_began_after_the_list_of_locks_is_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    LOCKS.parent.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc"]) as process:
        while not psutil.Process(process.pid).cmdline():
            time.sleep(0.01)
        LOCKS.write_text("{}")
        assert alive({"pid": process.pid})
        os.utime(LOCKS, (1, 1))  # a container began again, and counts its processes anew
        assert not alive({"pid": process.pid})
        process.kill()


@pytest.mark.parametrize(("named", "expected"), [("dvc", True), ("other", False), ("dvc-demo/x", False), ("bin/dvc", True)])
def test_only_dvc_counts_as_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, expected: bool) -> None:
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", named, "repro"]) as process:
        while not psutil.Process(process.pid).cmdline():  # while it becomes that program it has none
            time.sleep(0.01)
        assert alive({"pid": process.pid, "cmd": "dvc repro"}) is expected
        process.kill()
    assert not alive({"pid": process.pid, "cmd": "dvc repro"})
