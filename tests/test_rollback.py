"""`trunkline rollback`: what comes back is proven before the commit, restored without running, and what cannot be is told."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import ConfigError, DataError
from stages.operate.rollback import rollback
from tests.toy import Toy

OUTPUTS_IN_THREE_FOLDERS = """
stages:
  a: {cmd: mkdir -p m1 && echo 1 > m1/x, outs: [m1/x]}
  b: {cmd: mkdir -p m2 && echo 2 > m2/x, outs: [m2/x]}
  c: {cmd: mkdir -p m3 && echo 3 > m3/x, outs: [m3/x]}
"""
KILLED_IN_THE_INDEX = """
import os
from sqltrie.sqlite.sqlite import SQLiteTrie
real, left = SQLiteTrie.__setitem__, [None, None]
def killed(self, key, value):
    if str(self._path).endswith("db.db"):
        left.pop() if left else os.kill(os.getpid(), 9)
    real(self, key, value)
SQLiteTrie.__setitem__ = killed
from dvc.api import DVCFileSystem
DVCFileSystem(".", rev="HEAD").read_text("m3/x", encoding="utf-8")
"""
READ = """
from dvc.api import DVCFileSystem
from stages.intact import forget_index
files = DVCFileSystem(".", rev="HEAD")
{forget}print(files.read_text("m3/x", encoding="utf-8"))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """Three commits: `good`, `other` (another value of e), `bad` (another of b)."""
    toy = Toy(tmp_path / "toy", monkeypatch)
    toy.commit("Good")
    toy.git("tag", "good")
    toy.set({**toy.values, "e": 6})
    toy.commit("Other")
    toy.git("tag", "other")
    toy.set({**toy.values, "b": 6})
    toy.commit("Bad")
    yield toy


def state(toy: Toy) -> dict[str, bytes]:
    return {
        str(p.relative_to(toy.folder)): p.read_bytes()
        for name in ("out", "dvc.lock", "params.yaml")
        for p in [toy.folder / name, *(toy.folder / name).rglob("*")]
        if p.is_file()
    }


def test_the_last_commit_is_taken_back_with_its_outputs_and_no_stage_runs(toy: Toy) -> None:
    toy.git("checkout", "-q", "other")
    toy.dvc("checkout")
    earlier = state(toy)
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    assert state(toy) != earlier
    toy.log.write_text("")
    done = rollback()
    assert toy.log.read_text() == ""
    assert state(toy) == earlier
    assert toy.git("rev-parse", "HEAD") == done.commit
    assert toy.git("log", "-1", "--format=%s") == 'Revert "Bad"'
    assert toy.git("rev-parse", "HEAD^{tree}") == toy.git("rev-parse", "other^{tree}")
    assert toy.repro() == set()


