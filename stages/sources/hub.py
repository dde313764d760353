"""A snapshot of a Hugging Face repository at a pinned commit, each file held against the digest that the commit names."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conf.errors import DigestMismatch, SourceError
from conf.schema import HubSource
from stages.files import sha256
from stages.sources.files import too_large
from stages.sources.wheel import PICKLES, is_pickle


def git_blob(path: Path) -> str:
    """The digest under which git stores a file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify(name: str, path: Path) -> None:
    """Hold a file of the hub's cache against the name of its blob: its sha256 (large files) or its git digest.

    Raises:
        DigestMismatch: it was altered or cut short.
    """
    blob = path.resolve().name
    if path.is_symlink() and len(blob) in (40, 64):
        actual = sha256(path) if len(blob) == 64 else git_blob(path)
        if actual != blob:
            raise DigestMismatch(f"{name} ({path.name})", blob, actual, "remove the file from the cache of huggingface_hub (HF_HOME) and fetch it again")


def snapshot(name: str, origin: HubSource, *, retries: int, timeout: float, max_bytes: int) -> list[Path]:
    """The files of a dataset or model at its pinned commit, sorted; pickles are left out. Offline (`HF_HUB_OFFLINE=1`) its cache serves.

    Raises:
        SourceError: it cannot be had, holds nothing that may be taken, or is too large.
    """
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", f"{max(1, round(timeout))}")
    import httpx2
    from huggingface_hub import DryRunFileInfo, constants, snapshot_download
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    address = f"{origin.repo} at {origin.revision}"
    asked = [pattern for pattern in origin.files if is_pickle(pattern)]
    if asked:
        raise SourceError(f"{name}: {', '.join(asked)} names pickles, which can run code when loaded", "name files of another format (safetensors, jsonl)")
    ignore = [f"*{suffix}" for suffix in PICKLES]
    again = Retrying(
        stop=stop_after_attempt(1 if constants.HF_HUB_OFFLINE else retries + 1),
        wait=wait_exponential(multiplier=0.5, max=30.0),
        reraise=True,
        retry=retry_if_exception_type((httpx2.TransportError, TimeoutError, LocalEntryNotFoundError)),  # the last: out of reach, and not in the cache
    )
    snapshot: Callable[..., Any] = partial(  # its result depends on dry_run
        snapshot_download,
        origin.repo,
        repo_type=origin.repo_type,
        revision=origin.revision,
        allow_patterns=origin.files,
        ignore_patterns=ignore,
        etag_timeout=timeout,
    )
    try:
        try:
            plan = snapshot(dry_run=True)
        except DryRunError:  # the hub is out of reach: what the cache holds may do
            plan = []
        if sum(file.file_size or 0 for file in plan if isinstance(file, DryRunFileInfo)) > max_bytes:
            raise too_large(f"{name}: {address}", max_bytes)
        folder = Path(again(snapshot))
    except (OSError, httpx2.HTTPError) as error:
        raise SourceError(
            f"{name}: the {origin.repo_type} {address} cannot be fetched from the hub: {' '.join(str(error).split())[:300]}",
            "check the network, HF_TOKEN and HF_HUB_OFFLINE; without a network, fill the cache (HF_HOME), name an internal hub (HF_ENDPOINT), "
            "or pin the file as an http source, which TRUNKLINE_MIRROR can supply by its sha256",
        ) from error
    found = sorted(
        (
            path
            for path in folder.rglob("*")
            if path.is_file() and not is_pickle(path.name) and any(fnmatch.fnmatch(path.relative_to(folder).as_posix(), glob) for glob in origin.files)
        ),
        key=Path.as_posix,
    )
    if not found:
        raise SourceError(f"{name}: {address} has no file that matches {', '.join(origin.files)} and is no pickle", "correct `files`")
    if sum(path.stat().st_size for path in found) > max_bytes:
        raise too_large(f"{name}: {address}", max_bytes)
    for path in found:
        verify(name, path)
    return found
