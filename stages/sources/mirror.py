"""A content-addressed mirror: a folder or fsspec address of files named by their sha256, which `TRUNKLINE_MIRROR` names."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from conf.errors import DigestMismatch, SourceError
from stages.files import sha256
from stages.sources.download import Absent, download, from_fsspec, from_http

VARIABLE = "TRUNKLINE_MIRROR"

log = logging.getLogger(__name__)


def mirrored(name: str, digest: str, *, retries: int, timeout: float, max_bytes: int) -> Path | None:
    """The file of this digest, if there is a mirror and it holds it: of a folder in place, of a bucket downloaded.

    Raises:
        DigestMismatch: the mirror's file is not what its name says.
    """
    mirror = os.environ.get(VARIABLE, "")
    if not mirror:
        return None
    address = f"{mirror.rstrip('/')}/{digest}"
    if "://" not in mirror:
        path = Path(address).expanduser()
        if not path.is_file():
            return None
        actual = sha256(path)
        if actual != digest:
            raise DigestMismatch(f"{name} ({address})", digest, actual, "the mirror's file was altered or cut short: put the right one there")
        return path
    opener = (from_http if mirror.startswith(("http://", "https://")) else from_fsspec)(name, address, timeout)
    try:
        return download(name, address, digest, opener, retries=retries, max_bytes=max_bytes)
    except (Absent, DigestMismatch) as error:
        if isinstance(error, DigestMismatch):
            raise
        return None
    except SourceError as error:
        log.warning("the mirror does not answer, so the source's own address is tried\n%s", error)
        return None
