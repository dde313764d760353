"""`trunkline rollback`: bring an earlier state back, weights included, in one commit that is proven before it is made.

Configuration, code, params.yaml and dvc.lock go back together, for git holds them in one tree. Before the commit, every object that
the tree's dvc.lock names is looked up in the cache and on the remote; one that is nowhere stops the rollback. No stage runs. One that was
interrupted after its commit is ended by the next, whatever that is asked: to take back the newest commit would bring the bad state again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from conf.errors import ConfigError, DataError
from stages.files import read_json, remove, write_json
from stages.intact import forget_index
from stages.operate.git import DRIVER, commit, file_at, git, spare_tree
from stages.operate.objects import Item, Store, not_run, outputs
from stages.run import WORK

UNFINISHED = WORK / "rollback.json"
"""The rollback whose outputs are being restored; after a kill, the next `trunkline rollback` ends it."""
SHOWN = 5
"""Objects or files named in a message."""


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """What a rollback does."""

    tree: str
    """Git's digest of the state that comes back."""
    message: str
    """Of the commit."""
    files: list[str]
    """What changes in git, as `git diff --stat` shows it."""
    fetch: int
    """Objects that only the remote has."""
    objects: int
    """Outputs that the lock names."""
    commit: str | None = None
    """The commit made; null: a dry run."""


def refuse_dirty() -> None:
    """Stop where uncommitted changes would be mixed into the rollback.

    Raises:
        ConfigError: a tracked file has changed.
    """
    if changed := git("status", "--porcelain", "--untracked-files=no").stdout.splitlines():
        names = ", ".join(line[3:] for line in changed[:SHOWN])
        raise ConfigError(f"{len(changed)} tracked files have uncommitted changes ({names})", "commit them, or put them aside with `git stash`")


