"""How ctranslate2 is asked for likelihoods: which requests share an encoded context, and which are run whole.

ctranslate2 has no KV cache to hand out; `generate_batch(static_prompt=…)` encodes a prefix once for a whole batch. There are
two ways, and `plan` takes the cheaper one per request by `forced_is_cheaper`:

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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.errors import ModelError
from stages.serve.engine import Score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOGITS_BYTES = 256 * 1024 * 1024
"""Most memory for the logits of one call."""
STEP, STEP_ROW = 12, 3
"""Cost of a decoding step, in tokens of prefill: of the step itself (the weights are read once), and per row."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One continuation to be scored."""

    at: tuple[int, int]
    """Number of the request, and of the continuation in it."""
    context: list[int]
    continuation: list[int]


def plan(requests: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], batch: int, vocabulary: int) -> tuple[list[list[Item]], list[list[Item]]]:
    """Cut requests into calls: those that decode continuations of one context under constraint, and those that run whole texts.

    Args:
        requests: (context, continuations) as of `Engine.score`; an empty continuation is in no call.
        batch: Most continuations in a call.
        vocabulary: Size of a row of logits.

    Raises:
        ModelError: an empty context.
    """
    forced: list[list[Item]] = []
    whole: list[Item] = []
    for i, (context, continuations) in enumerate(requests):
        if not context:
            raise ModelError("score got an empty context", "put the end token before the text, as lm-eval does")
        for start in range(0, len(continuations), batch):
            chunk = enumerate(continuations[start : start + batch], start)
            items = [Item(at=(i, j), context=list(context), continuation=list(c)) for j, c in chunk if len(c)]
            if forced_is_cheaper(len(context), [len(item.continuation) for item in items]):
                forced.append(items)
            else:
                whole += items
    whole.sort(key=lambda item: (len(item.context) + len(item.continuation), item.at))
    batches: list[list[Item]] = []
    while whole:
        count = fitting(whole[:batch], vocabulary)
        batches.append(whole[:count])
        whole = whole[count:]
    return forced, batches


def fitting(items: Sequence[Item], vocabulary: int) -> int:
    """How many of the first items (sorted by length) have padded logits that fit into memory: at least one."""
    lengths = [len(item.context) + len(item.continuation) for item in items]
    return next((count for count in range(1, len(items)) if 4 * vocabulary * lengths[count] * (count + 1) > LOGITS_BYTES), len(items))


def forced_is_cheaper(context: int, lengths: Sequence[int]) -> bool:
    """Whether constrained decoding costs less than forwarding everything; lengths in tokens."""
    if not lengths:
        return False
    steps = sum(STEP + STEP_ROW * sum(length > at for length in lengths) for at in range(max(lengths)))
    return context + steps < sum(context + length for length in lengths)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities of logits, along the last axis."""
    import numpy as np

    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def score(logprobs: NDArray[np.float32], continuation: list[int]) -> Score:
    """The score of one continuation.

    Args:
        logprobs: shape (len(continuation), vocabulary), each row before its token.
    """
    import numpy as np

    at = np.arange(len(continuation)), np.asarray(continuation)
    return Score(logprob=float(logprobs[at].astype(np.float64).sum()), greedy=bool((logprobs.argmax(axis=-1) == at[1]).all()))
