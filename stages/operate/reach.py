"""What git's references reach: reference -> commits -> the digests in their dvc.lock and .dvc files.

A branch, a tag or a named revision reaches all its commits, so that every one of them can be rolled back to; `history` makes that
its newest ones. A commit that is reached also reaches the champion that its params.yaml pins.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from conf.errors import ConfigError, DataError
from stages.operate.git import commit, git

PROTECTED = ("main", "master", "trunk", "production", "release/*")
"""Branches whose commits are all kept."""
LOCK, DVC_FILE, PARAMS = "dvc.lock", ".dvc", "params.yaml"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Something that keeps commits."""

    name: str
    why: str
    commits: tuple[str, ...]


@dataclass(kw_only=True)
class Reach:
    """What each commit needs; every blob of git is read once."""

    digests: dict[str, frozenset[str]] = field(default_factory=dict)
    """Blob of a dvc.lock or a .dvc file -> the digests of its outputs."""
    champions: dict[str, str] = field(default_factory=dict)
    """Blob of a params.yaml -> the revision it pins, or nothing."""

    def of(self, revision: str) -> frozenset[str]:
        """Digests of all outputs that a commit names.

        Raises:
            DataError: a dvc.lock or .dvc file of it cannot be read.
        """
        found: set[str] = set()
        for path, blob in files(revision):
            if path.rsplit("/", 1)[-1] == LOCK or path.endswith(DVC_FILE):
                if blob not in self.digests:
                    self.digests[blob] = digests(_text(blob), f"{path} of {revision[:12]}")
                found |= self.digests[blob]
        return frozenset(found)

    def champion(self, revision: str) -> str:
        """The revision that a commit's params.yaml pins; empty: none."""
        blob = next((blob for path, blob in files(revision) if path == PARAMS), "")
        if blob and blob not in self.champions:
            value = _load(_text(blob), f"{PARAMS} of {revision[:12]}")
            gate = value.get("gate") if isinstance(value, dict) else None
            pinned = gate.get("champion") if isinstance(gate, dict) else None
            self.champions[blob] = "" if pinned in (None, "", "null", "~") else str(pinned)
        return self.champions.get(blob, "")


@cache
def files(revision: str) -> list[tuple[str, str]]:
    """(path, blob) of every file of a commit."""
    listed = git("ls-tree", "-rz", revision)
    if listed.returncode:
        raise DataError(f"the files of {revision[:12]} cannot be listed: {listed.stderr.strip()}", "`git fsck`, `git fetch`")
    return [(entry.split("\t", 1)[1], entry.split()[2]) for entry in listed.stdout.split("\0") if entry]


def digests(text: str, where: str) -> frozenset[str]:
    """The digests of all outputs in the text of a dvc.lock or .dvc file, of those in git too: the run-cache restores them.

    Raises:
        DataError: it is neither.
    """
    value = _load(text, where)
    try:
        entries = list((value.get("stages") or {}).values()) if where.split(" ")[0].endswith(LOCK) else [value]
        return frozenset(_md5s([entry.get("outs") or [] for entry in entries]))
    except AttributeError as error:
        raise DataError(f"{where} cannot be read: it holds no stages with outputs", "what it reaches is unknown; `git log` names its author") from error


