"""The engine that is somebody else's: any server with OpenAI's wire format, asked by OpenAI's own client.

The client repeats what failed, with backoff and as Retry-After says, reads server-sent events and knows every error by its class; with httpx all
of that would be code of this repository. What leaves has its personal data masked, and what comes has it put back (`stages.serve.upstream.masks`).

The engine's folder holds `upstream.json`, which export wrote: the settings of `serve.upstream`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient, Omit
from pydantic import JsonValue, TypeAdapter, ValidationError

from conf.errors import ConfigError, ModelError
from conf.schema import EngineSettings, Upstream
from stages.serve.chat import Chat
from stages.serve.engine import UPSTREAM, Completion, Sampling, Score
from stages.serve.refusals import Refused
from stages.serve.text import cut
from stages.serve.upstream.letters import Letters
from stages.serve.upstream.masks import Masks, Unmasked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Client = AsyncOpenAI
NO_TOKENS = "serve.engine.kind=upstream: a third party's model answers, and tells no {}"
REMEDY = "choose tasks with `output_type: generate_until`, or an engine that has the weights"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is new of one answer."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    logprobs: Any = None
    """OpenAI's object, or null."""


class UpstreamEngine:
    """What runs nothing here."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        """Read what is asked.

        Raises:
            ModelError: the folder does not say it.
            ConfigError: the key is not in the environment.
        """
        self.chat: Chat = Letters(folder)
        self._batch = settings.batch
        try:
            self.upstream = TypeAdapter(Upstream).validate_json((folder / UPSTREAM).read_bytes())
        except (OSError, ValidationError) as error:
            raise ModelError(f"{folder / UPSTREAM} names no upstream: {error}", "run `dvc repro export`, or `dvc pull`") from error
        self._key = read_key(self.upstream, os.environ)

    def client(self) -> AsyncOpenAI:
        """A client for one event loop."""
        own: Any = {name: Omit() for name in ("OpenAI-Organization", "OpenAI-Project")}  # the client would take them from the environment
        http = DefaultAsyncHttpxClient(follow_redirects=False)  # what may leave for one address may not for another
        asked = self.upstream
        return AsyncOpenAI(api_key=self._key, base_url=asked.url, timeout=asked.timeout, max_retries=asked.retries, default_headers=own, http_client=http)

    def masks(self, body: JsonValue, quoted: bool = False) -> Masks:
        """For one request."""
        return Masks(body, self.upstream.mask, self.upstream.phone_regions, quoted=quoted)

    async def ask(
        self, client: AsyncOpenAI, body: Mapping[str, Any], masks: Masks, tell: Callable[[int, int], None] = lambda *_: None, count: int = 1
    ) -> AsyncIterator[Part]:
        """Send a masked body; the parts of all answers as they come, still masked.

        Args:
            body: of chat completions if it has `messages`, of completions otherwise; `stream` as wanted.
            count: answers that it asks for.
            masks: puts personal data back into an error's message.
            tell: gets the tokens of prompts and answers.

        Raises:
            Refused: the upstream does not answer, in the status and the words that a client of ours can use.
        """
        chat, streamed = "messages" in body, bool(body.get("stream"))
        ended = set[int]()
        create: Any = client.chat.completions.create if chat else client.completions.create
        try:
            reply = await create(model=self.upstream.model, **body)
            if not streamed:
                self._tell(reply, tell)
                for choice in reply.choices[:count]:
                    ended.add(choice.index)
                    yield self._part(choice, choice.message if chat else None, count)
            else:
                async with reply as chunks:
                    async for chunk in chunks:
                        self._tell(chunk, tell)
                        for choice in chunk.choices:
                            ended |= {choice.index} if choice.finish_reason else set()
                            yield self._part(choice, choice.delta if chat else None, count)
            if ended != set(range(count)):
                raise self._broken(f"{len(ended)} of {count} answers have an end")
        except APITimeoutError as error:
            raise self._silent() from error
        except APIStatusError as error:
            self._refuse(error, masks)
        except APIConnectionError as error:
            raise self._broken(f"it cannot be reached: {type(error.__cause__ or error).__name__}") from error
        except APIError as error:  # an event with `error` in a stream
            raise self._broken(masks.show(str(error.message))) from error
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise self._broken(f"it broke off, or its answer has not OpenAI's form: {type(error).__name__}") from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise
            if type(error).__name__ == "ReadTimeout":
                raise self._silent() from error
            raise self._broken(f"the connection broke: {type(error).__name__}") from error

    def _silent(self) -> Refused:
        return Refused(504, f"the upstream said nothing for {self.upstream.timeout:g} seconds: come again", code="upstream_timeout")

    def _part(self, choice: Any, said: Any, count: int) -> Part:
        """From a choice; `said`: its message or delta, null in completions."""
        text = (choice.text if said is None else said.content or getattr(said, "refusal", None)) or ""
        if choice.index not in range(count) or not isinstance(text, str):
            raise self._broken("its answer has not OpenAI's form")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair is no text
        return Part(index=choice.index, text=text, finish_reason=choice.finish_reason, logprobs=choice.logprobs)

    @staticmethod
    def _tell(reply: Any, tell: Callable[[int, int], None]) -> None:
        if reply.usage is not None:
            tell(reply.usage.prompt_tokens, reply.usage.completion_tokens)

    def _broken(self, why: str) -> Refused:
        return Refused(502, f"the upstream failed: {why}", code="upstream_failed")

    def _refuse(self, error: APIStatusError, masks: Masks) -> NoReturn:
        told: Any = error.body if isinstance(error.body, Mapping) else {}
        message, param, code = masks.show(str(told.get("message") or error.message)), told.get("param"), told.get("code")
        match error.status_code:
            case 429:
                after = error.response.headers.get("retry-after", "")
                wait = float(after) if after.isascii() and after.replace(".", "", 1).isdigit() else 10.0
                raise Refused(429, f"the upstream has too much to do: {message}", code="upstream_overloaded", retry_after=wait) from error
            case 401 | 403:  # its words may quote the key
                named = self.upstream.key_env or "none: set serve.upstream.key_env"
                raise Refused(502, f"the upstream does not take this service's key ({named})", code="upstream_key") from error
            case 404:
                raise Refused(502, f"the upstream has no model {self.upstream.model!r}, or serve.upstream.url is wrong", code="upstream_not_found") from error
            case 408 | 504:
                raise Refused(504, "the upstream took too long: come again", code="upstream_timeout") from error
            case status if status < 400:
                raise self._broken(f"it sends elsewhere ({status}), and nothing is sent there: mend serve.upstream.url") from error
            case status if status < 500:
                raise Refused(400, f"the upstream refuses it: {message}", param if isinstance(param, str) else None, str(code or "invalid_value")) from error
        raise self._broken(f"{error.status_code}: {message}") from error

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Answer each prompt; `serve.engine.batch` of them at a time.

        Raises:
            ModelError: the upstream does not answer one.
        """

        async def all_of_them() -> list[Completion]:
            at_a_time = asyncio.Semaphore(self._batch)
            async with self.client() as client:

                async def one(prompt: Sequence[int]) -> Completion:
                    async with at_a_time:
                        return await self._answer(client, prompt, sampling)

                return await asyncio.gather(*map(one, prompts))

        try:
            return asyncio.run(all_of_them())
        except Refused as refused:
            raise ModelError(f"{self.upstream.url}: {refused.message}", "see serve.upstream in conf/serve/, and run the stage again") from refused

    async def _answer(self, client: AsyncOpenAI, prompt: Sequence[int], sampling: Sampling) -> Completion:
        body = Letters.body(prompt)
        limit = self.upstream.limit if "messages" in body else "max_tokens"
        body |= {limit: sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p, "stop": list(sampling.stop[:4]) or None}
        masks = self.masks(body)
        hidden, shown, text, reason = masks.hide(body), Unmasked(masks), "", "stop"
        assert isinstance(hidden, dict)
        async for part in self.ask(client, {name: value for name, value in hidden.items() if value is not None}, masks):
            text, reason = text + shown.push(part.text), part.finish_reason or reason
        text, _ = cut(text + shown.finish(), sampling.stop)
        return Completion(tokens=self.chat.encode(text), text=text, finish_reason="length" if reason == "length" else "stop")

    def decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: Callable[[int, int], bool]) -> None:
        """Not here: the service asks through `stages.serve.upstream.answers`."""
        raise ConfigError(NO_TOKENS.format("tokens"), REMEDY)

    def live(self) -> None:
        """Nobody: `stages.serve.upstream.line` is in the scheduler's place."""

    def draft(self, prompt: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
        """Not here: there are no logits."""
        raise ConfigError(NO_TOKENS.format("logits"), REMEDY)

    def keep(self, prefix: Sequence[int]) -> None:
        """Nothing."""

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> list[list[Score]]:
        """Not here: the wire format has no likelihood of a given answer."""
        raise ConfigError(NO_TOKENS.format("likelihoods of given answers (multiple choice, perplexity)"), REMEDY)

    def logprobs(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        """Not here: nor the likelihoods of a prompt."""
        raise ConfigError(NO_TOKENS.format("log-probabilities of a prompt"), REMEDY)


def read_key(upstream: Upstream, environment: Mapping[str, str]) -> str:
    """The API key.

    Raises:
        ConfigError: one is named, and it is not there.
    """
    key = environment.get(upstream.key_env, "") if upstream.key_env else "none"
    if not key:
        raise ConfigError(f"serve.upstream.key_env: the environment has no {upstream.key_env}", "set it to the upstream's API key")
    return key
