"""What lies in the cache and on a remote, and what of it nothing reaches: objects and entries of the run-cache."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from conf.errors import DataError
from stages.operate.objects import Item, Store

if TYPE_CHECKING:
    from dvc_data.hashfile.db import HashFileDB

OBJECT = re.compile(r"([0-9a-f]{2})/([0-9a-f]{30}(?:\.dir)?)$")
SHOWN = 5
"""Objects named in a message."""


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
