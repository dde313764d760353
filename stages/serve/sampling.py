"""Seeded sampling that depends on nothing but the seed, the position and the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.serve.engine import Sampling


LIKELY = 1024
"""Most likely tokens among which most draws end."""


def choose(logits: NDArray[np.float32], sampling: Sampling, seed: int, position: int) -> int:
    """The token at one position of an answer.

    Args:
        logits: shape (vocabulary,).
        sampling: temperature (0: the most likely token) and top_p.
        seed: of the answer.
        position: of the token in the answer; each has random numbers of its own, so that it does not matter how the
            logits were come by.
    """
    import numpy as np

    if sampling.temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / sampling.temperature
    probability = np.exp(scaled - scaled.max())
    total, share = probability.sum(), np.random.default_rng([seed, position]).random()
    order = _likeliest(probability, LIKELY)
    cumulative = np.cumsum(probability[order])
    if cumulative[-1] < (sampling.top_p if sampling.top_p < 1 else share) * total:  # seldom; sorting them all takes ten times as long
        order = _likeliest(probability, len(probability))
        cumulative = np.cumsum(probability[order])
    nucleus = total if sampling.top_p == 1 else cumulative[min(int(np.searchsorted(cumulative, sampling.top_p * total)), len(order) - 1)]
    return int(order[min(int(np.searchsorted(cumulative, share * nucleus, side="right")), len(order) - 1)])


def _likeliest(probability: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """So many ids, the most likely first; of two alike, the smaller."""
    import numpy as np

    some = np.arange(len(probability)) if count >= len(probability) else np.sort(np.argpartition(-probability, count)[:count])
    return some[np.argsort(-probability[some], kind="stable")]
