"""One request's way through guard, queue, engine and guard again, seen from the event loop: whole, or as server-sent events.

Nothing here blocks the loop: guard and tokenizer run in a thread, the engine in the slots of the scheduler, and there the guard reads what the model says.
An answer that it refuses ends with `content_filter`: of a stream stays what was let go before, a whole answer is `serve.guard.refusal`. When the client
goes away, whole or streaming, its answers are cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import anyio.to_thread
import orjson
from pydantic import BaseModel

from stages.serve.admission import Full
from stages.serve.assistant import Assistant, texts
from stages.serve.guard.guard import Screened
from stages.serve.guard.verdict import worst
from stages.serve.jobs import Job
from stages.serve.refusals import Refused
from stages.serve.replies import ChatForm, Piece, TextForm
from stages.serve.scheduler import Scheduler
from stages.serve.shown import Shown
from stages.serve.steering import TokenLogprob
from stages.serve.wire import ChatRequest, CompletionRequest, FinishReason, Usage

if TYPE_CHECKING:
    from stages.serve.upstream.line import Line

LOOK = 0.25
"""Seconds between two looks whether a client that waits for a whole answer is still there."""

log = logging.getLogger(__name__)


class Gone(Exception):
    """The client went away."""


@dataclass(kw_only=True)
class Answers:
    """The answers of one request."""

    assistant: Assistant
    scheduler: Scheduler | Line
    request: ChatRequest | CompletionRequest
    instructs: bool
    """Whether its sender may write a system prompt (`stages.serve.keys`)."""
    jobs: list[Job] = field(default_factory=list)
    leaving: dict[str, object] = field(default_factory=dict)
    """Of what leaves for an upstream model: its classification, and how much was masked, by kind."""
    shown: list[Shown] = field(default_factory=list)
    """Of each job, what the client sees."""
    screened: Screened | None = None
    """What the guard says of the request, once it has looked."""

    def __post_init__(self) -> None:
        form = ChatForm if isinstance(self.request, ChatRequest) else TextForm
        self.form = form(model=self.assistant.name, digest=self.assistant.digest, chat=self.assistant.engine.chat)
        self._loop = asyncio.get_running_loop()
        self._news, self._begun = asyncio.Queue[News](), asyncio.Event()

    @property
    def guarded(self) -> bool:
        """The guard answers, not the model."""
        return self.screened is not None and not self.screened.verdict.allowed

    def verdict(self) -> dict[str, object] | None:
        """What the guard says of the request (`in`) and of each answer (`out`), for the event; null: it has not looked."""
        if self.screened is None:
            return None
        found = [self.screened.verdict, *(shown.watch.verdict() for shown in self.shown[: len(self.jobs)])]
        return {"action": worst(v.action for v in found), "in": found[0].facts(), "out": [v.facts() for v in found[1:]]}

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
        try:
            with self.scheduler.admission.entering(self.count) as before:
                await self._enter(before, time.monotonic())
        except Full:
            raise self.scheduler.admission.refusal() from None

    async def _enter(self, before: int, arrived: float) -> None:
        threads = self.scheduler.admission.threads
        prompts = await anyio.to_thread.run_sync(self.assistant.prompts, self.request, texts(self.request), limiter=threads)  # refuses what is too long to read
        self.screened = await anyio.to_thread.run_sync(self.assistant.screen, self.request, self.instructs, limiter=threads)
        if self.guarded:
            return
        jobs = await anyio.to_thread.run_sync(self._make, prompts, self.screened, limiter=threads)
        for place, job in enumerate(jobs, before + 1):
            job.place, job.arrived = place, arrived
        self.scheduler.submit(jobs)
        self.jobs = jobs

    def _make(self, prompts: list[list[int]], screened: Screened) -> list[Job]:
        if screened.texts != list(texts(self.request)):  # masked
            prompts = self.assistant.prompts(self.request, screened.texts)
        each = self.request.n or 1
        self.shown = [Shown(watch=self.assistant.watch(self.request, screened)) for _ in range(len(prompts) * each)]
        return [self._job(prompt, p * each + i, i) for p, prompt in enumerate(prompts) for i in range(each)]

    def _job(self, prompt: list[int], index: int, sample: int) -> Job:
        shown = self.shown[index]

        def tell(text: str, over: bool = False) -> None:
            if shown.over:
                return
            shown.over = over
            if over or (self.request.stream and text):
                self._loop.call_soon_threadsafe(self._news.put_nowait, News(index=index, text=text, logprobs=len(shown.logprobs), over=over))

        def on_text(text: str) -> None:
            given = shown.push(job, text)
            job.cancelled = job.cancelled or shown.watch.refused
            tell(given, over=shown.watch.refused)

        def on_end() -> None:
            rest = ""
            try:
                rest = shown.finish(job) if job.reason in ("stop", "length", "content_filter") else ""
            except Exception:  # of the guard: what it could not read does not leave, and whoever waits is told
                log.exception("the guard could not read an answer")
                job.reason = "failed"
            tell(rest, over=True)
            on_begin()

        def on_begin() -> None:
            self._loop.call_soon_threadsafe(self._begun.set)

        job = self._new(prompt, sample, on_text, on_end)
        job.on_begin = on_begin
        return job

    def _new(self, prompt: list[int], sample: int, on_text: Callable[[str], None], on_end: Callable[[], None]) -> Job:
        return self.assistant.job(self.request, prompt, sample, on_text, on_end)

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
        return self.form.whole([self._piece(i) for i in range(len(self.jobs))], self.usage())

    def _piece(self, index: int) -> Piece:
        """A whole answer."""
        job, shown = self.jobs[index], self.shown[index]
        if shown.watch.refused:
            return self._refusal(index)
        return Piece(index=index, text=shown.text, finish_reason=_reason(job), logprobs=self._told(index))

    def _refusal(self, index: int) -> Piece:
        return Piece(index=index, text=self.assistant.settings.guard.refusal, finish_reason="content_filter")

    def _told(self, index: int) -> list[TokenLogprob] | None:
        steering = self.jobs[index].steering
        return self.shown[index].logprobs if steering is not None and steering.top is not None else None

    # ------------------------------------------------------------ in pieces

    async def begun(self, gone: Callable[[], Awaitable[bool]]) -> None:
        """Wait until work on an answer begins: before that, nothing of a stream is sent, and whoever waits may still be turned away.

        Args:
            gone: whether the client went away.

        Raises:
            Refused: the answers would come too late.
            Gone: the client went away.
        """
        if self.jobs:
            await self._until(self._begun, gone)

    async def _until(self, told: asyncio.Event, gone: Callable[[], Awaitable[bool]]) -> None:
        """As `begun`, until that is told."""
        while not told.is_set():
            try:
                await asyncio.wait_for(told.wait(), LOOK)
            except TimeoutError:
                if await gone():
                    self.cancel()
                    raise Gone from None
        if (failed := next((job.failure for job in self.jobs if job.failure), None)) is not None:
            self.cancel()
            raise failed

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
            news = await self._news.get()
            index, told = news.index, self._told(news.index)
            left -= news.over
            if news.over and self.shown[index].watch.refused:
                last = self._refusal(index)
                yield replace(last, text="", offset=offsets[index]) if offsets[index] else last
                continue
            reason, fresh = _reason(self.jobs[index]) if news.over else None, (told or [])[given[index] : news.logprobs]
            yield Piece(index=index, text=news.text, finish_reason=reason, logprobs=fresh or None, offset=offsets[index])
            given[index] = news.logprobs
            offsets[index] += len(news.text)


@dataclass(frozen=True, kw_only=True)
class News:
    """What became of one answer."""

    index: int
    text: str
    logprobs: int
    """How many may be told by now."""
    over: bool


def _event(body: BaseModel) -> bytes:
    return b"data: " + body.model_dump_json(exclude_unset=False).encode() + b"\n\n"


def _reason(job: Job) -> FinishReason:
    """How an answer ended.

    Raises:
        Refused: it did not end well.
    """
    if job.failure is not None:
        raise job.failure
    match job.reason:
        case "stop" | "length" | "content_filter":
            return job.reason
        case "timeout":
            raise Refused(504, "the answer took longer than the service allows", code="timeout")
        case "failed" if job.steering is not None and job.steering.constraint is not None and job.error:
            raise Refused(400, job.error, "response_format", "invalid_value")
        case "cancelled":
            raise Refused(503, "the service is shutting down", code="shutting_down", retry_after=10)
    raise Refused(500, "the engine failed; the log of the service says why", code="engine_failed")
