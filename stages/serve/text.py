"""Tokens into text as they come: no half characters, nothing from the first stop text on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stages.serve.chat import Chat
from stages.serve.engine import Completion, Sampling

BROKEN = "\ufffd"


class TextStream:
    """The text of a growing list of tokens.

    Attributes:
        tokens: what was pushed.
        stopped: a stop text has come; further tokens are ignored.
    """

    def __init__(self, chat: Chat, stop: Sequence[str] = ()) -> None:
        """Args: stop: texts that end the answer; empty ones are ignored."""
        self._chat, self._stop = chat, tuple(s for s in stop if s)
        self._given = 0
        self.tokens: list[int] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, cut before the first stop text."""
        return cut(self._chat.decode(self.tokens), self._stop)[0]

    def made_of(self, length: int) -> int:
        """How many of the tokens it takes to make the first so many characters of the text."""
        text, count = self.text[:length], len(self.tokens)
        while count and self._chat.decode(self.tokens[: count - 1])[:length] == text:
            count -= 1
        return count

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, which may be empty."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        text, self.stopped = cut(self._chat.decode(self.tokens), self._stop)
        return self._release(text if self.stopped else text[: len(text) - _uncertain(text, self._stop)])

    def finish(self) -> str:
        """What was held back, at the end."""
        return self._release(self.text)

    def _release(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece


def completed(chat: Chat, count: int, sampling: Sampling, decode: Callable[[Callable[[int, int], bool]], None]) -> list[Completion]:
    """So many answers, each ended by an end token or a stop text. Args: decode: tells `on_token` every token, as of `Engine.decode`."""
    texts, ended = [TextStream(chat, sampling.stop) for _ in range(count)], [False] * count

    def on_token(index: int, token: int) -> bool:
        if token not in chat.eos_ids:
            texts[index].push(token)
        ended[index] = token in chat.eos_ids or texts[index].stopped
        return ended[index]

    decode(on_token)
    return [Completion(tokens=t.tokens, text=t.text, finish_reason="stop" if done else "length") for t, done in zip(texts, ended, strict=True)]


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the earliest stop text, and whether there was one."""
    found = [at for s in stop if s and (at := text.find(s)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _uncertain(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may still change: a half character, or the beginning of a stop text."""
    broken = len(text) - len(text.rstrip(BROKEN))
    return max(_begun(text, stop), broken + _begun(text[: len(text) - broken], stop))


def _begun(text: str, stop: Sequence[str]) -> int:
    """The longest end of the text, in characters, with which a stop text begins."""
    return max((n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
