"""`trunkline gc`: remove the artefacts that no protected branch, no tag, nothing in production and no recent commit reaches.

Everything is worked out first: what git reaches (reach.py), what production serves (in_production.py), what lies in the cache and, with
`--cloud`, on the remote. Whatever cannot be known - a shallow clone, an unreadable dvc.lock, a folder's listing that is nowhere, a digest in
production that no commit explains, a branch of a git remote that was not fetched - stops it before anything is deleted. Objects written in
the last `--days` stay too: what is pushed before its commit is, is not lost.

`dvc gc` has no protected branches and no digests in production, removes what it cannot see, and never cleans the run-cache; its rule for
objects, and its order (listings before the files in them), are used here.

Exit codes: 0 done, 1 stopped, 2 wrong usage.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from conf.errors import ConfigError, DataError
from stages.operate.in_production import explain
from stages.operate.objects import Item, Store
from stages.operate.reach import Reach, Reference, champions, references, unknown_here, work_tree

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB

OBJECT = re.compile(r"([0-9a-f]{2})/([0-9a-f]{30}(?:\.dir)?)$")
SHOWN = 5
"""Objects named in a message."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What one reference keeps."""

    reference: str
    why: str
    commits: int
    objects: int
    bytes: int
    """Of those in the cache."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What goes from the cache, or from the remote."""

    name: str
    objects: int
    """All that lie there."""
    bytes: int
    gone: list[str]
    """Digests that go."""
    gone_bytes: int
    runs: list[str]
    """Entries of the run-cache that go."""
    recent: int
    """Objects that nothing reaches and that stay because they are recent."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What stays and why, and what goes."""

    kept: list[Kept]
    places: list[Place]
    dry_run: bool


@dataclass(frozen=True)
class File:
    """A file of the cache or the remote."""

    path: str
    size: int
    written: float
    """Seconds since 1970."""


def objects(odb: HashFileDB) -> dict[str, File]:
    """Digest -> file of every object, passing over what is none (a download cut short)."""
    return {"".join(found.groups()): file for file in listing(odb, odb.path) if (found := OBJECT.search(file.path))}


def listing(odb: HashFileDB, folder: str) -> list[File]:
    """Every file below a folder of the cache or the remote."""
    from dvc_objects.fs.local import LocalFileSystem

    if isinstance(odb.fs, LocalFileSystem):
        found = ((path, path.stat()) for path in sorted(Path(folder).rglob("*")) if path.is_file())
        return [File(str(path), stat.st_size, stat.st_mtime) for path, stat in found]
    details: Mapping[str, Mapping[str, Any]] = odb.fs.fs.find(folder, detail=True) if odb.fs.exists(folder) else {}
    return [File(path, int(info.get("size") or 0), _written(info)) for path, info in sorted(details.items()) if info["type"] == "file"]


def _written(info: Mapping[str, Any]) -> float:
    """When an object was written, as its store tells; unknown is now."""
    at = next((info[key] for key in ("LastModified", "mtime", "last_modified", "updated") if info.get(key)), None)
    return at.timestamp() if isinstance(at, datetime) else float(at) if isinstance(at, int | float) else time.time()


def opened(store: Store, wanted: Iterable[str], allow_missing: bool) -> dict[str, frozenset[str]]:
    """Each output -> its objects: itself, and the files that the listing of a folder names.

    Raises:
        DataError: a listing is neither in the cache nor on the remote, so that what it reaches is unknown.
    """
    from dvc_objects.errors import ObjectFormatError

    folders = sorted(one for one in wanted if one.endswith(".dir"))
    here = {one for one in folders if store.whole(one)}
    far = store.remote_has([one for one in folders if one not in here])
    if (lost := [one for one in folders if one not in here and one not in far]) and not allow_missing:
        raise DataError(
            f"{len(lost)} folders that are reached have no listing in the cache or on the remote ({store.name}), as {', '.join(lost[:SHOWN])}: "
            "which files are theirs is unknown",
            "`dvc fetch --all-commits`; or give them up: --allow-missing, or fewer commits with --history",
        )
    try:
        inside = {one: frozenset(file.md5 for file in store.files(Item(path="", md5=one))) for one in folders if one in here or one in far}
    except ObjectFormatError as error:
        raise DataError(
            f"the listing of a folder that is reached is damaged on the remote ({store.name}): {error}", "push it anew from another clone"
        ) from error
    return {one: inside.get(one, frozenset()) | {one} for one in wanted}


def survey(odb: HashFileDB, runs: tuple[HashFileDB, str], kept: frozenset[str], days: float, name: str) -> tuple[Place, list[list[str]]]:
    """What goes from one place, and the paths to remove in that order, so that none names what is gone: runs, listings of folders, files.

    Args:
        odb: of the objects.
        runs: the store of the run-cache, and its folder.
        kept: digests that stay.
        days: what was written since then stays.
        name: of the place.
    """
    young = time.time() - days * 86400
    files = objects(odb)
    unreached = {oid: file for oid, file in files.items() if oid not in kept}
    gone = sorted(oid for oid, file in unreached.items() if file.written <= young)
    staying = files.keys() - set(gone)
    entries = [file for file in listing(*runs) if file.written <= young]
    dead = [file.path for file in entries if not _outputs(runs[0].fs.cat_file(file.path)) <= staying | kept]
    place = Place(
        name=name,
        objects=len(files),
        bytes=sum(file.size for file in files.values()),
        gone=gone,
        gone_bytes=sum(files[oid].size for oid in gone),
        runs=dead,
        recent=len(unreached) - len(gone),
    )
    folders = [files[oid].path for oid in gone if oid.endswith(".dir")]
    return place, [dead, folders, [files[oid].path for oid in gone if not oid.endswith(".dir")]]


