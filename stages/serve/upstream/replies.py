"""An upstream model's answer in the forms of this service: its text, and the log-probabilities that it told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.serve.replies import ChatForm, Piece, TextForm
from stages.serve.text import TextStream
from stages.serve.wire import ChatLogprob, ChatLogprobs, TextLogprobs, TopLogprob


class Said(TextStream):
    """The text of an answer, without a tokenizer of its own."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        """Args: encode: gives the tokens that it is taken for."""
        self._encode, self._said = encode, list[str]()

    @property
    def text(self) -> str:
        """All so far."""
        return "".join(self._said)

    @property
    def tokens(self) -> list[int]:  # type: ignore[override]
        """About as many as the upstream's."""
        return self._encode(self.text)

    def made_of(self, length: int) -> int:
        """No bound: of a stop text the upstream itself says nothing."""
        return sys.maxsize

    def add(self, text: str) -> None:
        """Go on."""
        self._said.append(text)


@dataclass(frozen=True, kw_only=True)
class PassedOn(ChatForm):
    """Chat completions with the upstream's own log-probabilities."""

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return None if piece.logprobs is None else ChatLogprobs(content=list(piece.logprobs))


@dataclass(frozen=True, kw_only=True)
class TextPassedOn(TextForm):
    """Completions with them."""

    def _listed(self, piece: Piece) -> TextLogprobs | None:
        if piece.logprobs is None:
            return None
        told: list[ChatLogprob] = list(piece.logprobs)  # type: ignore[arg-type]
        offsets = [piece.offset + sum(len(t.token) for t in told[:i]) for i in range(len(told))]
        tops = [{top.token: top.logprob for top in t.top_logprobs} for t in told]
        return TextLogprobs(tokens=[t.token for t in told], token_logprobs=[t.logprob for t in told], top_logprobs=tops, text_offset=offsets)


def logprobs(told: Any) -> list[ChatLogprob]:
    """The upstream's, of either API."""
    if told is None:
        return []
    if getattr(told, "content", None) is not None:
        return [ChatLogprob(**_named(t), top_logprobs=[TopLogprob(**_named(top)) for top in t.top_logprobs or []]) for t in told.content]
    tokens, tops = getattr(told, "tokens", None) or [], getattr(told, "top_logprobs", None)
    return [
        ChatLogprob(token=token, logprob=value or 0.0, bytes=None, top_logprobs=[TopLogprob(token=n, logprob=v, bytes=None) for n, v in (top or {}).items()])
        for token, value, top in zip(tokens, told.token_logprobs or [], tops or [None] * len(tokens), strict=False)
    ]


def _named(told: Any) -> dict[str, Any]:
    return {"token": told.token, "logprob": told.logprob, "bytes": told.bytes}
