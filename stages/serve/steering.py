"""What acts on the logits of an answer, token by token: seed, penalties, a grammar, and the log-probabilities that are told.

The engines give no hook in their own step. So an engine drafts some tokens greedily and hands over the logits of each; `Steering` says which
token comes instead, and from the first other one the engine drafts anew. Every token is thus chosen from the logits after exactly
what stands before it, and the draft saves only time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.serve.engine import Sampling
from stages.serve.grammar import Constraint
from stages.serve.sampling import choose
from stages.serve.scoring import log_softmax

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """How likely the model itself found a token, in nats, before penalties, temperature and grammar."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely ones, best first."""


@dataclass(kw_only=True)
class Steering:
    """Chooses the tokens of one answer."""

    sampling: Sampling
    seed: int
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it came already."""
    presence_penalty: float = 0.0
    """Taken once from that of a token that came already."""
    constraint: Constraint | None = None
    top: int | None = None
    """How many of the most likely tokens are told; null: no log-probabilities at all."""

    def __post_init__(self) -> None:
        self._seen: Counter[int] = Counter()
        self._position = 0

    def choose(self, logits: NDArray[np.float32]) -> tuple[int, bool, TokenLogprob | None]:
        """The next token, whether the grammar is complete with it, and its log-probability if they are told.

        Args:
            logits: shape (vocabulary,).

        Raises:
            ModelError: the grammar grew too complex.
        """
        import numpy as np

        changed = logits.copy()
        for token, count in self._seen.items():
            changed[token] -= self.frequency_penalty * count + self.presence_penalty
        if self.constraint is not None:
            changed[self.constraint.forbidden(len(logits))] = -np.inf
        token = choose(changed, self.sampling, self.seed, self._position)
        self._position += 1
        self._seen[token] += 1
        complete = self.constraint is not None and self.constraint.take(token)
        return token, complete, self._told(logits, token) if self.top is not None else None

    def _told(self, logits: NDArray[np.float32], token: int) -> TokenLogprob:
        import numpy as np

        logprobs, count = log_softmax(logits), self.top or 0
        best = np.argsort(-logprobs, kind="stable")[:count]
        return TokenLogprob(token=token, logprob=float(logprobs[token]), top=tuple((int(i), float(logprobs[i])) for i in best))
