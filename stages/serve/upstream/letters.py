"""Text as tokens, where nobody here knows those of the model: four characters are one, which is what a token is worth in English.

Limits are counted in it, and so is a usage that the upstream does not tell. A conversation is its JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from stages.serve.chat import Chat

FOUR, BITS = 4, 21
"""Characters in a token, and bits of each: a code point, one up, so that none is 0."""
MARK = "\0"
"""Before the JSON of a conversation: no prompt of a user holds one."""


class Letters(Chat):
    """In the place of a tokenizer and a chat template."""

    longest = FOUR

    def __init__(self, folder: Path) -> None:
        """Args: folder: for messages."""
        self.folder, self.vocab_size, self.eos_ids = folder, 1 << FOUR * BITS, set()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Four characters each."""
        return [sum(ord(c) + 1 << BITS * i for i, c in enumerate(text[at : at + FOUR])) for at in range(0, len(text), FOUR)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text again."""
        return self.text(ids)

    @staticmethod
    def text(ids: Iterable[int]) -> str:
        """The text of tokens."""
        codes = (token >> BITS * i & (1 << BITS) - 1 for token in ids for i in range(FOUR))
        return "".join(chr(code - 1) for code in codes if code)

    def render(self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str:
        """The conversation as the upstream gets it."""
        return MARK + json.dumps([dict(message) for message in messages], ensure_ascii=False)

    def defuse(self, text: str) -> str:
        """The text as it is: what the upstream's control tokens are, it knows itself."""
        return text

    @classmethod
    def body(cls, prompt: Sequence[int]) -> dict[str, JsonValue]:
        """A prompt as a part of the request: `messages` or `prompt`."""
        text = cls.text(prompt)
        return {"messages": json.loads(text[len(MARK) :])} if text.startswith(MARK) else {"prompt": text}
