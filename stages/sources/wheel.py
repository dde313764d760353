"""Members of a pinned wheel: downloaded by pip with the user's own configuration, never installed, and unpacked with care."""

from __future__ import annotations

import fnmatch
import importlib.util
import logging
import lzma
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from conf.errors import DigestMismatch, SourceError
from stages.files import DISK, publish, sha256
from stages.run import WORK, scratch
from stages.sources.download import DOWNLOADS
from stages.sources.files import too_large

UNPACKED = WORK / "unpacked"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill")

log = logging.getLogger(__name__)


def is_pickle(path: str) -> bool:
    """Whether a file's name says that loading it may run code."""
    return path.lower().endswith(PICKLES)


def pip() -> list[str]:
    """How to call pip: this environment's, or the one that Python carries for making environments.

    Raises:
        SourceError: there is none.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    bundled = importlib.util.find_spec("ensurepip")
    wheels = sorted(Path(bundled.origin).parent.glob("_bundled/pip-*.whl")) if bundled and bundled.origin else []
    if not wheels:
        raise SourceError("a wheel source needs pip, and this Python has none", "install pip into the environment, or use TRUNKLINE_MIRROR")
    return [sys.executable, str(wheels[-1] / "pip")]


def download_wheel(name: str, package: str, pinned: str, *, retries: int, timeout: float, max_bytes: int) -> Path:
    """Fetch a wheel into the downloads cache by `pip download`, which reads the user's own index, proxy and certificates.

    Raises:
        DigestMismatch: it is not the pinned wheel.
        SourceError: pip cannot get it, or it is too large.
    """
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    with scratch("wheel") as folder:
        command = [
            *pip(),
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--ignore-requires-python",
            "--disable-pip-version-check",
            "--no-input",
            f"--retries={retries}",
            f"--timeout={timeout:g}",
            f"--dest={folder}",
            "--",
            package,
        ]
        log.info("%s: pip downloads %s", name, package)
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()[-1:] or ["no reason given"]
            raise SourceError(
                f"{name}: pip cannot download {package}: {said[-1].removeprefix('ERROR: ')}",
                f"check the network and pip's index (`pip config list`), or put the wheel, named {pinned}, into a folder or bucket that TRUNKLINE_MIRROR names",
            )
        if wheels[0].stat().st_size > max_bytes:
            raise too_large(f"{name}: {package}", max_bytes)
        actual = sha256(wheels[0])
        if actual != pinned:
            raise DigestMismatch(f"{name} ({package}, {wheels[0].name})", pinned, actual)
        return wheels[0].replace(DOWNLOADS / pinned)


def matches(path: str, pattern: str) -> bool:
    """Whether a member matches a glob; `*` stays within one folder."""
    parts, globs = path.split("/"), pattern.split("/")
    return len(parts) == len(globs) and all(map(fnmatch.fnmatchcase, parts, globs))


def chosen(name: str, archive: zipfile.ZipFile, member: str, max_bytes: int) -> list[zipfile.ZipInfo]:
    """The members that a path or glob names, sorted, of which each is safe to unpack.

    Raises:
        SourceError: none matches; one climbs, is a link, a pickle or there twice; or they are larger than the limit.
    """
    entries = sorted((entry for entry in archive.infolist() if not entry.is_dir() and matches(entry.filename, member)), key=lambda entry: entry.filename)
    if not entries:
        raise SourceError(f"{name}: the wheel has no member {member}", "`python -m zipfile -l <wheel>` lists its members")
    for entry, next_one in zip(entries, [*entries[1:], None], strict=True):
        if next_one is not None and next_one.filename == entry.filename:
            raise SourceError(f"{name}: the wheel holds {entry.filename} twice", "do not trust this wheel: readers differ in which of the two they see")
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename or ":" in path.parts[0] or stat.S_ISLNK(entry.external_attr >> 16):
            raise SourceError(f"{name}: the wheel's member {entry.filename!r} leads out of its folder", "do not trust this wheel")
        if is_pickle(entry.filename):
            raise SourceError(f"{name}: {entry.filename} is a pickle, which can run code when loaded", "name a member of another format")
    if sum(entry.file_size for entry in entries) > max_bytes:
        raise too_large(f"{name}: {member}, unpacked,", max_bytes)
    return entries


def unpack(name: str, wheel: Path, pinned: str, member: str, max_bytes: int) -> list[Path]:
    """Unpack the members that a path or glob names, each whole or not at all.

    Raises:
        SourceError: the archive is damaged, or a member is missing, unsafe or too large.
    """
    unpacked, left = [], max_bytes
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in chosen(name, archive, member, max_bytes):
                target = UNPACKED / pinned / entry.filename
                with publish(target) as temporary, archive.open(entry) as source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    left -= file.tell()
                    if left < 0:
                        raise too_large(f"{name}: {member}, unpacked,", max_bytes)
                unpacked.append(target)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise SourceError(f"{name}: the wheel cannot be unpacked: {error}", "do not trust this wheel") from error
    return unpacked
