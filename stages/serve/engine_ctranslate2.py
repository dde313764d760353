"""ctranslate2 on a CPU, for a base that is no Llama-type model: `stages.serve.openvino` is faster on those.

Batches. Who has many batches (evaluate, redteam, the service) opens the engine with `batches`: each is worked on by one thread, so many at a
time as there are threads. No thread waits for another within a matrix, and the bits are the same (a test compares them).
`python -m tests.bench.evaluate` has the figures. What is in a batch depends on `serve.engine.batch` alone and never on the threads
(in the service, on who else asks): in int8 the rounding of a batch reaches its answers (of 24 answers of 64 tokens by an untuned
SmolLM2-135M, 12 became others when one batch of 24 was cut in two).

Shared prefixes. The common beginning of a batch's prompts is encoded once; for `score` see `stages.serve.scoring`.

`cache_static_prompt` is used for one prefix alone, the service's system prompt (`keep`), because ctranslate2 holds one state (18 MB at
131 tokens) per static prompt that it has ever seen. The answers are the same with and without.
`set_random_seed` has no effect on a running worker thread, so seeded sampling draws from the logits here (`_sample`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.serve.chat import Chat
from stages.serve.engine import Completion, Sampling, Score
from stages.serve.engine_cache import opened
from stages.serve.sampling import choose
from stages.serve.scoring import Item, log_softmax, plan
from stages.serve.scoring import score as scored
from stages.serve.text import TextStream, cut

if TYPE_CHECKING:
    import ctranslate2
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")

DRAFT = 8
"""Tokens drafted greedily at a time while sampling with a seed."""


def release(held: list[ctranslate2.Generator]) -> None:
    """Join a model's threads. The garbage collector may come here in one of them, which cannot wait for itself: then another thread does it, for which
    Python waits at its end (to Python a model's thread is a daemon, and what it starts would be one too)."""
    if threading.current_thread() is threading.main_thread():
        held.clear()
    else:
        threading.Thread(target=held.clear, name="release", daemon=False).start()


class CTranslate2Engine:
    """A folder written by `stages.convert`: `to_ctranslate2`, or `store`."""

    def __init__(self, folder: Path, settings: EngineSettings, batches: bool = False) -> None:
        """Load the model.

        Args:
            folder: What is loaded.
            settings: Threads and the size of a batch.
            batches: Many batches will come: one thread for each, rather than all threads for one.

        Raises:
            ModelError: a file is missing or no ctranslate2 model, or ctranslate2 is not installed.
        """
        try:
            import ctranslate2
        except ImportError as error:
            raise ModelError("serve.engine.kind=ctranslate2, and ctranslate2 is not installed", "pip install -r requirements.txt") from error
        self._settings = settings
        with opened(folder) as whole:
            for name in ("model.bin", "config.json", "vocabulary.json"):
                if not (whole / name).is_file():
                    raise ModelError(f"{whole / name} is missing", "run `dvc repro export`, or `dvc pull`")
            self.chat = Chat(folder)
            try:
                inter, intra = (settings.threads, 1) if batches else (1, settings.threads)
                generator = ctranslate2.Generator(str(whole), device="cpu", inter_threads=inter, intra_threads=intra)
            except (RuntimeError, ValueError) as error:
                raise ModelError(f"{folder} does not load: {error}", "remove it and run `dvc repro export`") from error
        self._held: list[ctranslate2.Generator] = [generator]
        # Its threads must be joined before Python's own end, or the process may abort there.
        weakref.finalize(self, release, self._held)
        self._ends = sorted(self.chat.eos_ids) or None
        self._vocabulary = 0
        self._workers = inter
        self._kept: list[int] = []

    def _each(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Work on each item, so many at a time as the model has workers."""
        if self._workers == 1 or len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(work, items))

    # ------------------------------------------------------------ generate

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Answer each prompt; a batch holds prompts of similar length, and their common beginning is encoded once."""
        if sampling.temperature > 0 and sampling.seed is not None:
            seed = sampling.seed
            return self._each(lambda prompt: self._sample(list(prompt), sampling, seed), prompts)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        size = self._settings.batch
        batches = [order[start : start + size] for start in range(0, len(order), size)][::-1]  # the long ones first: no worker is left alone with one
        found = self._each(lambda chosen: self._generate_batch([list(prompts[i]) for i in chosen], sampling), batches)
        answers = {i: answer for chosen, batch in zip(batches, found, strict=True) for i, answer in zip(chosen, batch, strict=True)}
        return [answers[i] for i in range(len(prompts))]

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """One batch."""
        if not all(prompts):
            raise ModelError("an empty prompt cannot be answered", "put a message into it")
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        grown: dict[int, TextStream] = {}

        def watch(step: ctranslate2.GenerationStepResult) -> bool:
            if step.token_id in self.chat.eos_ids:
                return False
            text = grown.setdefault(step.batch_id, TextStream(self.chat, sampling.stop))
            text.push(step.token_id)
            return text.stopped

        results = self._held[0].generate_batch(
            [self._tokens(p[shared:]) for p in prompts],
            static_prompt=self._tokens(prompts[0][:shared]) if shared else None,
            cache_static_prompt=False,
            max_length=sampling.max_tokens,
            end_token=self._ends,
            return_end_token=True,
            include_prompt_in_result=False,
            callback=watch if any(sampling.stop) else None,
            **_random(sampling),
        )
        return [self._completion(r.sequences_ids[0], sampling) for r in results]

    def _completion(self, ids: list[int], sampling: Sampling) -> Completion:
        """Drop the end token, cut at the stop text."""
        ended = bool(ids) and ids[-1] in self.chat.eos_ids
        tokens = ids[:-1] if ended else ids
        text, stopped = cut(self.chat.decode(tokens), sampling.stop)
        return Completion(tokens=tokens, text=text, finish_reason="stop" if ended or stopped else "length")

    def _sample(self, prompt: list[int], sampling: Sampling, seed: int) -> Completion:
        """Sample by the seed: draft greedily, keep what the seeded draw agrees with, go on from the first other token."""
        text = TextStream(self.chat, sampling.stop)
        while len(text.tokens) < sampling.max_tokens:
            for drafted, logits in zip(*self.draft(prompt + text.tokens, min(DRAFT, sampling.max_tokens - len(text.tokens))), strict=True):
                token = choose(logits, sampling, seed, len(text.tokens))
                if token in self.chat.eos_ids:
                    return Completion(tokens=text.tokens, text=text.text, finish_reason="stop")
                text.push(token)
                if text.stopped:
                    return Completion(tokens=text.tokens, text=text.text, finish_reason="stop")
                if token != drafted:
                    break
        return Completion(tokens=text.tokens, text=text.text, finish_reason="length")

    # ------------------------------------------------------------ for the service

    def keep(self, prefix: Sequence[int]) -> None:
        """Keep the state after this prefix, in each worker."""
        self._kept = list(prefix)

    def decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: Callable[[int, int], bool]) -> None:
        """Continue several prompts as one batch; what most of them share is encoded once, or not at all where it is the kept prefix."""
        rows = [list(prompt) for prompt in prompts]
        if not all(rows):
            raise ModelError("an empty prompt cannot be answered", "put a message into it")
        shared, kept = common_prefix(rows) if len(rows) > 1 else 0, len(self._kept)
        cached = 0 < kept < min(map(len, rows)) and all(row[:kept] == self._kept for row in rows) and len(rows) * kept >= (len(rows) - 1) * shared
        start = kept if cached else shared
        self._held[0].generate_batch(
            [self._tokens(row[start:]) for row in rows],
            static_prompt=self._tokens(rows[0][:start]) if start else None,
            cache_static_prompt=cached,
            max_length=sampling.max_tokens,
            end_token=self._ends,
            return_end_token=True,
            include_prompt_in_result=False,
            callback=lambda step: on_token(step.batch_id, step.token_id),
            **_random(sampling),
        )

    def live(self) -> None:
        """Nobody: see `stages.serve.slots`."""

    def draft(self, prompt: Sequence[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
        """The most likely continuation and its logits, from one call."""
        import numpy as np

        result = self._held[0].generate_batch(
            [self._tokens(prompt)],
            max_length=count,
            end_token=self._ends,
            return_end_token=True,
            include_prompt_in_result=False,
            return_logits_vocab=True,
        )[0]
        return list(result.sequences_ids[0]), np.stack([np.asarray(logits).reshape(-1) for logits in result.logits[0]])

    # ------------------------------------------------------------ score

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> list[list[Score]]:
        """Log-likelihood of each continuation; see `stages.serve.scoring` for how a context is encoded once."""
        forced, whole = plan(requests, self._settings.batch, self.vocabulary)
        found = [*self._each(self._score_whole, whole[::-1])[::-1], *self._each(self._score_forced, forced)]
        scores = {item.at: score for items, batch in zip([*whole, *forced], found, strict=True) for item, score in zip(items, batch, strict=True)}
        certain = Score(logprob=0.0, greedy=True)
        return [[scores.get((i, j), certain) for j in range(len(continuations))] for i, (_, continuations) in enumerate(requests)]

    def _score_whole(self, items: list[Item]) -> list[Score]:
        """Run each context with its continuation."""
        rows = zip(self._forward([item.context + item.continuation for item in items]), items, strict=True)
        return [scored(row[len(i.context) - 1 : len(i.context) - 1 + len(i.continuation)], i.continuation) for row, i in rows]

    def _score_forced(self, items: list[Item]) -> list[Score]:
        """Decode each continuation of one context under constraint, the context encoded once."""
        import numpy as np

        context, continuations = items[0].context, [item.continuation for item in items]

        def done(step: ctranslate2.GenerationStepResult) -> bool:
            return bool(step.step >= len(continuations[step.batch_id]) - 1)

        unused = next(i for i in range(len(continuations) * 64 + 64) if all(i not in c for c in continuations))
        results = self._held[0].generate_batch(
            [self._tokens([context[-1], *c[:-1]]) for c in continuations],
            static_prompt=self._tokens(context[:-1]) if len(context) > 1 else None,
            cache_static_prompt=False,
            max_length=max(map(len, continuations)),
            end_token=[unused],  # an end token inside a continuation must not end it
            return_logits_vocab=True,
            include_prompt_in_result=True,
            callback=done,
        )
        scores = []
        for continuation, result in zip(continuations, results, strict=True):
            logits = np.stack([np.asarray(step).reshape(-1) for step in result.logits[0][: len(continuation)]])
            scores.append(scored(log_softmax(logits), continuation))
        return scores

    def _forward(self, rows: list[list[int]]) -> NDArray[np.float32]:
        """Log-probabilities after each token: shape (rows, longest row, vocabulary)."""
        import numpy as np

        self._known(max(max(row) for row in rows))
        logprobs: NDArray[np.float32] = np.asarray(self._held[0].forward_batch(rows, return_log_probs=True))
        return logprobs

    def logprobs(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities after each token of the prompt: shape (len(prompt), vocabulary)."""
        logprobs: NDArray[np.float32] = self._forward([list(prompt)])[0]
        return logprobs

    # ------------------------------------------------------------ vocabulary

    @property
    def vocabulary(self) -> int:
        """Number of ids that the model knows; at least the tokenizer's."""
        if not self._vocabulary:
            import numpy as np

            self._vocabulary = np.asarray(self._held[0].forward_batch([[0]])).shape[-1]
        return self._vocabulary

    def _known(self, index: int) -> None:
        if index >= self.vocabulary:
            raise ModelError(f"token id {index} is outside the model's vocabulary of {self.vocabulary}", "use the tokenizer of this very model")

    def _tokens(self, ids: Sequence[int]) -> list[str]:
        """Vocabulary entries: ctranslate2's generation takes no ids."""
        tokens = []
        for index in ids:
            token = self.chat.token(index)
            if token is None:
                raise ModelError(f"token id {index} is outside the tokenizer's vocabulary", "use the tokenizer of this very model")
            tokens.append(token)
        return tokens


def _random(sampling: Sampling) -> dict[str, float]:
    """ctranslate2's options for drawing; none: the most likely token."""
    return {"sampling_topk": 0, "sampling_topp": sampling.top_p, "sampling_temperature": sampling.temperature} if sampling.temperature > 0 else {}


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the common beginning of all prompts, at least one token short of the shortest."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)
