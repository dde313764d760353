"""Downloads that are whole or absent: resumed where they broke off, retried with backoff, and in the cache only under their own sha256."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import DigestMismatch, SourceError
from stages.files import DISK, sha256
from stages.run import WORK, progress
from stages.sources.files import too_large

if TYPE_CHECKING:
    from tenacity import RetryCallState

DOWNLOADS = WORK / "downloads"
CHUNK = 1 << 20
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}

log = logging.getLogger(__name__)


class Absent(SourceError):
    """There is nothing at the address."""


class Interrupted(Exception):
    """This attempt failed; another one may do."""

    def __init__(self, reason: str, *, after: float = 0.0, anew: bool = False) -> None:
        """Args: reason: what happened. after: seconds that the server asks to wait. anew: it will not go on from where we are."""
        super().__init__(reason)
        self.after, self.anew = after, anew
        self.wanted: int | None = None
        """Bytes of the whole file, if the server said so before it failed."""


@dataclass
class Stream:
    """The bytes of a file from an offset on."""

    start: int
    """Offset of its first byte: what was asked for, or 0 where the server cannot resume."""
    size: int | None
    """Bytes of the whole file, if the server says."""
    chunks: Iterator[bytes]
    """The bytes."""


Opener = Callable[[int], AbstractContextManager[Stream]]
"""Opens the file at an offset; raises Interrupted where another attempt may help, SourceError where not."""


def from_http(name: str, url: str, timeout: float) -> Opener:
    """An http(s) address, resumed by Range; proxies and `~/.netrc` are respected."""
    import requests

    @contextmanager
    def open_at(offset: int) -> Iterator[Stream]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "trunkline"} | ({"Range": f"bytes={offset}-"} if offset else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
                status = response.status_code
                if status in (404, 410):
                    raise Absent(f"{name}: there is nothing at {url} (HTTP {status})", "correct the address")
                if status in TRANSIENT or (status == 416 and offset):
                    after = response.headers.get("Retry-After", "")
                    raise Interrupted(f"HTTP {status} {response.reason}", after=min(float(after), 60.0) if after.isdigit() else 0.0, anew=status == 416)
                if status not in (200, 206):
                    raise SourceError(f"{name}: {url} answers HTTP {status} {response.reason}", "check the address, and the credentials in ~/.netrc")
                length = response.headers.get("Content-Length", "")
                size = int(length) if length.isdigit() else None
                start = 0
                if status == 206:
                    served = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
                    start = int(served[1]) if served else -1
                    if start != offset:
                        raise Interrupted("the server sent another range than the one asked for", anew=True)
                    size = None if size is None else start + size
                yield Stream(start, size, response.iter_content(CHUNK))
        except requests.exceptions.SSLError as error:
            raise SourceError(f"{name}: {url} has no valid certificate: {error}", "check the address, and the trusted ones (REQUESTS_CA_BUNDLE)") from error
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise Interrupted(f"{type(error).__name__}: {error}") from error
        except requests.RequestException as error:
            raise SourceError(f"{name}: {url} cannot be asked for: {error}", "correct the address") from error

    return open_at


def client_errors() -> tuple[type[Exception], ...]:
    """The base errors of the stores' own clients that are no OSError, of those that are loaded."""
    bases = {
        "botocore.exceptions": "BotoCoreError",
        "aiohttp": "ClientError",
        "google.auth.exceptions": "GoogleAuthError",
        "gcsfs.retry": "HttpError",
        "azure.core.exceptions": "AzureError",
        "paramiko": "SSHException",
    }
    return tuple(getattr(sys.modules[module], base) for module, base in bases.items() if module in sys.modules)


