"""The CPU engine: ctranslate2, int8 by default.

Shared prefixes. ctranslate2 has no KV cache to hand out; `generate_batch(static_prompt=…)` encodes a prefix once for a whole
batch. `score` has two ways, and takes the cheaper one per request by `_forced_is_cheaper`:

* forced: the context is the static prompt, and decoding is constrained to each continuation, all of them side by side. The
  context is encoded once; every further position costs a decoding step.
* whole: `forward_batch` over context + continuation; the context is encoded once per continuation, nothing is decoded.

Seconds per request on SmolLM2-135M, one thread, two cores with two to four other busy processes (float32 / int8):

| request                                     | forced      | whole       | `score_batch` | trie of one-token calls |
|---------------------------------------------|-------------|-------------|---------------|-------------------------|
| 12 intents of 1-6 tokens after 51 of context | 0.99 / 0.46 | 2.68 / 1.78 | 2.23 / 1.46   | 1.07 / 0.58             |
| 2 answers of 23 tokens after 20 of context   | 2.02 / 1.31 | 0.41 / 0.21 | 0.53 / 0.17   | 6.50 / 2.45             |

With six other processes: forced 2.05 / 0.83, whole 5.63 / 1.97, transformers with past_key_values in float32 1.69 on the first row; 2.23 / 1.43,
0.62 / 0.27 and 0.50 on the second. Eight answers of 24 tokens: ct2 float32 7.2 s, int8 3.1 s, transformers 7.5 s.

In float32 each way is within 2.2e-4 nats of transformers. In int8 they are up to two nats away on sums of -30, and one nat from each
other: activations are quantised anew on each path. The same requests in the same order give the same bits.

`cache_static_prompt` stays off: ctranslate2 keeps one state (18 MB at 131 tokens) per prompt it has ever seen.
`set_random_seed` has no effect on a running worker thread, so seeded sampling draws from the logits here (`_sample`).
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ModelError
from conf.schema import EngineSettings
from stages.serve.chat import Chat
from stages.serve.engine import Completion, Sampling, Score
from stages.serve.materialise import opened
from stages.serve.sampling import choose
from stages.serve.text import TextStream, cut

if TYPE_CHECKING:
    import ctranslate2
    import numpy as np
    from numpy.typing import NDArray

LOGITS_BYTES = 256 * 1024 * 1024
"""Most memory for the logits of one call."""
STEP, STEP_ROW = 12, 3
"""Cost of a decoding step, in tokens of prefill: of the step itself (the weights are read once), and per row."""
DRAFT = 8
"""Tokens drafted greedily at a time while sampling with a seed."""


class CTranslate2Engine:
    """A folder written by `stages.convert`: `to_ctranslate2`, or `store`."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        """Load the model.

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
            self.chat = Chat(whole)
            try:
                generator = ctranslate2.Generator(str(whole), device="cpu", inter_threads=1, intra_threads=settings.threads)
            except (RuntimeError, ValueError) as error:
                raise ModelError(f"{folder} does not load: {error}", "remove it and run `dvc repro export`") from error
        self._held: list[ctranslate2.Generator] = [generator]
        # Its threads must be joined before Python's own end, or the process may abort there.
        weakref.finalize(self, self._held.clear)
        self._ends = sorted(self.chat.eos_ids) or None
        self._vocabulary = 0

    # ------------------------------------------------------------ generate

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Answer each prompt; a batch holds prompts of similar length, and their common beginning is encoded once."""
        if sampling.temperature > 0 and sampling.seed is not None:
            return [self._sample(list(prompt), sampling, sampling.seed) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        answers: dict[int, Completion] = {}
        for start in range(0, len(order), self._settings.batch):
            chosen = order[start : start + self._settings.batch]
            answers.update(zip(chosen, self._generate_batch([list(prompts[i]) for i in chosen], sampling), strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling, on_token: Callable[[int], bool] | None = None) -> list[Completion]:
        """One batch; `on_token` gets each token of a single prompt, and ends the answer by returning true."""
        if not all(prompts):
            raise ModelError("an empty prompt cannot be answered", "put a message into it")
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        grown: dict[int, TextStream] = {}

        def watch(step: ctranslate2.GenerationStepResult) -> bool:
            if step.token_id in self.chat.eos_ids:
                return False
            if on_token is not None:
                return on_token(step.token_id)
            text = grown.setdefault(step.batch_id, TextStream(self.chat, sampling.stop))
            text.push(step.token_id)
            return text.stopped

        random = {"sampling_topk": 0, "sampling_topp": sampling.top_p, "sampling_temperature": sampling.temperature} if sampling.temperature > 0 else {}
        results = self._held[0].generate_batch(
            [self._tokens(p[shared:]) for p in prompts],
            static_prompt=self._tokens(prompts[0][:shared]) if shared else None,
            cache_static_prompt=False,
            max_length=sampling.max_tokens,
            end_token=self._ends,
            return_end_token=True,
            include_prompt_in_result=False,
            callback=watch if on_token is not None or any(sampling.stop) else None,
            **random,
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
        import numpy as np

        text = TextStream(self.chat, sampling.stop)
        while len(text.tokens) < sampling.max_tokens:
            result = self._held[0].generate_batch(
                [self._tokens(prompt + text.tokens)],
                max_length=min(DRAFT, sampling.max_tokens - len(text.tokens)),
                end_token=self._ends,
                return_end_token=True,
                include_prompt_in_result=False,
                return_logits_vocab=True,
            )[0]
            for drafted, logits in zip(result.sequences_ids[0], result.logits[0], strict=True):
                token = choose(np.asarray(logits).reshape(-1), sampling, seed, len(text.tokens))
                if token in self.chat.eos_ids:
                    return Completion(tokens=text.tokens, text=text.text, finish_reason="stop")
                text.push(token)
                if text.stopped:
                    return Completion(tokens=text.tokens, text=text.text, finish_reason="stop")
                if token != drafted:
                    break
        return Completion(tokens=text.tokens, text=text.text, finish_reason="length")

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[str]:
        """Answer one prompt, piece by piece; closing the iterator ends the generation. A seeded sample comes in one piece."""
        if sampling.temperature > 0 and sampling.seed is not None:
            yield self._sample(list(prompt), sampling, sampling.seed).text
            return
        text, pieces, gone = TextStream(self.chat, sampling.stop), queue.SimpleQueue[str | None](), threading.Event()
        failed: list[BaseException] = []

        def on_token(token: int) -> bool:
            pieces.put(text.push(token))
            return text.stopped or gone.is_set() or not threading.main_thread().is_alive()

        def work() -> None:
            try:
                self._generate_batch([list(prompt)], sampling, on_token)
            except BaseException as error:  # handed over to the reader, who raises it
                failed.append(error)
            finally:
                pieces.put(None)

        worker = threading.Thread(target=work)  # no daemon: at the end of Python it must have left ctranslate2
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if piece:
                    yield piece
            if failed:
                raise failed[0]
            if rest := text.finish():
                yield rest
        finally:
            gone.set()
            worker.join()

    # ------------------------------------------------------------ score

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> list[list[Score]]:
        """Log-likelihood of each continuation; see the module's docstring for how a context is encoded once."""
        scores: dict[tuple[int, int], Score] = {}
        whole: list[tuple[int, int, list[int], list[int]]] = []
        for i, (context, continuations) in enumerate(requests):
            if not context:
                raise ModelError("score got an empty context", "put the end token before the text, as lm-eval does")
            chunks = [list(range(j, min(j + self._settings.batch, len(continuations)))) for j in range(0, len(continuations), self._settings.batch)]
            for chunk in chunks:
                forced = [j for j in chunk if len(continuations[j])]
                scores.update({(i, j): Score(logprob=0.0, greedy=True) for j in chunk if not len(continuations[j])})
                if _forced_is_cheaper(len(context), [len(continuations[j]) for j in forced]):
                    found = self._score_forced(list(context), [list(continuations[j]) for j in forced])
                    scores.update({(i, j): score for j, score in zip(forced, found, strict=True)})
                else:
                    whole += [(i, j, list(context), list(continuations[j])) for j in forced]
        whole.sort(key=lambda item: (len(item[2]) + len(item[3]), item[0], item[1]))
        while whole:
            batch = self._fitting(whole)
            whole = whole[len(batch) :]
            logprobs = self._forward([context + continuation for _, _, context, continuation in batch])
            for row, (i, j, context, continuation) in zip(logprobs, batch, strict=True):
                scores[i, j] = _score(row[len(context) - 1 : len(context) - 1 + len(continuation)], continuation)
        return [[scores[i, j] for j in range(len(continuations))] for i, (_, continuations) in enumerate(requests)]

    def _fitting(self, items: list[tuple[int, int, list[int], list[int]]]) -> list[tuple[int, int, list[int], list[int]]]:
        """The first items (sorted by length) whose padded logits fit into memory: at least one."""
        count = 1
        while count < min(len(items), self._settings.batch):
            longest = len(items[count][2]) + len(items[count][3])
            if 4 * self.vocabulary * longest * (count + 1) > LOGITS_BYTES:
                break
            count += 1
        return items[:count]

    def _score_forced(self, context: list[int], continuations: list[list[int]]) -> list[Score]:
        """Decode each continuation under constraint, the context encoded once."""
        import numpy as np

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
            scores.append(_score(_log_softmax(logits), continuation))
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


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the common beginning of all prompts, at least one token short of the shortest."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _forced_is_cheaper(context: int, lengths: Sequence[int]) -> bool:
    """Whether constrained decoding costs less than forwarding everything; lengths in tokens."""
    if not lengths:
        return False
    steps = sum(STEP + STEP_ROW * sum(length > at for length in lengths) for at in range(max(lengths)))
    return context + steps < sum(context + length for length in lengths)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _score(logprobs: NDArray[np.float32], continuation: list[int]) -> Score:
    """Args: logprobs: shape (len(continuation), vocabulary), each row before its token."""
    import numpy as np

    at = np.arange(len(continuation)), np.asarray(continuation)
    return Score(logprob=float(logprobs[at].astype(np.float64).sum()), greedy=bool((logprobs.argmax(axis=-1) == at[1]).all()))