def _md5s(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "md5" in value:
            yield value["md5"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _md5s(item)


def _load(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=yaml.CBaseLoader)  # every value as text: a digest may be digits alone
    except yaml.YAMLError as error:
        raise DataError(f"{where} cannot be read: {' '.join(str(error).split())}", "what it reaches is unknown; `git log` names its author") from error


def _text(blob: str) -> str:
    found = git("cat-file", "blob", blob)
    if found.returncode:
        raise DataError(f"git has no object {blob}: {found.stderr.strip()}", "`git fsck`, `git fetch`")
    return found.stdout


def history(revision: str, most: int | None) -> tuple[str, ...]:
    """The commits that a revision reaches, the newest first; at most `most`."""
    return tuple(git("rev-list", *(["-n", str(most)] if most else []), revision).stdout.split())


def references(protected: Sequence[str], keep: Sequence[str], days: float, most: int | None) -> list[Reference]:
    """Everything in git that keeps commits.

    Args:
        protected: patterns of branch names.
        keep: more revisions.
        days: commits younger than this stay, whatever reference they are on.
        most: commits of each reference; None: all.

    Raises:
        ConfigError: a shallow clone, a detached HEAD, no protected branch, or no such revision.
    """
    head = commit("HEAD")
    if git("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        raise ConfigError("this clone is shallow: what its branches reach cannot be seen", "`git fetch --unshallow --tags`")
    if git("symbolic-ref", "--quiet", "HEAD").returncode:
        raise ConfigError("HEAD is detached: a clone like this often lacks the branches", "`git switch <branch>`, with all branches and tags fetched")
    branches, found = 0, [Reference(name="HEAD", why="checked out", commits=(head,))]
    for line in git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/remotes", "refs/tags").stdout.split():
        kind, name = line.removeprefix("refs/").split("/", 1)
        short = name.split("/", 1)[-1] if kind == "remotes" else name
        if kind == "tags" and git("rev-parse", "--verify", "--quiet", f"{line}^{{commit}}").returncode == 0:
            found.append(Reference(name=name, why="tag", commits=history(line, most)))
        elif kind != "tags" and any(fnmatch(short, pattern) for pattern in protected):
            branches += 1
            found.append(Reference(name=name, why="protected branch", commits=history(line, most)))
    if not branches:
        raise ConfigError(f"no branch is named {', '.join(protected)}: nothing would be protected", "`git fetch`, or name yours: --protect <pattern>")
    found += [Reference(name=name, why="--keep", commits=history(commit(name), most)) for name in keep]
    young = time.time() - days * 86400
    dated = (line.split() for line in git("rev-list", "--timestamp", "--all").stdout.splitlines())
    found.append(Reference(name="recent", why=f"younger than {days:g} days", commits=tuple(one for at, one in dated if int(at) > young)))
    return found


def champions(found: Sequence[Reference], reach: Reach) -> Reference:
    """The champions that the reached commits pin, and those that these pin.

    Raises:
        DataError: this clone has no such commit.
    """
    todo, seen = {one for reference in found for one in reference.commits}, dict[str, None]()
    known = set(todo)
    while todo:
        one = todo.pop()
        if not (pinned := reach.champion(one)):
            continue
        try:
            champion = commit(pinned)
        except ConfigError as error:
            raise DataError(f"{PARAMS} of {one[:12]} pins the champion {pinned}, which this clone lacks", "`git fetch --all --tags`") from error
        seen[champion] = None
        if champion not in known:
            known.add(champion)
            todo.add(champion)
    return Reference(name="champions", why="pinned in gate.champion", commits=tuple(seen))


def unknown_here() -> list[str]:
    """References of git's remotes that this clone does not have as they are: a commit that is here may be reached by a name that is not.

    Raises:
        DataError: a remote does not answer.
    """
    lacking = []
    for remote in git("remote").stdout.split():
        listed = git("ls-remote", "--heads", "--tags", remote)
        if listed.returncode:
            raise DataError(f"the git remote {remote} does not answer: {listed.stderr.strip()}", "its branches may reach what would be deleted: mend it first")
        pairs = [line.split("\t") for line in listed.stdout.splitlines()]
        lacking += [f"{remote} {name}" for digest, name in pairs if not name.endswith("^{}") and local(remote, name) != digest]
    return lacking


def local(remote: str, name: str) -> str:
    """What this clone has a remote's branch or tag for; empty: it does not know the name."""
    here = name if name.startswith("refs/tags/") else name.replace("refs/heads/", f"refs/remotes/{remote}/", 1)
    return git("rev-parse", "--verify", "--quiet", here).stdout.strip()


def work_tree() -> frozenset[str]:
    """Digests in the dvc.lock and .dvc files of the work tree, committed or not."""
    listed = git("ls-files", "-coz", "--exclude-standard").stdout.split("\0")
    paths = [Path(name) for name in listed if name and (name.rsplit("/", 1)[-1] == LOCK or name.endswith(DVC_FILE)) and Path(name).is_file()]
    return frozenset(digest for path in paths for digest in digests(path.read_text(encoding="utf-8"), f"{path} of the work tree"))
