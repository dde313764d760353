"""One request's way to an upstream model: what may leave, then the same guard, limits, forms and events as for a model of our own.

There are no slots: one task in the event loop sends the request, whatever its number of answers, and hands each answer's text on as it comes. The
log-probabilities that it tells are of the model's own words, placeholders included.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from conf.schema import Classification
from stages.pii import find
from stages.serve.answers import Answers
from stages.serve.jobs import Job, Reason
from stages.serve.refusals import Refused
from stages.serve.upstream.letters import Letters
from stages.serve.upstream.line import HEADER, Line
from stages.serve.upstream.masks import Masks, Unmasked
from stages.serve.upstream.replies import PassedOn, Said, TextPassedOn, logprobs
from stages.serve.wire import ChatRequest, Usage

if TYPE_CHECKING:
    from stages.serve.upstream.engine import Part

ASIDE = {"model", "user", "metadata", "messages", "prompt", "stream_options", "max_tokens", "max_completion_tokens", "temperature"}
"""Parameters that do not leave, or in another form."""
AT_NOTHING = {"logit_bias", "store", "tools", "functions", "tool_choice", "parallel_tool_calls", "service_tier", "modalities", "echo", "best_of", "suffix"}
"""Parameters that ask for nothing at the values that are accepted."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class UpstreamAnswers(Answers):
    """The answers of one request."""

    line: Line
    classification: Classification
    gone: Callable[[], Awaitable[bool]]
    """Whether the client went away."""
    _task: asyncio.Task[None] | None = None
    _told_usage: Usage | None = None
    _opened: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        super().__post_init__()
        form = PassedOn if isinstance(self.request, ChatRequest) else TextPassedOn
        self.form = form(model=self.assistant.name, digest=self.assistant.digest, chat=self.assistant.engine.chat)

    async def start(self) -> None:
        """Let the guard look, and send the request; a stream has begun when this returns.

        Raises:
            Refused: it may not leave, cannot be answered, or the upstream refuses it.
            Gone: the client went away.
        """
        if self.classification not in (may := self.line.engine.upstream.classifications):
            what = f"the request is classified {self.classification!r}, and only {', '.join(may)} may leave for the upstream model"
            raise Refused(403, f"{what}: use a key with another classification, or the header {HEADER}", code="classification_not_allowed")
        await super().start()
        self.leaving = {"classification": self.classification}
        if self.guarded:
            return
        self._task = asyncio.create_task(self._run())
        self.line.send(self._task, self.jobs)
        if self.request.stream:
            await self._until(self._opened, self.gone)

    def cancel(self) -> None:
        """Nobody waits any more: the connection to the upstream is closed."""
        super().cancel()
        if self._task is not None:
            self._task.cancel()

    def usage(self) -> Usage:
        """Tokens, as the upstream counted them; about so many where it did not say."""
        return self._told_usage or super().usage()

    # ------------------------------------------------------------ what leaves

    def _new(self, prompt: list[int], sample: int, on_text: Callable[[str], None], on_end: Callable[[], None]) -> Job:
        """An answer that somebody else makes."""
        deadline, said = time.monotonic() + self.assistant.settings.limits.seconds, Said(self.assistant.engine.chat.encode)
        return Job(prompt=prompt, sampling=self.assistant.sampling(self.request), text=said, on_text=on_text, on_end=on_end, deadline=deadline)

    def _mask(self) -> tuple[Masks, dict[str, Any]]:
        """The request as it leaves.

        Raises:
            Refused: personal data in it cannot be masked.
        """
        asked, upstream = self._body(), self.line.engine.upstream
        prompts = [Letters.body(job.prompt) for job in self.jobs[:: self.request.n or 1]]
        asked |= prompts[0] if len(prompts) == 1 else {"prompt": [prompt["prompt"] for prompt in prompts]}
        formatted = asked.get("response_format")
        masks = self.line.engine.masks(asked, quoted=isinstance(formatted, dict) and formatted["type"] != "text")
        hidden = {name: masks.hide(value) for name, value in asked.items()}
        if find(json.dumps(hidden.get("response_format")), upstream.mask, upstream.phone_regions):
            what = "response_format holds personal data as a number, which cannot be masked: write it as a string"
            raise Refused(400, what, "response_format", "invalid_value")
        self.leaving["masked"] = masks.counts()
        return masks, hidden

    def _body(self) -> dict[str, Any]:
        """The parameters."""
        sampling, request = self.assistant.sampling(self.request), self.request
        body: dict[str, Any] = request.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=ASIDE | AT_NOTHING)
        name = self.line.engine.upstream.limit if isinstance(request, ChatRequest) else "max_tokens"
        body |= {name: sampling.max_tokens, "temperature": sampling.temperature}
        return body | ({"stream_options": {"include_usage": True}} if request.stream else {})

    # ------------------------------------------------------------ what comes

    async def _run(self) -> None:
        settings, reasons = self.assistant.settings, dict[int, Reason]()
        try:
            async with asyncio.timeout(settings.limits.seconds):
                masks, hidden = await anyio.to_thread.run_sync(self._mask)
                unmasked = [Unmasked(masks) for _ in self.jobs]
                for job in self.jobs:
                    job.begin()
                async for part in self.line.engine.ask(self.line.client, hidden, masks, self._count, len(self.jobs)):
                    if part.finish_reason is not None:
                        reasons[part.index] = part.finish_reason if part.finish_reason in ("length", "content_filter") else "stop"  # type: ignore[assignment]
                    await anyio.to_thread.run_sync(self._take, part, unmasked[part.index], limiter=self.line.admission.threads)  # the guard reads it
                    self._opened.set()
            for index, job in enumerate(self.jobs):
                rest = unmasked[index].finish()
                job.text.add(rest)  # type: ignore[attr-defined]
                await anyio.to_thread.run_sync(job.end, reasons.get(index, "stop"), rest, limiter=self.line.admission.threads)
        except TimeoutError:
            self._fail(Refused(504, "the answer took longer than the service allows", code="timeout"), "timeout")
        except Refused as refused:
            self._fail(refused)
        except Exception:  # of ours: the client is told, and the log has the traceback
            log.exception("an answer of the upstream failed")
            self._fail(Refused(500, "the engine failed; the log of the service says why", code="engine_failed"))
        finally:
            for job in self.jobs:
                job.end("cancelled")
            self._opened.set()

    def _fail(self, failure: Refused, reason: Reason = "failed") -> None:
        for job in self.jobs:
            job.failure = failure
            job.end(reason)

    def _take(self, part: Part, shown: Unmasked) -> None:
        job, text = self.jobs[part.index], shown.push(part.text)
        job.first = job.first or time.monotonic()
        job.logprobs += logprobs(part.logprobs)  # type: ignore[arg-type]
        if text:
            job.text.add(text)  # type: ignore[attr-defined]
            job.on_text(text)

    def _count(self, asked: int, given: int) -> None:
        self._told_usage = Usage(prompt_tokens=asked, completion_tokens=given, total_tokens=asked + given)

    def _told(self, index: int) -> Any:
        wanted = self.request.logprobs
        return None if wanted is None or wanted is False else self.shown[index].logprobs
