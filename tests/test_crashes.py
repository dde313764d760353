"""Killed, out of disk, cut off, interrupted, started twice, tampered with: `dvc repro` then ends where an undisturbed run does.

A cut-down `tiny` (fewer steps and rows, changed in the test's own checkout) is run undisturbed once, for its lock and for how long each
stage takes. The moments of the kills are drawn from TRUNKLINE_SEED, which is printed.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from tests.test_end_to_end import EVERYTHING, change, ran, sh, working_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS = 5
"""Of each stage."""
RESUMED = "going on from checkpoint-"
SMALLER = [
    ("conf/select/made.yaml", "steps: 120", "steps: 6"),
    ("conf/select/made.yaml", "limit: 24", "limit: 4"),
    ("conf/experiment/tiny.yaml", "epochs: 4.0", "epochs: null\n  steps: 12\n  checkpoint_every: 2"),
    ("conf/experiment/tiny.yaml", "per_source: 6", "per_source: 1"),
    ("conf/evaluate/tiny.yaml", "limit: 40", "limit: 4"),
    ("conf/evaluate/tiny.yaml", "slice_by: label", "slice_by: label\n    limit: 8"),
    ("conf/gate/tiny.yaml", "limit: 0.5", "limit: 0.0"),  # after twelve steps no model is good
    ("conf/gate/tiny.yaml", "limit: 0.3", "limit: -1.0"),
    ("conf/gate/tiny.yaml", "at_most, limit: 0.3", "at_most, limit: 1.0"),
    ("conf/gate/tiny.yaml", "limit: 0.05", "limit: 1.0"),
]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A checkout that ran undisturbed."""

    folder: Path
    lock: bytes
    seconds: dict[str, float] = field(default_factory=dict)
    """Of `dvc repro` of each stage, start-up and commit included."""


def small_tiny(folder: Path) -> Path:
    """A repository with the cut-down `tiny`, committed, nothing run."""
    working_tree(folder, "tiny")
    for file, old, new in SMALLER:
        change(folder / file, old, new)
    sh(folder, "git", "add", "-A")
    sh(folder, "git", "commit", "-qm", "Use a small tiny")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = small_tiny(tmp_path_factory.mktemp("undisturbed") / "trunkline")
    seconds = {}
    for stage in EVERYTHING:
        started = time.monotonic()
        assert ran(sh(folder, "dvc", "repro", stage)) == [stage]
        seconds[stage] = time.monotonic() - started
    sh(folder, "git", "add", "-A")
    sh(folder, "git", "commit", "-qm", "Run it")
    return Reference(folder=folder, lock=(folder / "dvc.lock").read_bytes(), seconds=seconds)


@pytest.fixture
def tree(reference: Reference, tmp_path: Path) -> Path:
    """A copy of the undisturbed checkout with a cache of its own."""
    return Path(shutil.copytree(reference.folder, tmp_path / "trunkline", symlinks=True))


def start(folder: Path, *command: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder), **environment}
    return subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def stage_process(dvc: int) -> psutil.Process | None:
    """The process of the stage that a `dvc repro` is running."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(dvc).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                line = child.cmdline()
                if "-m" in line and line[line.index("-m") + 1].startswith(("stages.", "conf")):
                    return child
    return None


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that still work in a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(" ".join(process.cmdline()))
    return found


def locked_stages(folder: Path) -> list[str]:
    """The stages in dvc.lock, in its order; none where it is missing or no YAML."""
    try:
        return list((yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8")) or {}).get("stages", {}))
    except (FileNotFoundError, yaml.YAMLError):
        return []


def recover(folder: Path, stage: str) -> str:
    """Put dvc.lock right, as the README says, when the kill of DVC cut it short; returns what was needed."""
    before = EVERYTHING[: EVERYTHING.index(stage)]
    if locked_stages(folder)[: len(before)] == before:
        return "nothing"
    done = sh(folder, "dvc", "repro", before[-1], check=False)
    if done.returncode == 0:
        assert set(ran(done)) <= {"compose", stage}, "what had been done came from the cache"
        return "dvc repro"
    assert "dvc.lock" in done.stderr
    (folder / "dvc.lock").unlink()
    assert set(ran(sh(folder, "dvc", "repro", before[-1]))) <= {"compose", stage}
    return "rm dvc.lock, dvc repro"


def kill_during(folder: Path, stage: str, seconds: float, draw: random.Random) -> Counter[str]:
    """Run a stage by DVC and kill it KILLS times, in turn with DVC and alone; then let it finish. Counts who was killed and what was seen."""
    seen: Counter[str] = Counter()
    while seen["group"] + seen["stage"] < KILLS:
        alone, after = (seen["group"] + seen["stage"]) % 2 == 1, draw.uniform(0.0, seconds)
        process = start(folder, "dvc", "repro", "--force", "--single-item", stage)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            victim = stage_process(process.pid) if alone else None
            if victim is None:  # or there is none: DVC starts up, or commits
                os.killpg(process.pid, signal.SIGKILL)
            else:
                victim.kill()
            whom = "group" if victim is None else "stage"
            said = process.communicate()[0]
            assert "Traceback" not in said
            needed = recover(folder, stage)
            sys.stdout.write(f"{stage}: {whom} killed after {after:.2f} s; to recover: {needed}\n")
            seen.update([whom, needed, *(["resumed"] if RESUMED in said else [])])
        else:  # it was quicker
            said = process.communicate()[0]
            assert process.returncode == 0, said
    done = sh(folder, "dvc", "repro", stage)
    seen.update(["resumed"] if RESUMED in done.stdout + done.stderr else [])
    return seen


def check_recovered(folder: Path, reference: Reference) -> None:
    """The checkout is what an undisturbed one is: lock, outputs, files in git, scratch; and nothing runs in it."""
    sh(folder, "dvc", "repro")
    assert (folder / "dvc.lock").read_bytes() == reference.lock
    assert sh(folder, "dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    sh(folder, "git", "add", "-A")
    names = sh(folder, "git", "diff", "--cached", "--name-only", "HEAD").stdout.split()
    assert names == sh(reference.folder, "git", "diff", "--name-only", "HEAD~", "HEAD").stdout.split()
    assert scratch_left(folder) == scratch_left(reference.folder), "what killed runs left was swept"
    assert left_running(folder) == []


def test_fifty_kills_leave_the_lock_of_an_undisturbed_run(reference: Reference, tmp_path: Path) -> None:
    seed = int(os.environ.get("TRUNKLINE_SEED") or secrets.randbelow(2**32))
    sys.stdout.write(f"TRUNKLINE_SEED={seed}\n")
    draw, folder, seen = random.Random(seed), small_tiny(tmp_path / "trunkline"), Counter[str]()
    for stage in EVERYTHING:
        seen += kill_during(folder, stage, reference.seconds[stage], draw)
    sys.stdout.write(f"{dict(seen)}\n")
    assert seen["group"] + seen["stage"] >= 50
    assert min(seen["group"], seen["stage"]) >= 10
    assert seen["resumed"] > 0
    check_recovered(folder, reference)


def scratch_left(folder: Path) -> set[str]:
    """What lies in the scratch folder and beside outputs."""
    found = {path.relative_to(folder).as_posix() for path in (folder / ".dvc/tmp/trunkline").iterdir()}
    return found | {path.relative_to(folder).as_posix() for top in ("data", "models") for path in (folder / top).rglob("*.partial")}
