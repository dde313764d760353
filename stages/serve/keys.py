"""API keys and their budgets.

    python -m stages.serve.keys web --scopes answer feedback system --days 90    # prints the key once, and the entry for the list

The list is a JSON array of entries: in a file whose path `TRUNKLINE_API_KEYS` holds, or in that variable itself. It holds digests and no
secrets; a key has 256 random bits, so that a plain SHA-256 is enough. Without the variable the service is open, and says so at its start.

Budgets are per key and minute, in this process. Requests are counted in a sliding window, but for those that the service was too busy to answer. Tokens
are charged when an answer has ended, in windows of a minute: what is already on its way when a budget is used up may still end.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, RateLimiter, SlidingWindowCounterRateLimiter
from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from conf.errors import ConfigError
from conf.schema import Classification
from stages.serve.refusals import Refused

VARIABLE = "TRUNKLINE_API_KEYS"
Scope = Literal["answer", "feedback", "system"]
FORM = re.compile(r"tk-([a-z0-9-]{1,40})\.([\w-]{43})", re.ASCII)


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Key:
    """An entry of the list."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    """Name, as events and metrics have it."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole key."""
    scopes: list[Scope]
    """`answer`: completions and models; `feedback`: ratings; `system`: its holder is an application, whose system prompts the guard takes for instructions.
    Those of another key it reads like a user's words, and in an open service everybody's are an application's."""
    expires: AwareDatetime | None = None
    """Null: never."""
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Of prompts and answers together."""
    classification: Classification | None = None
    """Of what is asked with it: whether that may leave for an upstream model. Null: the request says so itself."""


def may_instruct(key: Key | None) -> bool:
    """Whether who asks with it may write a system prompt; null: the service is open."""
    return key is None or "system" in key.scopes


def make(name: str, scopes: Sequence[str], expires: datetime | None, classification: str | None = None) -> tuple[str, dict[str, object]]:
    """A new key, and its entry."""
    key = f"tk-{name}.{secrets.token_urlsafe(32)}"
    entry: dict[str, object] = {"id": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "scopes": list(scopes)}
    more = {"expires": expires.isoformat(timespec="seconds") if expires else None, "classification": classification}
    return key, entry | {name: value for name, value in more.items() if value is not None}


def read(environment: Mapping[str, str]) -> list[Key]:
    """The list; empty where the variable is not set.

    Raises:
        ConfigError: it is no list of entries, or has a name twice.
    """
    if not (value := environment.get(VARIABLE, "")):
        return []
    inline = value.lstrip().startswith("[")
    where = VARIABLE if inline else f"{VARIABLE}: {value}"
    try:
        keys = TypeAdapter(list[Key]).validate_json(value if inline else Path(value).read_bytes())
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}", "name a file that can be read, or unset the variable for an open service") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}", "make entries with `python -m stages.serve.keys <name>`") from error
    if not keys or len({key.id for key in keys}) < len(keys):
        raise ConfigError(
            f"{where}: {'a name stands twice' if keys else 'the list is empty'}", "give each key a name of its own; unset the variable for an open service"
        )
    return keys


class Keyring:
    """Says who asks, and whether he may."""

    def __init__(self, keys: Sequence[Key]) -> None:
        """Args: keys: none: everybody may."""
        self._keys = {key.id: key for key in keys}
        self._requests, self._tokens = SlidingWindowCounterRateLimiter(MemoryStorage()), FixedWindowRateLimiter(MemoryStorage())

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return not self._keys

    def admit(self, authorization: str, scope: Scope) -> Key | None:
        """Who asks; null in an open service. The request is counted.

        Args:
            authorization: the header, `Bearer tk-…`.

        Raises:
            Refused: 401 without a right key, 403 without the scope, 429 over a budget.
        """
        if self.open:
            return None
        key = self._find(authorization.removeprefix("Bearer ").strip())
        if scope not in key.scopes:
            raise Refused(403, f"the key {key.id} has no scope {scope!r}", code="insufficient_scope")
        if key.tokens_per_minute is not None:
            self._within(self._tokens, key, f"used its {key.tokens_per_minute} tokens", RateLimitItemPerMinute(key.tokens_per_minute), 0)
        if key.requests_per_minute is not None:
            self._within(self._requests, key, f"made its {key.requests_per_minute} requests", RateLimitItemPerMinute(key.requests_per_minute), 1)
        return key

    def _within(self, limiter: RateLimiter, key: Key, what: str, budget: RateLimitItem, cost: int) -> None:
        """Take from a budget.

        Args:
            what: the key has done when the budget is used up.
            cost: 0: only look whether anything is left.

        Raises:
            Refused: 429: there is not enough left.
        """
        if not (limiter.hit(budget, key.id, cost=cost) if cost else limiter.test(budget, key.id)):
            until = limiter.get_window_stats(budget, key.id).reset_time
            raise Refused(429, f"the key {key.id} has {what} of this minute", code="rate_limit_exceeded", retry_after=until - time.time())

    def _find(self, given: str) -> Key:
        match = FORM.fullmatch(given)
        key = self._keys.get(match[1]) if match else None
        digest = hashlib.sha256(given.encode()).hexdigest()
        right = hmac.compare_digest(digest, key.sha256 if key else "0" * 64)
        if key is None or not right:
            raise Refused(401, "there is no such API key" if given else "no API key: send the header `Authorization: Bearer <key>`", code="invalid_api_key")
        if key.expires is not None and key.expires < datetime.now(UTC):
            raise Refused(401, f"the key {key.id} expired at {key.expires.isoformat()}", code="invalid_api_key")
        return key

    def give_back(self, key: Key | None) -> None:
        """Count a request no more: it was turned away, and nothing was done for it."""
        if key is not None and key.requests_per_minute is not None:
            self._requests.hit(RateLimitItemPerMinute(key.requests_per_minute), key.id, cost=-1)

    def charge(self, key: Key | None, tokens: int) -> None:
        """Take tokens from a key's budget."""
        if key is not None and key.tokens_per_minute is not None and tokens:
            self._tokens.hit(RateLimitItemPerMinute(key.tokens_per_minute), key.id, cost=tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a key."""
    parser = argparse.ArgumentParser(prog="python -m stages.serve.keys", description="Make an API key: it goes to stdout, its entry for the list to stderr.")
    parser.add_argument("name", help="small letters, digits and hyphens")
    parser.add_argument("--scopes", nargs="+", choices=get_args(Scope), default=get_args(Scope), help="without `system` for a key in users' own hands")
    parser.add_argument("--days", type=int, help="until it expires; never, if not given")
    parser.add_argument("--classification", choices=get_args(Classification), help="of what is asked with it, for an upstream model")
    given = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z0-9-]{1,40}", given.name):
        parser.error(f"{given.name!r} is no name: small letters, digits and hyphens, at most 40")
    key, entry = make(given.name, given.scopes, datetime.now(UTC) + timedelta(days=given.days) if given.days else None, given.classification)
    sys.stdout.write(f"{key}\n")
    sys.stderr.write(f"{json.dumps(entry)}\n")


def keyring() -> Keyring:
    """What the environment says."""
    return Keyring(read(os.environ))


if __name__ == "__main__":
    main()
