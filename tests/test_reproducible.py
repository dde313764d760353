"""The same commit gives the same bytes: in another folder, for another user, in another locale and time zone, after a revert."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from stages.files import read_json, remove
from tests.checkout import ask, commit, cut_down_tiny, environment, first_difference, merge, ran, sh, working_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NOBODY = 65534
DOWNLOADS = ".dvc/tmp/trunkline/downloads"


@dataclass(frozen=True, kw_only=True)
class Clone:
    """A clone, and the surroundings in which everything in it runs."""

    folder: Path
    env: dict[str, str]
    prefix: tuple[str, ...] = ()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return sh(self.folder, *self.prefix, *command, env=self.env)


def locale(folder: Path, name: str, charset: str) -> dict[str, str]:
    """Make a locale where the system can; else C.UTF-8."""
    if shutil.which("localedef") and not subprocess.run(["localedef", "-i", name, "-f", charset, folder / f"{name}.{charset}"], check=False).returncode:
        return {"LOCPATH": str(folder), "LC_ALL": f"{name}.{charset}", "LANG": f"{name}.{charset}"}
    return {"LC_ALL": "C.UTF-8", "LANG": "C.UTF-8"}


def another_user() -> tuple[str, ...]:
    """What runs a command as nobody, with a umask that shuts everybody else out; empty where this user cannot become another.

    This Python may lie in a folder that is closed to nobody, who is therefore let read everything.
    """
    rights = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    prefix = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *rights, "sh", "-c", 'umask 077; exec "$@"', "sh")
    try:
        tried = os.geteuid() == 0 and subprocess.run([*prefix, sys.executable, "-c", ""], env=environment(Path("/")), capture_output=True, check=False)
    except FileNotFoundError:  # no setpriv
        return ()
    return prefix if tried and tried.returncode == 0 else ()


@pytest.fixture(scope="module")
def clones() -> Iterator[tuple[Clone, Clone]]:
    """Two clones of this working tree with `tiny` and `default` cut down, in surroundings that differ in all that a machine may differ in."""
    top = Path(tempfile.mkdtemp(prefix="trunkline-clones-"))  # pytest's own folders are closed to other users
    try:
        top.chmod(0o755)
        origin = working_tree(top / "origin", "tiny")
        cut_down_tiny(origin)
        merge(origin, "default", {"select": {"probe": {"limit": 2}}, "tune": {"steps": 4, "validation_rows": 2, "evaluate_every": 2, "checkpoint_every": 2}})
        commit(origin, "Make small experiments")
        (top / "locales").mkdir()
        here, there = top / "here" / "trunkline", top / "ein Übungsordner" / "von jemand anderem"
        for folder in (here.parent, there.parent, there.parent / "home"):
            folder.mkdir()
        (there.parent / "home" / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")  # the origin is somebody else's
        first = environment(here, **locale(top / "locales", "de_DE", "ISO-8859-1"), TZ="UTC", PYTHONHASHSEED="1",
                            TRUNKLINE_WORKERS="1", OMP_NUM_THREADS="1")  # fmt: skip
        second = environment(there, **locale(top / "locales", "tr_TR", "UTF-8"), HOME=str(there.parent / "home"), TZ="Pacific/Chatham",
                             PYTHONHASHSEED="12345", TRUNKLINE_WORKERS="2", OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2", HF_HOME=str(there.parent / "hf"),
                             TMPDIR=str(there.parent / "home"), USER="somebody-else", TRUNKLINE_MIRROR=str(here / DOWNLOADS))  # fmt: skip
        prefix = another_user()
        for path in (there.parent, there.parent / "home") if prefix else ():
            os.chown(path, NOBODY, NOBODY)
        pair = Clone(folder=here, env=first), Clone(folder=there, env=second, prefix=prefix)
        for clone in pair:
            sh(top, *clone.prefix, "git", "clone", "-q", str(origin), str(clone.folder), env={**clone.env, "PYTHONPATH": ""})
        yield pair
    finally:
        remove(top)


def both(pair: tuple[Clone, Clone], *command: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in both clones at once."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda clone: clone.run(*command), pair))


def test_two_clones_of_tiny_write_the_same_lock(clones: tuple[Clone, Clone]) -> None:
    clones[0].run("dvc", "repro", "collect")  # the downloads, which are the other one's mirror
    done = both(clones, "dvc", "repro")
    assert ran(done[1])[-1] == "package"
    assert first_difference(*(clone.folder for clone in clones)) == ""
    if not clones[1].prefix:
        pytest.skip("the locks are the same; that another user writes them too, only root can try")


def test_two_clones_of_default_write_the_same_lock_up_to_tune(clones: tuple[Clone, Clone]) -> None:
    both(clones, "python", "-m", "stages.operate.cli", "use", "default")
    for clone in clones:
        assert ran(clone.run("dvc", "repro", "tune"))[-1] == "tune"
    assert first_difference(*(clone.folder for clone in clones)) == ""
    assert "adapter" in "".join(path.name for path in (clones[1].folder / "models/tune").iterdir())


QUESTIONS = ("Where is my order? I want to know its status.", "I forgot my password.", "My tent arrived torn, and I want my money back.")


def test_a_revert_brings_back_the_earlier_model_without_running_anything(tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "trunkline", symlinks=True)
    lock, params, answers = (folder / "dvc.lock").read_bytes(), (folder / "params.yaml").read_bytes(), ask(folder / "models/package", *QUESTIONS)

    merge(folder, "tiny", {"tune": {"learning_rate": 4.0e-2}})
    sh(folder, "git", "commit", "-qam", "Learn faster")
    assert ran(sh(folder, "dvc", "repro")) == ["compose", "tune", "export", "evaluate", "redteam", "gate", "package"]
    commit(folder, "Run it")
    changed = ask(folder / "models/package", *QUESTIONS)
    assert {digest for digest, _ in changed}.isdisjoint({digest for digest, _ in answers})
    assert [answer for _, answer in changed] != [answer for _, answer in answers], "both models say the same: this test would not see which one answers"

    # what a merge brought in is reverted: configuration and lock together
    sh(folder, "git", "revert", "--no-edit", "--no-commit", "HEAD~2..HEAD")
    commit(folder, "Learn as before")
    done = sh(folder, "dvc", "repro")
    assert ran(done) == []
    assert (folder / "dvc.lock").read_bytes() == lock
    assert sh(folder, "git", "status", "--porcelain").stdout == ""
    assert ask(folder / "models/package", *QUESTIONS) == answers

    # only the configuration is reverted: it is composed again, and every stage's result comes from the run-cache
    sh(folder, "git", "reset", "-q", "--hard", tip(folder, "Run it"))
    sh(folder, "dvc", "checkout")
    sh(folder, "git", "revert", "--no-edit", tip(folder, "Learn faster"))
    assert ran(sh(folder, "dvc", "repro")) == ["compose"]
    assert (folder / "dvc.lock").read_bytes() == lock
    assert (folder / "params.yaml").read_bytes() == params
    verdict, result = read_json(folder / "models/gate/verdict.json"), read_json(folder / "models/redteam/result.json")
    assert verdict["digest"] == result["digest"]
    assert verdict["digest"].startswith(answers[0][0])


def tip(folder: Path, subject: str) -> str:
    """The newest commit of this subject."""
    return sh(folder, "git", "log", "-1", "--format=%H", f"--grep=^{subject}$").stdout.strip()
