"""JSON by constrained decoding: llguidance says before each token which ones may follow.

The mask is laid over the model's own logits (`stages.serve.steering`), so what comes out is valid in every case but one: an answer
that `max_tokens` cuts short.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from conf.errors import ModelError
from stages.serve.chat import Chat

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray


class Grammars:
    """Compiles JSON schemas for one tokenizer."""

    def __init__(self, chat: Chat) -> None:
        """Args: chat: of the model; its tokenizer is read once."""
        from llguidance import LLTokenizer

        text = (chat.folder / "tokenizer.json").read_text(encoding="utf-8")
        self._tokenizer: LLTokenizer = LLTokenizer(text, eos_token=sorted(chat.eos_ids))

    def compile(self, schema: Mapping[str, object]) -> Constraint:
        """A constraint for one answer.

        Raises:
            ModelError: the schema is no JSON schema, or uses what llguidance does not know.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise ModelError(f"the JSON schema cannot be used: {error}", "mend the schema") from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ModelError(f"the JSON schema cannot be used: {' '.join(matcher.get_error().split())[:300]}", "mend the schema")
        return Constraint(matcher, self._tokenizer.vocab_size)


class Constraint:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        """Args: vocabulary: number of ids that the tokenizer knows."""
        from llguidance.numpy import allocate_token_bitmask

        self._matcher, self._size = matcher, vocabulary
        self._bits = allocate_token_bitmask(1, vocabulary)

    def forbidden(self, vocabulary: int) -> NDArray[np.bool_]:
        """Which ids may not come next: shape (vocabulary,); what only the embedding's padding has is forbidden too."""
        import numpy as np
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bits, 0)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._size].astype(bool)
        forbidden = np.ones(vocabulary, dtype=bool)
        forbidden[: min(self._size, vocabulary)] = ~allowed[:vocabulary]
        return forbidden

    def take(self, token: int) -> bool:
        """Go on by a token; returns whether the answer is complete.

        Raises:
            ModelError: the grammar grew too complex to go on.
        """
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise ModelError(f"the JSON schema cannot be followed: {' '.join(self._matcher.get_error().split())[:300]}", "use a simpler schema")
        return bool(self._matcher.is_stopped())
