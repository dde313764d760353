"""An engine on contexts of sequences that share cells: continuous batching in the service, and the same batch for `generate` and `score`.

A context of its own, in which one thread at a time works, makes `generate`, `score` and the like; each `live` batch has another one. The weights are
in memory once. What is in a batch depends on the requests and `serve.engine` alone, so the same calls give the same bits.
"""

from __future__ import annotations

import functools
import secrets
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.serve.chat import Chat
from stages.serve.contexts import Context, Entry
from stages.serve.engine import Completion, Sampling, Score
from stages.serve.live_batch import LiveBatch, common
from stages.serve.sampling import choose
from stages.serve.scoring import log_softmax
from stages.serve.text import completed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS = 128
"""Rows of logits at a time: 25 MB for a vocabulary of 49,152."""


class ContextEngine(ABC):
    """What is done with contexts, whoever makes them."""

    def __init__(self, chat: Chat, settings: EngineSettings, places: int) -> None:
        """Args: places: most answers in a batch."""
        self.chat, self._settings, self._places = chat, settings, places
        self._turn = threading.Lock()
        self._kept: list[int] = []

    @abstractmethod
    def _open(self) -> Context:
        """A context of a sequence for each place, and one more."""

    @functools.cached_property
    def _context(self) -> Context:
        return self._open()

    def _cleared(self) -> Context:
        """The engine's own context, empty."""
        for sequence in range(self._places + 1):
            self._context.forget(sequence)
        return self._context

    # ------------------------------------------------------------ generate

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Answer each prompt; the next one begins when an answer ends."""
        return completed(self.chat, len(prompts), sampling, functools.partial(self._answer, prompts, sampling, sampling.seed))

    def decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: Callable[[int, int], bool]) -> None:
        """Continue several prompts."""
        self._answer(prompts, sampling, None, on_token)

    def _answer(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int | None, on_token: Callable[[int, int], bool]) -> None:
        """Work on as many answers at a time as there are places."""
        seeds = [secrets.randbits(62) if seed is None else seed for _ in prompts]
        waiting, working, given = deque(range(len(prompts))), dict[int, int](), [0] * len(prompts)
        with self._turn:
            batch = LiveBatch(self._cleared(), self._places, self._kept)
            while waiting or working:
                while waiting and (place := batch.join(prompts[waiting[0]], sampling.max_tokens)) is not None:
                    working[place] = waiting.popleft()
                for place, logits in batch.step().items():
                    index = working[place]
                    token = choose(logits, sampling, seeds[index], given[index])
                    given[index] += 1
                    if on_token(index, token) or token in self.chat.eos_ids or given[index] == sampling.max_tokens:
                        batch.leave(place)
                        del working[place]
                    else:
                        batch.push(place, token)

    # ------------------------------------------------------------ for the service

    def keep(self, prefix: Sequence[int]) -> None:
        """Begin each batch with this prefix encoded."""
        self._kept = list(prefix)

    def live(self) -> LiveBatch:
        """A batch with cells of its own."""
        return LiveBatch(self._open(), self._places, self._kept)

    def draft(self, prompt: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
        """The most likely continuation and its logits."""
        import numpy as np

        tokens: list[int] = []
        rows: list[NDArray[np.float32]] = []
        with self._turn:
            batch = LiveBatch(self._cleared(), self._places)
            batch.join(prompt, count)
            while len(tokens) < count and not self.chat.eos_ids.intersection(tokens):
                for place, logits in batch.step().items():
                    rows.append(logits.copy())
                    tokens.append(int(logits.argmax()))
                    batch.push(place, tokens[-1])
        return tokens, np.stack(rows)

    # ------------------------------------------------------------ score

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> list[list[Score]]:
        """Log-likelihood of each continuation. A context is encoded once, and not at all as far as it begins like the one before it."""
        with self._turn:
            context, before, found = self._cleared(), list[int](), list[list[Score]]()
            for prompt, continuations in requests:
                if not prompt:
                    raise ModelError("score got an empty context", "put the end token before the text, as lm-eval does")
                for continuation in continuations:
                    context.check([*prompt, *continuation])
                known = list(prompt[:-1])
                shared = common(before, known)
                context.forget(0, shared)
                list(self._rows(context, [Entry(token, at, 0, False) for at, token in enumerate(known[shared:], shared)]))
                before = known
                found.append([score for group in self._groups(len(prompt), continuations) for score in self._score(context, prompt, group)])
        return found

    def _groups(self, prompt: int, continuations: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """Continuations for which there are cells and places beside a prompt of so many tokens."""
        group: list[Sequence[int]] = []
        for continuation in continuations:
            if group and (len(group) == self._places or prompt + sum(map(len, group)) + len(continuation) > self._settings.context):
                yield group
                group = []
            group.append(continuation)
        if group:
            yield group

    def _score(self, context: Context, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        """Of continuations side by side; sequence 0 holds the prompt without its last token."""
        start, entries = len(prompt) - 1, list[Entry]()
        for sequence, continuation in enumerate(continuations, 1):
            context.share(0, sequence, start)
            given = [prompt[-1], *continuation[:-1]] if continuation else []
            entries += [Entry(token, at, sequence, True) for at, token in enumerate(given, start)]
        rows = self._rows(context, entries)
        scores = [_score((log_softmax(next(rows)), token) for token in continuation) for continuation in continuations]
        for sequence in range(1, len(continuations) + 1):
            context.forget(sequence)
        return scores

    def _rows(self, context: Context, entries: Sequence[Entry]) -> Iterator[NDArray[np.float32]]:
        """The logits that are wanted, each valid until the next."""
        for start in range(0, len(entries), ROWS):
            yield from context.encode(entries[start : start + ROWS])

    def logprobs(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities after each token of the prompt: shape (len(prompt), vocabulary)."""
        import numpy as np

        with self._turn:
            context = self._cleared()
            context.check(prompt)
            return np.stack([log_softmax(row) for row in self._rows(context, [Entry(token, at, 0, True) for at, token in enumerate(prompt)])])


def _score(rows: Iterable[tuple[NDArray[np.float32], int]]) -> Score:
    """Of (log-probabilities, token that came) pairs."""
    found = [(float(row[token]), int(row.argmax()) == token) for row, token in rows]
    return Score(logprob=sum(logprob for logprob, _ in found), greedy=all(likeliest for _, likeliest in found))
