"""The objects that a dvc.lock names, and where they are: in the cache, on the remote, or nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from conf.errors import DataError
from stages.files import remove
from stages.intact import md5 as file_md5

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB
    from dvc_data.hashfile.hash_info import HashInfo


@dataclass(frozen=True, kw_only=True)
class Item:
    """One output of a lock, or one file of an output that is a folder."""

    path: str
    """Relative to the repository root."""
    md5: str
    """DVC's digest; ends in `.dir` for the listing of a folder."""


def outputs(lock: str, pipeline: str) -> list[Item]:
    """The outputs that DVC keeps: those of a lock, less those with `cache: false`, which git keeps, and those that their stage did not write.

    Args:
        lock: text of dvc.lock.
        pipeline: text of the dvc.yaml beside it.

    Raises:
        DataError: one of them cannot be read.
    """
    try:
        stages = yaml.load(pipeline, Loader=yaml.CSafeLoader)["stages"]
        in_git = {path for stage in stages.values() for path, cached in _declared(stage) if not cached}
        locked = yaml.load(lock, Loader=yaml.CBaseLoader)["stages"]  # every value as text: a digest may be digits alone
        made = (out for stage in locked.values() for out in stage.get("outs", []) if "md5" in out)
        return [Item(path=out["path"], md5=out["md5"]) for out in made if out["path"] not in in_git]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"dvc.lock or dvc.yaml of that revision cannot be read: {error}", "name another revision") from error


def not_run(items: Sequence[Item], pipeline: str) -> list[str]:
    """Stages whose outputs a lock lacks: they never ran, or a merge left them out.

    Args:
        items: the lock's outputs.
        pipeline: text of the dvc.yaml beside it.
    """
    known = {item.path for item in items}
    stages = yaml.load(pipeline, Loader=yaml.CSafeLoader)["stages"]
    return [name for name, stage in stages.items() if any(cached and path not in known for path, cached in _declared(stage))]


def _declared(stage: Any) -> Iterator[tuple[str, bool]]:
    """A stage's outputs, and whether DVC keeps each."""
    for kind in ("outs", "metrics", "plots"):
        for out in stage.get(kind, []):
            for path, flags in out.items() if isinstance(out, dict) else [(out, None)]:
                yield path, not (isinstance(flags, dict) and flags.get("cache") is False)


class Store:
    """Cache and remote of a repository."""

    def __init__(self, repo: Repo) -> None:
        """The remote is the default one, if there is any."""
        self.repo = repo
        self.cache: HashFileDB = repo.cache.local
        name = repo.config["core"].get("remote")
        self.remote: HashFileDB | None = repo.cloud.get_remote_odb(None, "fetch") if name else None
        self.name = name or "no remote is configured"

    def locate(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """The objects that only the remote has, and those that are nowhere; folders are looked into.

        A file of the cache counts only if its content still has its digest. (DVC takes a read-only one for whole.)
        """
        absent = [item for item in items if not self.whole(item.md5)]
        listed = self.remote_has([item.md5 for item in absent])
        far, gone = [i for i in absent if i.md5 in listed], [i for i in absent if i.md5 not in listed]
        inner = [file for item in items if item.md5.endswith(".dir") and item not in gone for file in self.files(item)]
        if inner:
            more = self.locate(inner)
            far, gone = far + more[0], gone + more[1]
        return far, gone

    def whole(self, md5: str) -> bool:
        """Whether the cache has an object, undamaged."""
        path = self.path(md5)
        return path.is_file() and file_md5(path) == md5.removesuffix(".dir")

    def path(self, md5: str) -> Path:
        """Where the cache keeps an object."""
        return Path(self.cache.oid_to_path(md5))

    def remote_has(self, digests: list[str]) -> set[str]:
        """Which of the objects the remote has."""
        return set(self.remote.list_oids_exists(digests)) if self.remote and digests else set()

    def files(self, item: Item) -> Iterator[Item]:
        """The files of a folder, from its listing in the cache or on the remote."""
        from dvc_data.hashfile.tree import Tree

        tree = Tree.load(self.cache if self.whole(item.md5) or not self.remote else self.remote, digest(item.md5))
        yield from (Item(path="/".join((item.path, *keys)), md5=str(found.value)) for keys, _, found in tree if found)

    def fetch(self, items: Sequence[Item]) -> None:
        """Bring objects from the remote into the cache, in the place of damaged ones."""
        for item in items:
            remove(self.path(item.md5))
        self.repo.cloud.pull([digest(item.md5) for item in items])


def digest(md5: str) -> HashInfo:
    """In DVC's form."""
    from dvc_data.hashfile.hash_info import HashInfo

    return HashInfo("md5", md5)
