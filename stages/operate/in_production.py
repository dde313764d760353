"""Which commits made what is in production: an engine digest, a Bento's tag, or the address of a service that says its own.

A commit explains a digest if its verdict names it and its dvc.lock holds that very verdict: a run made both.
"""

from __future__ import annotations

import hashlib
import json
import re

from conf.errors import ConfigError, DataError
from stages.operate.git import file_at, git
from stages.operate.reach import LOCK, Reference, digests

VERDICT = "models/gate/verdict.json"
SHORTEST = 12
"""Characters of a digest that name it."""
PATIENCE = 10.0
"""Seconds that a service may take to answer."""


def engine(named: str) -> str:
    """The engine digest, or its beginning, that was meant.

    Args:
        named: `<digest>`, `sha256:<digest>`, `<name>:<digest>` (a Bento's tag), or `http(s)://…` of a service.

    Raises:
        ConfigError: it is none of these.
        DataError: the service does not say.
    """
    if re.match(r"https?://", named):
        return _asked(named)
    digest = named.rsplit(":", 1)[-1].lower()
    if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST},64}}", digest):
        raise ConfigError(
            f"{named!r} is no digest of an engine", f"name at least {SHORTEST} of its 64 hexadecimal digits, a Bento's tag, or a service's address"
        )
    return digest


def _asked(address: str) -> str:
    import requests

    url = address.rstrip("/").removesuffix("/v1/models").removesuffix("/v1") + "/v1/models"
    try:
        digest = requests.get(url, timeout=PATIENCE).json()["data"][0]["digest"]
    except (requests.RequestException, LookupError, TypeError) as error:
        raise DataError(f"{url} does not say which model it serves: {type(error).__name__}", "is it a Trunkline service, and up? Or name the digest") from error
    return engine(str(digest))


def explain(named: str) -> Reference:
    """The commits that made it.

    Raises:
        DataError: no commit of any reference did.
    """
    digest = engine(named)
    commits = git("rev-list", "--all", "HEAD").stdout.split()
    listed = git("cat-file", "--batch-check=%(objectname)", given="".join(f"{one}:{VERDICT}\n" for one in commits)).stdout.splitlines()
    verdicts = {blob: git("cat-file", "blob", blob).stdout for blob in {line for line in listed if " " not in line}}  # `<name> missing`
    naming = {blob for blob, text in verdicts.items() if _named(text).startswith(digest)}
    made = [one for one, blob in zip(commits, listed, strict=True) if blob in naming and _recorded(verdicts[blob], one)]
    if not made:
        raise DataError(f"no commit's dvc.lock explains what is in production: {named} ({digest[:SHORTEST]})", "`git fetch --all --tags`; nothing was deleted")
    return Reference(name=named, why="in production", commits=tuple(made))


def _named(verdict: str) -> str:
    """The engine digest that a verdict is about."""
    try:
        return str(json.loads(verdict).get("digest"))
    except (json.JSONDecodeError, AttributeError):  # an early one, of another form
        return ""


def _recorded(verdict: str, revision: str) -> bool:
    """Whether the dvc.lock of a commit holds this very verdict."""
    lock = file_at(revision, LOCK)
    return lock is not None and hashlib.md5(verdict.encode(), usedforsecurity=False).hexdigest() in digests(lock, f"{LOCK} of {revision[:12]}")
