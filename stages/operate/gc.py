"""`trunkline gc`: remove the artefacts that no protected branch, no tag, nothing in production and no recent commit reaches.

Everything is worked out first: what git reaches (reach.py), what production serves (in_production.py), what lies in the cache and, with
`--cloud`, on the remote. Whatever cannot be known - a shallow clone, an unreadable dvc.lock, a folder's listing that is nowhere, a digest in
production that no commit explains, a branch of a git remote that was not fetched - stops it before anything is deleted. Objects written in
the last `--days` stay too: what is pushed before its commit is, is not lost.

`dvc gc` knows no protected branches and nothing of production, does not ask whether this clone has every branch of its remotes, and never
cleans the run-cache. Its order is used here: the listing of a folder goes before the files in it.

Exit codes: 0 done, 1 stopped, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError, DataError
from stages.operate.in_production import explain
from stages.operate.objects import Store
from stages.operate.places import Place, objects, opened, survey
from stages.operate.reach import Reach, Reference, champions, references, unknown_here, work_tree
from stages.run import at_work

if TYPE_CHECKING:
    from dvc.repo import Repo


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
class Collection:
    """What stays and why, and what goes."""

    kept: list[Kept]
    places: list[Place]
    dry_run: bool


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
            if (held := next(at_work(), None)) is not None:  # DVC lets go of its lock meanwhile, and must have it again at the end
                raise DataError(f"process {held} runs a stage in this checkout", "wait for it")
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
