"""Files that are whole or absent, in canonical form: publish by rename, sorted JSON, JSONL, digests.

A rename is not flushed to the disk: a killed process loses nothing, a power cut may leave a published file short. So whatever is
taken as whole from an earlier run is held against a digest first: downloads by their own, outputs by DVC, scratch by its `seal`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from conf.errors import DataError

WRITING = "while writing "
"""Begins the note that an error gets on its way out of `publish`: a full disk does not say which file it had no room for."""
SEAL = "sealed.json"
"""File in a sealed folder: the digest of the others."""
DISK = {errno.ENOSPC, errno.EROFS, errno.EDQUOT}
"""Numbers of the errors that say nothing of a file: full, read-only, quota."""


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success rename it over `path` (file or folder), on failure remove it.

    A folder is moved aside before it is replaced: at no moment is there a half of it under its name. It keeps its `.gitignore`, which DVC writes when
    the stage is over: a kill before that would leave none, and the next run, which finds the outputs as recorded, would not write it either.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old.partial")
    remove(temporary)
    remove(old)
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            if (ignored := path / ".gitignore").is_file():
                shutil.copyfile(ignored, temporary / ".gitignore")
            path.replace(old)
        temporary.replace(path)
    except Exception as error:
        error.add_note(f"{WRITING}{path}")
        raise
    finally:
        remove(temporary)
        remove(old)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def canonical(value: object, indent: int | None = 2) -> str:
    """JSON with sorted keys, no NaN, and a newline at the end.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write canonical JSON, whole or not at all."""
    with publish(path) as temporary:
        temporary.write_text(canonical(value), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        DataError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing", "run `dvc repro`, or `dvc pull` to fetch it") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}", "remove it and run `dvc repro`") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one canonical JSON object per line, whole or not at all; returns the number of rows."""
    count = 0
    with publish(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(canonical(row, indent=None))
            count += 1
    return count


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, streamed.

    Raises:
        DataError: the file is missing, or a line is no JSON object or holds NaN; names file and line.
    """
    if not path.exists():
        raise DataError(f"{path} is missing", "run `dvc repro`, or `dvc pull` to fetch it")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = DECODER.decode(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: no JSON: {error}", "remove the file and run `dvc repro`") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: a {type(row).__name__}, not an object", "each line holds one row as an object")
            yield row


def seal(folder: Path) -> None:
    """Write a folder's own digest into it, last: from then on it is whole."""
    write_json(folder / SEAL, sha256(folder, leave_out=SEAL))


def is_sealed(folder: Path) -> bool:
    """Whether a folder is there, and still what was sealed."""
    seal = folder / SEAL
    if not seal.is_file():
        return False
    try:
        pinned = read_json(seal)
    except DataError:  # half of it
        return False
    return bool(sha256(folder, leave_out=SEAL) == pinned)


def refuse_constant(constant: str) -> NoReturn:
    """NaN and infinities are no JSON."""
    raise ValueError(f"{constant} is no JSON")


def finite(number: str) -> float:
    """A fraction, if it is no larger than a float can be."""
    value = float(number)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{number} is too large a number")
    return value


DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite)


def sha256(path: Path, leave_out: str = "") -> str:
    """Digest of a file, or of a folder: of the lines `<sha256>  <relative path>` sorted by path, but for the one to `leave_out`."""
    if path.is_dir():
        files = sorted((f.relative_to(path).as_posix(), f) for f in path.rglob("*") if f.is_file())
        listing = "".join(f"{sha256(file)}  {name}\n" for name, file in files if name != leave_out)
        return hashlib.sha256(listing.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
