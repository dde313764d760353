"""Files of this repository: paths and globs that may not climb out of it, and the digest of one file or of several."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from conf.errors import DigestMismatch, SourceError
from stages.files import sha256


class TooLarge(SourceError):
    """A source beyond its limit; a caller whose limit has another name says so with `what`."""


def too_large(what: str, max_bytes: int) -> TooLarge:
    """The error for a source beyond the limit."""
    return TooLarge(f"{what} has more than collect.max_source_bytes={max_bytes}", "raise the limit if the size is right; otherwise do not trust the source")


def matching(name: str, pattern: str) -> list[Path]:
    """The files that a path or glob names, sorted; hidden ones are left out, as in a shell.

    Raises:
        SourceError: it climbs out of the repository, by `..`, an absolute path or a symbolic link, or it names no file.
    """
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise SourceError(f"{name}: path {pattern} leads out of the repository", "copy the files below data/raw/ and name them there")
    found = sorted(
        (path for path in Path().glob(pattern) if path.is_file() and not any(part.startswith(".") for part in path.parts)),
        key=Path.as_posix,
    )
    if not found:
        where = " (it is a folder: name a glob in it)" if Path(pattern).is_dir() else ""
        raise SourceError(f"{name}: no file at {pattern}{where}", "correct the path; after a fresh clone, `dvc pull` fetches files that DVC tracks")
    root = Path.cwd().resolve()
    outside = [path.as_posix() for path in found if not path.resolve().is_relative_to(root)]
    if outside:
        raise SourceError(f"{name}: {', '.join(outside)} leads out of the repository by a symbolic link", "replace the link by the file itself")
    return found


def listing(files: Mapping[str, Path]) -> str:
    """Digest of one file; of several, of the lines `<sha256>  <name>` sorted by name, as `sha256sum | sha256sum` gives it."""
    digests = {name: sha256(path) for name, path in sorted(files.items())}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()).hexdigest()


def local(name: str, pattern: str, pinned: str, max_bytes: int) -> list[Path]:
    """The files at a path or glob, verified.

    Raises:
        DigestMismatch: they are not what was pinned.
        SourceError: they cannot be had, or are too large.
    """
    found = matching(name, pattern)
    if sum(path.stat().st_size for path in found) > max_bytes:
        raise too_large(f"{name}: {pattern}", max_bytes)
    actual = listing({path.as_posix(): path for path in found})
    if actual != pinned:
        raise DigestMismatch(f"{name} ({pattern}, {len(found)} file{'s' if len(found) > 1 else ''})", pinned, actual)
    return found
