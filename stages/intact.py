"""What a stage reads, held against dvc.lock before it is used.

DVC takes a cache file that is read-only for whole: a truncated or altered one is checked out, or restored with a stage, and
`dvc status` then calls it up to date. So each stage that DVC runs digests what it reads of earlier stages: 0.3 s for 100 MB.
A file that a person changed is none of this module's business: DVC sees it, and its cache file is sound.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from conf.errors import DataError
from stages.files import remove

CACHE = Path(".dvc/cache/files/md5")


def read_yaml(path: Path) -> Any:
    """A file of DVC's, every value as text (an all-digit digest too); by libyaml, where ruamel takes 0.3 s for dvc.lock.

    Raises:
        DataError: it is no YAML.
    """
    import yaml

    try:
        return yaml.load(path.read_bytes(), Loader=yaml.CBaseLoader)
    except yaml.YAMLError as error:
        raise DataError(f"{path} is no YAML: {' '.join(str(error).split())}", "if DVC was killed while it wrote it, `trunkline repro` mends it") from error


def md5(path: Path) -> str:
    """DVC's digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@cache
def shared(checkout: Path) -> Path:
    """Where DVC says that the cache of a checkout is: a shared one, or that of the checkout that `dvc exp` copied."""
    from dvc.repo import Repo

    return Path(Repo(str(checkout)).cache.local.path)


def cached(digest: str) -> Path | None:
    """The cache file of a digest, if there is one; DVC, which takes 0.4 s, is asked only when the cache is not in the usual place."""
    name = Path(digest[:2], digest[2:])
    if (CACHE / name).is_file():
        return CACHE / name
    if CACHE.is_dir():
        return None
    elsewhere = shared(Path.cwd()) / name
    return elsewhere if elsewhere.is_file() else None


def forget_index(repo: Any) -> None:
    """Let a `dvc.repo.Repo` read anew which files its outputs have: its index on disk keeps what a killed command had read of a folder, and calls it all."""
    repo.drop_data_index()


def overlaps(one: str, other: str) -> bool:
    """Whether one path is the other, or leads to it."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def recorded(lock: dict[str, Any], paths: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """Each file below some paths that a stage wrote -> its digest in dvc.lock, or in the listing of its folder that dvc.lock names."""
    wanted = list(paths)
    for out in (out for stage in lock.get("stages", {}).values() for out in stage.get("outs", []) if "md5" in out):
        if not any(overlaps(out["path"], path) for path in wanted):
            continue
        if not out["md5"].endswith(".dir"):
            yield Path(out["path"]), out["md5"]
        elif (listing := cached(out["md5"])) and md5(listing) == out["md5"].removesuffix(".dir"):
            for entry in json.loads(listing.read_bytes()):
                if any(overlaps(f"{out['path']}/{entry['relpath']}", path) for path in wanted):
                    yield Path(out["path"]) / entry["relpath"], entry["md5"]


def check_intact(paths: Iterable[str]) -> None:
    """Stop at files that DVC took from a damaged cache file, and remove both, so that DVC makes or fetches them anew; and at a folder of
    which only a part is here, as `dvc repro --pull` leaves it, which DVC would take for the whole.

    Raises:
        DataError: there are such; names each damaged file with its cache file, and the first that is missing.
    """
    lock = Path("dvc.lock")
    if not lock.exists():
        return
    damaged, missing = [], []
    for path, digest in recorded(read_yaml(lock), paths):
        if not path.exists() and path.parent.is_dir():
            missing.append(path)
        if path.is_file() and md5(path) != digest and (copy := cached(digest)) and md5(copy) != digest:
            damaged.append(f"{path}, from {copy} ({copy.stat().st_size:,} bytes)")
            remove(path)  # first: without its cache file it would be taken as it is
            remove(copy)
    if damaged:
        raise DataError(
            f"{len(damaged)} file{'s' if len(damaged) > 1 else ''} of the DVC cache damaged since written:\n  - " + "\n  - ".join(damaged),
            "they are removed, from the cache and from here: `dvc pull` fetches them, or `dvc repro` makes them anew",
        )
    if missing:
        what = f"{missing[0].parent} is here in part: dvc.lock names {len(missing)} file{'s' if len(missing) > 1 else ''} more, as {missing[0].name}"
        raise DataError(what, f"`dvc pull {missing[0].parent}`, or `trunkline repro` instead of `dvc repro`: a part must not be taken for the whole")


def check_inputs(stage: str) -> None:
    """Check what dvc.yaml says that a stage reads.

    Raises:
        DataError: as `check_intact` does.
    """
    stages = read_yaml(Path("dvc.yaml"))["stages"]
    check_intact(dep for dep in stages[stage]["deps"] if not dep.endswith(".py"))
