"""Sequences of tokens that a model has read. They can share cells, the keys and values of a token: what a batch that answers join stands on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from conf.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Entry(NamedTuple):
    """A token to encode."""

    token: int
    position: int
    sequence: int
    wanted: bool
    """Whether the logits after it are wanted."""


class Context(ABC):
    """Sequences, numbered from 0. For one thread at a time."""

    def __init__(self, vocabulary: int, cells: int) -> None:
        """Args: vocabulary: ids that the model knows; cells: tokens that all sequences may have."""
        self.vocabulary, self.cells = vocabulary, cells
        self.encoded = 0
        """Tokens encoded so far, of all sequences."""

    def check(self, tokens: Sequence[int], more: int = 0) -> None:
        """Refuse what can never be encoded.

        Args:
            tokens: of a prompt.
            more: of its answer.

        Raises:
            ModelError: a token is none of the model's, or there are more than cells.
        """
        for token in tokens:
            if not 0 <= token < self.vocabulary:
                raise ModelError(f"token id {token} is outside the model's vocabulary of {self.vocabulary}", "use the tokenizer of this very model")
        if len(tokens) + more > self.cells:
            what = f"{len(tokens)} tokens and an answer of {more} do not fit into serve.engine.context={self.cells}"
            raise ModelError(what, "set a larger serve.engine.context, or ask for fewer tokens")

    @abstractmethod
    def encode(self, entries: Sequence[Entry]) -> Sequence[NDArray[np.float32]]:
        """Encode tokens, each after those that its sequence has; gives what follows each wanted one.

        Args:
            entries: those of one sequence one after another.

        Returns:
            Arrays of shape (vocabulary,), valid until the next call.

        Raises:
            ModelError: the engine fails.
        """

    @abstractmethod
    def share(self, source: int, target: int, count: int) -> None:
        """Let an empty sequence begin with the first so many tokens of another one."""

    @abstractmethod
    def forget(self, sequence: int, start: int = 0) -> None:
        """Take from a sequence all tokens from a position on."""