def from_fsspec(name: str, url: str, timeout: float) -> Opener:
    """An object of any store that fsspec opens, resumed by seeking."""
    import fsspec

    protocol = url.split("://", 1)[0]
    credentials = f"check the credentials in the environment, as the client of {protocol}:// reads them"
    options: dict[str, Any] = {"config_kwargs": {"read_timeout": timeout, "connect_timeout": timeout}} if protocol in ("s3", "s3a") else {}

    @contextmanager
    def open_at(offset: int) -> Iterator[Stream]:
        try:
            store, path = fsspec.core.url_to_fs(url, **options)
            with store.open(path, "rb") as file:
                size = getattr(file, "size", None)
                start = file.seek(offset) if file.seekable() and offset < (size or 0) else 0
                yield Stream(start, size, iter(lambda: file.read(CHUNK), b""))
        except (ImportError, ValueError) as error:
            raise SourceError(f"{name}: {url} cannot be opened: {error}", f"install what fsspec needs for {protocol}://, or correct the address") from error
        except FileNotFoundError as error:
            raise Absent(f"{name}: there is nothing at {url}", "correct the address") from error
        except OSError as error:
            if error.errno in DISK:
                raise
            if isinstance(error, PermissionError):
                raise SourceError(f"{name}: {url} may not be read: {error}", credentials) from error
            raise Interrupted(f"{type(error).__name__}: {error}") from error
        except client_errors() as error:
            if "Credential" in type(error).__name__:
                raise SourceError(f"{name}: {url} needs credentials: {error}", credentials) from error
            raise Interrupted(f"{type(error).__name__}: {error}") from error

    return open_at


def cached(digest: str) -> Path | None:
    """The file of this digest in the downloads cache, verified; a damaged one is removed."""
    path = DOWNLOADS / digest
    if not path.is_file():
        return None
    if sha256(path) != digest:
        log.warning("the downloaded %s was altered since; it is fetched again", path)
        path.unlink()
        return None
    return path


def failure(state: RetryCallState) -> Interrupted:
    """What ended the attempt."""
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, Interrupted) else Interrupted("unknown")


def backoff(state: RetryCallState) -> float:
    """Half a second, doubled after every failure up to half a minute; longer if the server asks for it."""
    return max(0.5 * 2.0 ** min(state.attempt_number - 1, 6), failure(state).after)


def append(name: str, url: str, opener: Opener, partial: Path, max_bytes: int) -> bool:
    """One attempt: add to `partial` what it still lacks; returns whether it went on from an earlier one."""
    have = partial.stat().st_size if partial.exists() else 0
    wanted = None
    try:
        with opener(have) as stream:
            wanted = stream.size
            if stream.size is not None and stream.size > max_bytes:
                raise too_large(f"{name}: {url}", max_bytes)
            total = None if stream.size is None else -(-(stream.size - stream.start) // CHUNK)
            with partial.open("r+b" if have else "wb") as file:
                file.seek(stream.start)
                file.truncate()
                for chunk in progress(stream.chunks, name, total):
                    if file.tell() + len(chunk) > max_bytes:
                        partial.unlink()
                        raise too_large(f"{name}: {url}", max_bytes)
                    file.write(chunk)
                if stream.size is not None and file.tell() != stream.size:
                    raise Interrupted(f"it broke off after {file.tell()} of {stream.size} bytes")
            return stream.start > 0
    except Interrupted as error:
        error.wanted = wanted
        if error.anew:
            partial.unlink(missing_ok=True)
        raise


def download(name: str, url: str, digest: str, opener: Opener, *, retries: int, max_bytes: int) -> Path:
    """Fetch a file into the cache.

    A broken download stays beside it as `<sha256>.partial`, from which the next attempt, or the next run, goes on.

    Raises:
        DigestMismatch: it is not the pinned file.
        Absent: there is nothing at the address.
        SourceError: it cannot be had, or is too large.
    """
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    partial = DOWNLOADS / f"{digest}.partial"

    def tell(state: RetryCallState) -> None:
        log.warning("%s: %s; trying again in %.1f s", name, failure(state), backoff(state))

    actual = sha256(partial) if partial.exists() else ""
    resumed = True
    while actual != digest and resumed:
        try:
            for attempt in Retrying(
                stop=stop_after_attempt(retries + 1), wait=backoff, before_sleep=tell, retry=retry_if_exception_type(Interrupted), reraise=True
            ):
                with attempt:
                    resumed = append(name, url, opener, partial, max_bytes)
        except Interrupted as error:
            have = partial.stat().st_size if partial.exists() else 0
            kept = f" ({have:,} of {error.wanted:,} bytes are here, and the next run goes on from them)" if have and error.wanted else ""
            raise SourceError(
                f"{name}: cannot download {url} in {retries + 1} attempts: {error}{kept}",
                f"check the network and the address, or put the file, named {digest}, into a folder or bucket that TRUNKLINE_MIRROR names",
            ) from error
        actual = sha256(partial)
        if actual != digest:
            partial.unlink()
    if actual != digest:
        raise DigestMismatch(f"{name} ({url})", digest, actual)
    return partial.replace(DOWNLOADS / digest)
