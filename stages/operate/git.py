"""What the verbs ask git: a revision's commit, and a file as it was there."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.errors import ConfigError, DataError

DRIVER = "binary"
"""Merge driver of the files that the pipeline writes, as .gitattributes names it. It is git's own for what cannot be merged by lines, so
that a clone which was not set up gets a conflict."""


def git(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run git here, with `given` as its input.

    Raises:
        ConfigError: git is not installed.
    """
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, input=given)
    except FileNotFoundError as error:
        raise ConfigError("git is not installed", "install git: a revision is what every verb speaks of") from error


def commit(revision: str) -> str:
    """The full digest of a revision.

    Raises:
        ConfigError: this is no git repository, or it has no such commit; a shallow clone is told as such.
    """
    if git("rev-parse", "--git-dir").returncode:
        raise ConfigError(f"{Path.cwd()} is no git repository", "run it in a clone")
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        shallow = git("rev-parse", "--is-shallow-repository").stdout.strip() == "true"
        remedy = "this clone is shallow: `git fetch --unshallow`" if shallow else "`git fetch`, or name a branch, tag or commit that `git log --all` shows"
        raise ConfigError(f"there is no commit {revision!r}", remedy)
    return found.stdout.strip()


def file_at(revision: str, path: str) -> str | None:
    """A file's text at a revision; None: it was not there."""
    found = git("show", f"{revision}:{path}")
    return found.stdout if found.returncode == 0 else None


@contextmanager
def spare_tree(revision: str = "HEAD") -> Iterator[Path]:
    """A second work tree of a revision in a temporary folder, so that what is done there leaves this one as it is.

    Raises:
        DataError: git cannot make one.
    """
    git("worktree", "prune")  # of those that were killed
    with tempfile.TemporaryDirectory(prefix="trunkline-") as folder:
        path = Path(folder) / "tree"
        made = git("worktree", "add", "--quiet", "--detach", str(path), revision)
        if made.returncode:
            raise DataError(f"git cannot make a second work tree: {made.stderr.strip()}", "free some disk space, or see `git worktree list`")
        try:
            yield path
        finally:
            git("worktree", "remove", "--force", str(path))