def expand(revisions: Sequence[str]) -> list[str]:
    """Commits to take back, the newest first; `A..B` names several.

    Raises:
        ConfigError: a revision does not exist, or is not part of HEAD.
    """
    found: list[str] = []
    for revision in revisions:
        if ".." in revision:
            for end in revision.split(".."):
                commit(end)
            found += git("rev-list", revision).stdout.split()
        else:
            found.append(commit(revision))
    order = git("rev-list", "--topo-order", "HEAD").stdout.split()
    if strangers := [one for one in found if one not in order]:
        raise ConfigError(f"{strangers[0][:12]} is not part of HEAD", "name a commit that `git log` shows here")
    if roots := [one for one in found if not parents(one)]:
        if git("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
            raise ConfigError(f"what was before {roots[0][:12]} is not in this clone: it is shallow", "`git fetch --unshallow`")
        raise ConfigError(f"{roots[0][:12]} is the first commit: there is nothing before it", "name a later one")
    return sorted(set(found), key=order.index)


def parents(one: str) -> list[str]:
    """The commits before one, as far as this clone has them."""
    return git("rev-list", "--parents", "-n1", one).stdout.split()[1:]


def reverted(commits: Sequence[str]) -> str:
    """The tree without these commits; a merge is taken back to its first parent.

    Raises:
        DataError: later commits changed the same lines.
    """
    with spare_tree() as path:
        for one in commits:
            # no driver: a dvc.lock merged of two is of no state that was ever run
            merge = ["-m", "1"] if len(parents(one)) > 1 else []
            done = git("-C", str(path), "-c", f"merge.{DRIVER}.driver=false", "revert", "--no-commit", *merge, one)
            if done.returncode:
                files = git("-C", str(path), "diff", "--name-only", "--diff-filter=U").stdout.split()
                raise DataError(
                    f"{one[:12]} cannot be taken back alone: later commits changed the same lines of {', '.join(files) or done.stderr.strip()}",
                    f"take those back too (`trunkline rollback {one[:12]}^..HEAD`), or go back whole: `trunkline rollback --to {one[:12]}^`",
                )
        return git("-C", str(path), "write-tree").stdout.strip()


def subject(revision: str) -> str:
    """First line of a commit's message."""
    return git("log", "-1", "--format=%s", revision).stdout.strip()


def prepare(revisions: Sequence[str], to: str | None) -> tuple[str, str]:
    """The tree that comes back, and the commit's message.

    Raises:
        ConfigError: no such revision, or nothing would change.
        DataError: a conflict.
    """
    if to:
        wanted = commit(to)
        tree, message = git("rev-parse", f"{wanted}^{{tree}}").stdout.strip(), f'Roll back to {to} "{subject(wanted)}"\n\nThe tree is that of {wanted}.'
    else:
        commits = expand(revisions or ["HEAD"])
        title = f'Revert "{subject(commits[0])}"' if len(commits) == 1 else f"Revert {len(commits)} commits"
        tree, message = reverted(commits), f"{title}\n\n" + "\n".join(f"This reverts commit {one}." for one in commits)
    if tree == git("rev-parse", "HEAD^{tree}").stdout.strip():
        raise ConfigError("there is nothing to roll back: that state is HEAD's", "`git log --oneline` shows what there is")
    return tree, message


def prove(store: Store, tree: str) -> tuple[list[Item], list[Item]]:
    """The outputs that the tree's lock names, and the objects among them that must be fetched.

    Raises:
        DataError: there is no lock, it lacks a stage, or an object is neither in the cache nor on the remote.
    """
    lock, pipeline = file_at(tree, "dvc.lock"), file_at(tree, "dvc.yaml")
    if lock is None or pipeline is None:
        raise DataError("that state has no dvc.lock: nothing was run there", "roll back to a later one")
    items = outputs(lock, pipeline)
    if left := not_run(items, pipeline):
        raise DataError(f"that state was not run whole: its dvc.lock has no outputs of {', '.join(left)}", "roll back to one that was: `git log dvc.lock`")
    far, gone = store.locate(items)
    if gone:
        named = "\n".join(f"  {item.path}  {item.md5}" for item in gone[:SHOWN]) + (f"\n  … and {len(gone) - SHOWN} more" if len(gone) > SHOWN else "")
        raise DataError(
            f"{len(gone)} objects of that state are neither in the cache nor on the remote ({store.name}):\n{named}",
            "fetch them from another clone (`dvc push` there), or roll back to a state whose objects are kept",
        )
    return items, far


def rollback(revisions: Sequence[str] = (), to: str | None = None, dry_run: bool = False) -> Rollback:
    """Prove, fetch, commit, restore, verify.

    Args:
        revisions: commits or ranges to take back; none: HEAD.
        to: a revision whose whole state comes back, instead.
        dry_run: prove only.

    Raises:
        ConfigError, DataError: as the steps above; or what came back is not what the lock names.
    """
    from dvc.repo import Repo

    head = commit("HEAD")
    refuse_dirty()
    if not dry_run and (left := unfinished(head)) is not None:
        restore()
        return left
    tree, message = prepare(revisions, to)
    files = git("diff", "--stat=100", head, tree).stdout.rstrip().splitlines()
    with Repo(".") as repo:
        store = Store(repo)
        items, far = prove(store, tree)
        found = Rollback(tree=tree, message=message, files=files, fetch=len(far), objects=len(items))
        if dry_run:
            return found
        store.fetch(far)
    made = git("commit-tree", tree, "-p", head, "-m", message)
    done = replace(found, commit=made.stdout.strip())
    write_json(UNFINISHED, asdict(done))
    moved = git("merge", "--ff-only", "--quiet", made.stdout.strip()) if made.returncode == 0 else made
    if moved.returncode:
        raise DataError(f"git cannot make the commit: {moved.stderr.strip()}", "mend what git says; nothing was changed")
    restore()
    return done


def unfinished(head: str) -> Rollback | None:
    """The rollback that was interrupted after its commit, which is still the newest one."""
    if not UNFINISHED.exists():
        return None
    left = Rollback(**read_json(UNFINISHED))
    return left if left.commit == head else None


def restore() -> None:
    """Bring the outputs back that dvc.lock names, and look at them.

    Raises:
        DataError: they are not what it names.
    """
    from dvc.repo import Repo

    with Repo(".") as repo:
        forget_index(repo)
        repo.checkout(force=True)
        if different := repo.status():
            raise DataError(f"after the restore, {', '.join(sorted(different))} differ from dvc.lock", "`dvc status` says how; `dvc checkout --force`")
    remove(UNFINISHED)


def show(revisions: Sequence[str] = (), to: str | None = None, dry_run: bool = False, as_json: bool = False) -> None:
    """Roll back, and print what was done."""
    found = rollback(revisions, to, dry_run)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(found.message.splitlines()[0], markup=False, style="bold")
    for line in found.files:
        console.print(line, markup=False)
    kept = f"all {found.objects} outputs of its dvc.lock are kept" + (f", {found.fetch} objects of them on the remote only" if found.fetch else "")
    if found.commit is None:
        console.print(f"Dry run: {kept}. Nothing was changed.")
    else:
        console.print(f"Commit {found.commit[:12]}: {kept}; restored and verified, no stage ran. Next: git push")
