"""From finished and unfinished answers to OpenAI's bodies: one shape for chat completions, one for completions, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from stages.serve.chat import Chat
from stages.serve.steering import TokenLogprob
from stages.serve.wire import (
    ChatChoice,
    ChatChunk,
    ChatLogprob,
    ChatLogprobs,
    ChatReply,
    ChunkChoice,
    Delta,
    FinishReason,
    Message,
    TextChoice,
    TextLogprobs,
    TextReply,
    TopLogprob,
    Usage,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of one answer, or all of it."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: Sequence[TokenLogprob] | None = None
    """Null: they are not told."""
    offset: int = 0
    """Characters of the answer before this piece."""


@dataclass(frozen=True, kw_only=True)
class ChatForm:
    """Bodies of one request's answers."""

    model: str
    digest: str
    chat: Chat
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _facts(self) -> dict[str, object]:
        return {"id": self.id, "created": self.created, "model": self.model, "system_fingerprint": self.digest}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> BaseModel:
        """The answer to a request without `stream`."""
        choices = [
            ChatChoice(index=p.index, message=Message(content=p.text), finish_reason=p.finish_reason or "stop", logprobs=self._logprobs(p)) for p in pieces
        ]
        return ChatReply(**self._facts(), choices=choices, usage=usage)

    def openings(self, count: int) -> Sequence[BaseModel]:
        """Chunks before the first text: the role of each answer."""
        return [self._chunk([ChunkChoice(index=i, delta=Delta(role="assistant", content=""))]) for i in range(count)]

    def chunk(self, piece: Piece) -> BaseModel:
        """One chunk."""
        return self._chunk(
            [ChunkChoice(index=piece.index, delta=Delta(content=piece.text or None), finish_reason=piece.finish_reason, logprobs=self._logprobs(piece))]
        )

    def last(self, usage: Usage) -> BaseModel:
        """The chunk of `include_usage`."""
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> BaseModel:
        return ChatChunk(**self._facts(), choices=choices, usage=usage)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if piece.logprobs is None:
            return None
        content = [
            ChatLogprob(
                **_named(self.chat, told.token, told.logprob), top_logprobs=[TopLogprob(**_named(self.chat, token, value)) for token, value in told.top]
            )
            for told in piece.logprobs
        ]
        return ChatLogprobs(content=content)


@dataclass(frozen=True, kw_only=True)
class TextForm(ChatForm):
    """Bodies of the older API."""

    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> BaseModel:
        """The answer to a request without `stream`."""
        return self._reply(pieces, usage)

    def openings(self, count: int) -> Sequence[BaseModel]:
        """There are none."""
        return []

    def chunk(self, piece: Piece) -> BaseModel:
        """One chunk."""
        return self._reply([piece], None)

    def last(self, usage: Usage) -> BaseModel:
        """The chunk of `include_usage`."""
        return self._reply([], usage)

    def _reply(self, pieces: Sequence[Piece], usage: Usage | None) -> BaseModel:
        choices = [TextChoice(index=p.index, text=p.text, finish_reason=p.finish_reason, logprobs=self._listed(p)) for p in pieces]
        return TextReply(**self._facts(), choices=choices, usage=usage)

    def _listed(self, piece: Piece) -> TextLogprobs | None:
        if piece.logprobs is None:
            return None
        names = [self.chat.decode([told.token], skip_special_tokens=False) for told in piece.logprobs]
        offsets = [piece.offset + sum(map(len, names[:i])) for i in range(len(names))]
        tops = [{self.chat.decode([token], skip_special_tokens=False): value for token, value in told.top} for told in piece.logprobs]
        return TextLogprobs(tokens=names, token_logprobs=[told.logprob for told in piece.logprobs], top_logprobs=tops, text_offset=offsets)


def _named(chat: Chat, token: int, logprob: float) -> dict[str, object]:
    """A token as text; half a character has no bytes here."""
    text = chat.decode([token], skip_special_tokens=False)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": None if "\ufffd" in text else list(text.encode())}