def test_one_that_was_interrupted_after_its_commit_is_ended_by_the_next(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.git("checkout", "-q", "other")
    toy.dvc("checkout")
    earlier = state(toy)
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")

    def killed() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.operate.rollback.restore", killed)
        rollback()
    assert state(toy) != earlier
    made = toy.git("rev-parse", "HEAD")
    assert rollback().commit == made == toy.git("rev-parse", "HEAD"), "not a second one, which would bring the bad state back"
    assert state(toy) == earlier
    assert rollback().commit != made, "it is over"


def test_what_a_killed_dvc_had_read_of_its_outputs_is_not_taken_for_all(toy: Toy) -> None:
    toy.dvc("config", "core.site_cache_dir", str(toy.folder.parent / "site"))
    (toy.folder / "dvc.yaml").write_text(OUTPUTS_IN_THREE_FOLDERS)
    toy.commit("Keep the index here")
    assert subprocess.run([sys.executable, "-c", KILLED_IN_THE_INDEX], check=False).returncode == -signal.SIGKILL
    read = [sys.executable, "-c", READ.format(forget="")]
    assert "FileNotFoundError" in subprocess.run(read, check=False, capture_output=True, text=True).stderr, (
        "DVC reads all by now: then there is nothing to forget"
    )
    read = [sys.executable, "-c", READ.format(forget="forget_index(files.repo); ")]
    assert subprocess.run(read, check=False, capture_output=True, text=True).stdout.strip() == "3"


def test_a_tag_comes_back_whole(toy: Toy) -> None:
    rollback(to="good")
    assert toy.git("rev-parse", "HEAD^{tree}") == toy.git("rev-parse", "good^{tree}")
    assert toy.git("rev-list", "--count", "HEAD") == "4", "one commit more: nothing of the history is gone"
    assert toy.repro() == set()


def test_several_commits_are_taken_back_in_one(toy: Toy) -> None:
    rollback(["good..HEAD"])
    assert toy.git("log", "-1", "--format=%s") == "Revert 2 commits"
    assert toy.git("rev-parse", "HEAD^{tree}") == toy.git("rev-parse", "good^{tree}")


def test_a_merge_is_taken_back_to_its_first_parent(toy: Toy) -> None:
    toy.git("checkout", "-q", "-b", "side", "other")
    (toy.folder / "code_c.txt").write_text("side\n")
    toy.commit("Side")
    toy.git("checkout", "-q", "-B", "main", "other")
    toy.git("merge", "-q", "--no-ff", "-m", "Merge side", "side")
    toy.dvc("checkout")
    rollback()
    assert toy.git("rev-parse", "HEAD^{tree}") == toy.git("rev-parse", "other^{tree}")
    assert toy.repro() == set()


def test_a_conflict_is_told_and_nothing_changes(toy: Toy) -> None:
    toy.set({**toy.values, "b": 9})
    toy.commit("Later")
    head, before = toy.git("rev-parse", "HEAD"), state(toy)
    with pytest.raises(DataError, match=r"later commits changed the same lines of .*dvc\.lock") as told:
        rollback(["HEAD^"])
    assert "--to" in told.value.remedy
    assert (toy.git("rev-parse", "HEAD"), state(toy)) == (head, before)
    assert toy.git("worktree", "list").count("\n") == 0, "the second work tree is gone"


def test_what_is_kept_nowhere_is_named_before_anything_changes(toy: Toy) -> None:
    toy.git("checkout", "-q", "other")
    listing = next(line.split()[-1] for line in (toy.folder / "dvc.lock").read_text().split("out/b\n")[1].splitlines() if "md5: " in line and ".dir" in line)
    toy.git("checkout", "-q", "main")
    (toy.folder / ".dvc/cache/files/md5" / listing[:2] / listing[2:]).unlink()
    head, before = toy.git("rev-parse", "HEAD"), state(toy)
    with pytest.raises(DataError, match=rf"out/b  {listing}"):
        rollback()
    assert (toy.git("rev-parse", "HEAD"), state(toy)) == (head, before)


def test_a_damaged_object_counts_as_absent_and_comes_from_the_remote(toy: Toy) -> None:
    toy.dvc("remote", "add", "--local", "-d", "store", str(toy.folder.parent / "store"))
    toy.git("checkout", "-q", "good")
    toy.dvc("checkout")
    toy.dvc("push")
    good = state(toy)
    toy.git("checkout", "-q", "main")
    toy.dvc("checkout")
    damaged = sorted(path for path in (toy.folder / ".dvc/cache/files").rglob("*") if path.is_file())
    for path in damaged:  # as a disk does it: the file stays read-only, which DVC takes for whole
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1])
        path.chmod(0o444)
    with pytest.raises(DataError, match="neither in the cache nor on the remote"):
        rollback(to="other")  # its last stage was never pushed
    assert rollback(to="good", dry_run=True).fetch > 0
    assert state(toy) != good
    rollback(to="good")
    assert state(toy) == good


def test_a_dry_run_changes_nothing(toy: Toy) -> None:
    head, before = toy.git("rev-parse", "HEAD"), state(toy)
    found = rollback(dry_run=True)
    assert found.commit is None
    assert found.objects == 5
    assert (toy.git("rev-parse", "HEAD"), state(toy)) == (head, before)


def test_what_cannot_be_meant_is_told(toy: Toy) -> None:
    with pytest.raises(ConfigError, match="nothing to roll back"):
        rollback(to="HEAD")
    toy.git("branch", "stranger", toy.git("commit-tree", "HEAD^{tree}", "-m", "Stranger"))
    with pytest.raises(ConfigError, match="is not part of HEAD"):
        rollback(["stranger"])
    toy.set({**toy.values, "a": 7})
    with pytest.raises(ConfigError, match=r"1 tracked files have uncommitted changes \(params\.yaml\)"):
        rollback()


def test_what_was_before_is_missing_in_a_shallow_clone_and_at_the_first_commit(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = toy.git("rev-list", "--max-parents=0", "HEAD")
    with pytest.raises(ConfigError, match="is the first commit"):
        rollback([first])
    toy.git("clone", "-q", "--depth", "1", f"file://{toy.folder}", str(tmp_path / "shallow"))
    monkeypatch.chdir(tmp_path / "shallow")
    with pytest.raises(ConfigError, match=r"it is shallow\n.*git fetch --unshallow"):
        rollback()
