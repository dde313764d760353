"""One request's way through guard, queue and engine, seen from the event loop: whole, or as server-sent events.

Nothing here blocks the loop: guard and tokenizer run in a thread, the engine in the slots of the scheduler. When the client goes away, whole
or streaming, its answers are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import anyio.to_thread
import orjson
from pydantic import BaseModel

from stages.serve.assistant import Assistant
from stages.serve.jobs import Full, Job
from stages.serve.refusals import Refused
from stages.serve.replies import ChatForm, Piece, TextForm
from stages.serve.scheduler import Scheduler
from stages.serve.steering import TokenLogprob
from stages.serve.wire import ChatRequest, CompletionRequest, FinishReason, Usage

LOOK = 0.25
"""Seconds between two looks whether a client that waits for a whole answer is still there."""


class Gone(Exception):
    """The client went away."""


@dataclass(kw_only=True)
class Answers:
    """The answers of one request."""

    assistant: Assistant
    scheduler: Scheduler
    request: ChatRequest | CompletionRequest
    jobs: list[Job] = field(default_factory=list)
    verdict: dict[str, object] = field(default_factory=dict)
    """The guard's, once it has looked."""

    def __post_init__(self) -> None:
        form = ChatForm if isinstance(self.request, ChatRequest) else TextForm
        self.form = form(model=self.assistant.name, digest=self.assistant.digest, chat=self.assistant.engine.chat)
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Queue[tuple[int, str, int]]()

    @property
    def guarded(self) -> bool:
        """The guard answers, not the model."""
        return self.verdict.get("allowed") is False

    @property
    def count(self) -> int:
        """How many answers there are."""
        prompts = 1 if isinstance(self.request, ChatRequest) or isinstance(self.request.prompt, str) else len(self.request.prompt)
        return prompts * (self.request.n or 1)

    async def start(self) -> None:
        """Let the guard look, and queue the answers.

        Raises:
            Refused: the request cannot be answered, or the queue is full.
        """
        if self.request.stream_options is not None and not self.request.stream:
            raise Refused(400, "stream_options needs stream: true", "stream_options", "invalid_value")
        if self.count > (most := self.assistant.settings.limits.waiting):
            raise Refused(400, f"{self.count} answers; this service holds {most} at a time", "n", "invalid_value")
        self.verdict = await anyio.to_thread.run_sync(self.assistant.verdict, self.request)
        if self.guarded:
            return
        jobs = await anyio.to_thread.run_sync(self._make)
        try:
            self.scheduler.submit(jobs)
        except Full:  # nothing was begun, and nothing is charged
            raise Refused(429, "the service has as much to do as it can hold: come again", code="overloaded", retry_after=self.scheduler.wait()) from None
        self.jobs = jobs

    def _make(self) -> list[Job]:
        prompts, each = self.assistant.prompts(self.request), self.request.n or 1
        return [self._job(prompt, p * each + i, i) for p, prompt in enumerate(prompts) for i in range(each)]

    def _job(self, prompt: list[int], index: int, sample: int) -> Job:
        def tell(text: str, logprobs: int = -1) -> None:
            self._loop.call_soon_threadsafe(self._news.put_nowait, (index, text, logprobs))

        def on_text(text: str) -> None:
            if self.request.stream:
                tell(text, len(job.logprobs))

        job = self.assistant.job(self.request, prompt, sample, on_text, lambda: tell(""))
        return job

    def cancel(self) -> None:
        """Nobody waits any more."""
        for job in self.jobs:
            job.cancelled = True

    def usage(self) -> Usage:
        """Tokens; a prompt counts once, however many answers it has."""
        asked = sum(len(job.prompt) for job in self.jobs[:: self.request.n or 1])
        given = sum(len(job.tokens) for job in self.jobs)
        if self.guarded:
            given = len(self.assistant.engine.chat.encode(self.assistant.settings.guard.refusal))
        return Usage(prompt_tokens=asked, completion_tokens=given, total_tokens=asked + given)

    # ------------------------------------------------------------ whole

    async def whole(self, gone: Callable[[], Awaitable[bool]]) -> BaseModel:
        """Wait for all answers.

        Args:
            gone: whether the client went away.

        Raises:
            Refused: an answer failed or took too long.
            Gone: the client went away.
        """
        try:
            left = len(self.jobs)
            while left:
                try:
                    await asyncio.wait_for(self._news.get(), LOOK)
                    left -= 1
                except TimeoutError:
                    if await gone():
                        raise Gone from None
        finally:
            self.cancel()
        if self.guarded:
            return self.form.whole([self._refusal(i) for i in range(self.count)], self.usage())
        return self.form.whole(
            [Piece(index=i, text=j.text.text, finish_reason=_reason(j), logprobs=self._told(j)) for i, j in enumerate(self.jobs)], self.usage()
        )

    def _refusal(self, index: int) -> Piece:
        return Piece(index=index, text=self.assistant.settings.guard.refusal, finish_reason="content_filter")

    def _told(self, job: Job) -> list[TokenLogprob] | None:
        return job.logprobs if job.steering is not None and job.steering.top is not None else None

    # ------------------------------------------------------------ in pieces

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, the last one `[DONE]`; an answer that fails half-way is an event with `error`."""
        try:
            for body in self.form.openings(self.count):
                yield _event(body)
            if self.guarded:
                for index in range(self.count):
                    yield _event(self.form.chunk(self._refusal(index)))
            async for piece in self._pieces():
                yield _event(self.form.chunk(piece))
            if self.request.stream_options is not None and self.request.stream_options.include_usage:
                yield _event(self.form.last(self.usage()))
            yield b"data: [DONE]\n\n"
        except Refused as refused:
            yield b"data: " + orjson.dumps(refused.body()) + b"\n\n"
        finally:
            self.cancel()

    async def _pieces(self) -> AsyncIterator[Piece]:
        given, offsets, left = [0] * len(self.jobs), [0] * len(self.jobs), len(self.jobs)
        while left:
            index, text, logprobs = await self._news.get()
            job, over = self.jobs[index], logprobs < 0
            told = self._told(job)
            upto = len(job.logprobs) if over else logprobs
            fresh, given[index] = (None if told is None else told[given[index] : upto]), upto
            yield Piece(index=index, text=text, finish_reason=_reason(job) if over else None, logprobs=fresh or None, offset=offsets[index])
            offsets[index] += len(text)
            left -= over


def _event(body: BaseModel) -> bytes:
    return b"data: " + body.model_dump_json(exclude_unset=False).encode() + b"\n\n"


def _reason(job: Job) -> FinishReason:
    """How an answer ended.

    Raises:
        Refused: it did not end well.
    """
    match job.reason:
        case "stop" | "length":
            return job.reason
        case "timeout":
            raise Refused(504, "the answer took longer than the service allows", code="timeout")
        case "failed" if job.steering is not None and job.steering.constraint is not None and job.error:
            raise Refused(400, job.error, "response_format", "invalid_value")
        case "cancelled":
            raise Refused(503, "the service is shutting down", code="shutting_down", retry_after=10)
    raise Refused(500, "the engine failed; the log of the service says why", code="engine_failed")
