"""Seeded sampling that depends on nothing but the seed, the position and the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.serve.engine import Sampling


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
    order = np.argsort(-probability, kind="stable")
    cumulative = np.cumsum(probability[order])
    kept = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1
    draw = np.random.default_rng([seed, position]).random() * cumulative[min(kept, len(order)) - 1]
    return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), len(order) - 1)])
