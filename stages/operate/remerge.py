"""`trunkline remerge`: merge again, by stage and by key, what the newest merge commit of this branch may have merged by lines.

A host that merges for a person ("Update branch") does not run this repository's merge driver, and may mix the halves of two entries of
dvc.lock into a run that nobody made. CI calls this before it believes dvc.lock. A file that was changed after the merge, or is as one of the
parents has it, stays as it is; so does the result of a merge that the driver made.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from conf.errors import DataError
from stages.files import publish
from stages.operate.git import DRIVER, commit, file_at, git
from stages.operate.merge_driver import drive


def generated(revision: str) -> list[str]:
    """The files of a commit that .gitattributes gives to the driver."""
    names = git("ls-tree", "-rz", "--name-only", revision).stdout
    told = git("check-attr", "-z", "--stdin", "merge", given=names).stdout.split("\0")
    return [name for name, value in zip(told[::3], told[2::3], strict=False) if value == DRIVER]


def mixed(merge: str, name: str) -> bool:
    """Whether a merge commit's version of a file is that of no parent, and still HEAD's."""
    versions = [git("rev-parse", "--verify", "--quiet", f"{revision}:{name}").stdout for revision in (merge, "HEAD", f"{merge}^1", f"{merge}^2")]
    return versions[0] == versions[1] and all(versions) and versions[0] not in versions[2:]


def remerge() -> list[str]:
    """Merge again; returns what is to be said.

    Raises:
        ConfigError: no git repository.
        DataError: an uncommitted change, or a conflict.
    """
    commit("HEAD")
    merge = git("rev-list", "--merges", "--first-parent", "-n", "1", "HEAD").stdout.strip()
    said = []
    for name in generated(merge) if merge else []:
        if not mixed(merge, name):
            continue
        if git("diff", "--quiet", "HEAD", "--", name).returncode:
            raise DataError(f"{name} has uncommitted changes", "commit them first")
        base = git("merge-base", f"{merge}^1", f"{merge}^2").stdout.strip()
        with tempfile.TemporaryDirectory(prefix="trunkline-remerge-") as folder:
            old, ours, theirs = (Path(folder) / side for side in ("base", "ours", "theirs"))
            for path, revision in ((old, base), (ours, f"{merge}^1"), (theirs, f"{merge}^2")):
                path.write_text(file_at(revision, name) or "", encoding="utf-8")
            told = drive(old, ours, theirs, name)
            again = ours.read_text(encoding="utf-8")
        if again != file_at("HEAD", name):
            with publish(Path(name)) as temporary:
                temporary.write_text(again, encoding="utf-8")
            said.append(told)
    return said
