"""`trunkline repro`, on a pipeline of two steps with the real DVC: waits, says for whom, and mends what a kill of DVC left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from dvc.schema import COMPILED_LOCKFILE_SCHEMA

from stages.operate.repro import alive, is_whole
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
                assert entries == whole[name][kind][: len(entries)]
        taken.add(text[:length].splitlines()[-1].strip())
    assert len(taken) < len(text.splitlines()) / 3, taken
    lock.write_text(text)
    assert is_whole(lock)


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


@pytest.mark.parametrize(("named", "expected"), [("dvc", True), ("other", False)])
def test_only_dvc_counts_as_alive(named: str, expected: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", named, "repro"]) as process:
        while not psutil.Process(process.pid).cmdline():  # while it becomes that program it has none
            time.sleep(0.01)
        assert alive({"pid": process.pid, "cmd": "dvc repro"}) is expected
        process.kill()
    assert not alive({"pid": process.pid, "cmd": "dvc repro"})
