"""A batch in which each answer comes and goes at any step.

What a new prompt has in common with the kept prefix, or with another answer at work, is not encoded again: it shares the cells. Of two that come
together with much in common, the second waits for the step in which the first is encoded. A step encodes the last token of every answer and, in all,
up to CHUNK tokens of the prompts that are new: a long prompt holds the others up for a part of it at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import ModelError
from stages.serve.contexts import Context, Entry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK = 96
"""Most tokens of new prompts in a step. Sixteen that come together to OpenVINO wait 0.33 s for their first word with 96, and 0.38 with 192."""
ALIKE = 16
"""Tokens in common with a prompt of the same step for which it is worth waiting."""
PREFIX = 0
"""Sequence of the kept prefix."""


@dataclass(kw_only=True)
class Place:
    """An answer at work."""

    tokens: list[int]
    """Of the prompt and the answer."""
    room: int
    """Cells that it may come to need."""
    done: int = 0
    """Tokens that are encoded."""


class LiveBatch:
    """Answers at work. For one thread."""

    def __init__(self, context: Context, places: int, prefix: Sequence[int] = ()) -> None:
        """Begin with an empty context.

        Args:
            context: of `places` + 1 sequences.
            places: most answers at a time.
            prefix: what most prompts begin with; encoded here, once.
        """
        self.context, self._prefix = context, list(prefix)
        self._places: dict[int, Place] = {}
        self._empty = list(range(places, 0, -1))
        self._free = context.cells - len(self._prefix)
        for start in range(0, len(self._prefix), CHUNK):
            part = enumerate(self._prefix[start : start + CHUNK], start)
            context.encode([Entry(token, at, PREFIX, False) for at, token in part])

    def join(self, prompt: Sequence[int], most: int) -> int | None:
        """Take an answer in.

        Args:
            most: tokens that it may have at most.

        Returns:
            The number of its place; null: there is no room at the moment.

        Raises:
            ModelError: the prompt is empty, has a token that is none of the model's, or there will never be room.
        """
        if not prompt:
            raise ModelError("an empty prompt cannot be answered", "put a message into it")
        room = len(prompt) + most - (shared := common(self._prefix, prompt))
        self.context.check(prompt, most + len(self._prefix) - shared)
        if not self._empty or room > self._free:
            return None
        self._free -= room
        place = self._empty.pop()
        self._places[place] = Place(tokens=list(prompt), room=room)
        return place

    def push(self, place: int, token: int) -> None:
        """Go on from this token in the next step."""
        self._places[place].tokens.append(token)

    def leave(self, place: int) -> None:
        """End an answer: its place and its cells are free."""
        self._free += self._places.pop(place).room
        self._empty.append(place)
        self.context.forget(place)

    def step(self) -> dict[int, NDArray[np.float32]]:
        """Encode on.

        Returns:
            Place -> logits after all of its tokens, of those that are encoded whole; valid until the next call.
        """
        entries, ready, fresh, left = list[Entry](), list[int](), list[Place](), CHUNK
        encoded = {PREFIX: self._prefix} | {number: place.tokens[: place.done] for number, place in self._places.items()}
        for number, place in sorted(self._places.items(), key=lambda item: len(item[1].tokens) - item[1].done > 1):
            if place.done == 0 and not self._begin(number, place, encoded, fresh):
                continue
            count = len(place.tokens) - place.done
            if count > 1:
                count = min(count, left)
                left -= count
                fresh.append(place)
            whole = place.done + count == len(place.tokens)
            entries += [Entry(place.tokens[at], at, number, whole and at == len(place.tokens) - 1) for at in range(place.done, place.done + count)]
            place.done += count
            ready += [number] * (whole and count > 0)
        return dict(zip(ready, self.context.encode(entries), strict=True)) if entries else {}

    def _begin(self, number: int, place: Place, encoded: Mapping[int, Sequence[int]], fresh: Sequence[Place]) -> bool:
        """Share what is encoded of a prompt already; false: it is worth waiting for the next step."""
        prompt = place.tokens[:-1]
        shared, source = max((common(tokens, prompt), -sequence) for sequence, tokens in encoded.items())
        if any(common(other.tokens[: other.done], prompt) > shared + ALIKE for other in fresh):
            return False
        if shared:
            self.context.share(-source, number, shared)
            place.done = shared
        return True


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