def _outputs(entry: bytes) -> set[str]:
    """The digests that an entry of the run-cache restores; one that cannot be read restores nothing that is there."""
    try:
        return {out["md5"] for out in yaml.load(entry, Loader=yaml.CBaseLoader)["outs"]}
    except (yaml.YAMLError, LookupError, TypeError):
        return {"unreadable"}


def collect(
    protected: Sequence[str],
    keep: Sequence[str] = (),
    in_production: Sequence[str] = (),
    days: float = 30,
    most: int | None = None,
    cloud: bool = False,
    allow_missing: bool = False,
    dry_run: bool = False,
) -> Collection:
    """Work out what stays, and remove the rest.

    Args:
        protected, keep, days, most: as `references` takes them.
        in_production: digests, tags or addresses, as `explain` takes them.
        cloud: look at the default remote too.
        allow_missing: pass over folders whose listing is nowhere.
        dry_run: remove nothing.

    Raises:
        ConfigError, DataError: something cannot be known; nothing was removed.
    """
    from dvc.repo import Repo
    from dvc_data.hashfile.db import get_index

    found = [*references(protected, keep, days, most), *map(explain, in_production)]
    if cloud and (lacking := unknown_here()):
        raise DataError(f"{len(lacking)} references of git's remotes were not fetched, as {lacking[0]}", "`git fetch --all --tags`: they reach objects too")
    reach = Reach()
    found.append(champions(found, reach))
    with Repo(".") as repo, alone(repo):
        store = Store(repo)
        refuse(store, repo.root_dir, cloud)
        reached = {reference: frozenset().union(*map(reach.of, reference.commits)) for reference in found}
        reached[Reference(name="work tree", why="its dvc.lock", commits=())] = work_tree()
        inside = opened(store, frozenset().union(*reached.values()), allow_missing)
        kept = frozenset().union(*inside.values())
        places = [survey(store.cache, (repo.cache.legacy, repo.stage_cache.cache_dir), kept, days, "cache")]
        odbs = [store.cache]
        if cloud and store.remote:
            legacy = repo.cloud.get_remote_odb(None, "gc", hash_name="md5-dos2unix")
            places.append(survey(store.remote, (legacy, legacy.fs.join(legacy.path, "runs")), kept, days, f"remote {store.name}"))
            odbs.append(store.remote)
        sizes = {oid: file.size for oid, file in objects(store.cache).items()}
        if not dry_run:
            for odb, (_, groups) in zip(odbs, places, strict=True):
                for paths in filter(None, groups):
                    odb.fs.remove(paths)
                if odb is store.remote:
                    get_index(odb).clear()  # DVC's memory of what the remote has
    told = []
    for reference, outputs in reached.items():
        named = frozenset[str]().union(*(inside[one] for one in outputs))
        size = sum(sizes.get(one, 0) for one in named)
        told.append(Kept(reference=reference.name, why=reference.why, commits=len(reference.commits), objects=len(named), bytes=size))
    return Collection(kept=told, places=[place for place, _ in places], dry_run=dry_run)


@contextmanager
def alone(repo: Repo) -> Iterator[None]:
    """While no other DVC runs here.

    Raises:
        DataError: one does.
    """
    from dvc.lock import LockError

    try:
        with repo.lock:
            yield
    except LockError as error:
        raise DataError("another DVC runs in this checkout", "wait for it") from error


def refuse(store: Store, root: str, cloud: bool) -> None:
    """Stop where others may keep things too.

    Raises:
        ConfigError: the cache lies outside of the checkout; or there is no remote, and one is asked for.
    """
    if not Path(store.cache.path).resolve().is_relative_to(Path(root).resolve()):
        raise ConfigError(f"the cache {store.cache.path} lies outside of this checkout: others may use it", "`dvc gc --projects` knows of several")
    if cloud and store.remote is None:
        raise ConfigError("--cloud, and no remote is configured", "`dvc remote add --default …`, or leave --cloud out")


def show(as_json: bool, **options: Any) -> None:
    """Collect, and print what stays and what goes."""
    found = collect(**options)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table("kept by", "why", "commits", "objects", "MiB here", box=None, header_style="bold")
    for kept in found.kept:
        table.add_row(kept.reference, kept.why, str(kept.commits), str(kept.objects), f"{kept.bytes / 2**20:,.1f}")
    console.print(table)
    for place in found.places:
        recent = f"; {place.recent} that nothing reaches are recent and stay" if place.recent else ""
        verb = "would go" if found.dry_run else "went"
        console.print(
            f"{place.name}: {len(place.gone)} of {place.objects} objects {verb}, {place.gone_bytes / 2**20:,.1f} of {place.bytes / 2**20:,.1f} MiB, "
            f"and {len(place.runs)} entries of the run-cache{recent}",
            markup=False,
        )
